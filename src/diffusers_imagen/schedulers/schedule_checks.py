"""Checks of what a caller gives to a scheduler: its configuration, a schedule, a step. All of them raise ValueError."""

from typing import Any

import numpy as np
import torch

from ..utils.arguments import is_integer, is_number, shown


MIN_SIGMA, MAX_SIGMA = 1e-10, 1e10  # beyond, float32 overflows where noise levels are squared
# bounds far beyond use, and below what would run until it is killed
MAX_STEPS = 10_000
MAX_TRAIN_TIMESTEPS = 1_000_000


def check_config_number(name: str, value: Any, minimum: int | float, maximum: int | float):
    """A number of a configuration as Python's, so that it can be saved: whole where its bounds are whole above 0."""
    whole = isinstance(minimum, int) and minimum > 0 and isinstance(maximum, int)
    kind = "an integer" if whole else "a number"
    is_kind = is_integer(value) if whole else is_number(value)
    if not is_kind or not minimum <= value <= maximum:
        raise ValueError(f"`{name}` must be {kind} in [{minimum:g}, {maximum:g}], got {shown(value)}")
    return int(value) if is_integer(value) else float(value)


# ---- schedules


def one_schedule(num_inference_steps, sigmas, timesteps) -> None:
    """Exactly one of `set_timesteps`' descriptions of a schedule."""
    given = {"num_inference_steps": num_inference_steps, "sigmas": sigmas, "timesteps": timesteps}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise ValueError(f"`set_timesteps` needs exactly one of {list(given)}, got {names or 'none of them'}")


def check_step_count(num_inference_steps: Any) -> int:
    """`num_inference_steps` as an int; a float that is whole is one."""
    if not is_number(num_inference_steps) or num_inference_steps % 1 != 0:  # which NaN and infinity are not
        raise ValueError(f"`num_inference_steps` must be an integer, got {shown(num_inference_steps)}")
    if num_inference_steps < 1:
        raise ValueError(f"`num_inference_steps` must be at least 1, got {num_inference_steps}")
    if num_inference_steps > MAX_STEPS:
        raise ValueError(f"`num_inference_steps` must be at most {MAX_STEPS}, got {shown(num_inference_steps)}")
    return int(num_inference_steps)


def check_device(device: Any) -> None:
    """None, or a device that there is."""
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: torch without CUDA
        raise ValueError(f"`device` must be one that this torch has, got {shown(device)}: {error}") from error


def level_tensor(name: str, levels: Any) -> torch.Tensor:
    """
    Numbers of a caller, `(N,)` on the CPU: int64 if all are whole numbers of Python's, else in float64. Tensors in
    other dtypes than float32 keep theirs, which may mean something.
    """
    if isinstance(levels, torch.Tensor) and not levels.is_meta and not levels.is_complex():
        tensor = levels.detach().cpu()
    elif isinstance(levels, np.ndarray) and levels.dtype.kind in "iuf":
        tensor = torch.from_numpy(levels.astype(np.float64 if levels.dtype.kind == "f" else np.int64))
    elif isinstance(levels, (list, tuple)) and all(is_number(level) for level in levels):
        whole = all(is_integer(level) and abs(level) < 2**63 for level in levels) and len(levels) > 0
        try:
            numbers = [int(level) if whole else float(level) for level in levels]
        except OverflowError as error:  # integers beyond floating point
            raise ValueError(f"`{name}` must be a list of finite numbers, got {shown(levels)}") from error
        tensor = torch.tensor(numbers, dtype=torch.int64 if whole else torch.float64)
    else:
        raise ValueError(f"`{name}` must be a list of finite numbers, got {shown(levels)}")
    if tensor.dim() != 1 or tensor.dtype == torch.bool or len(tensor) > MAX_STEPS:
        raise ValueError(f"`{name}` must be a list of at most {MAX_STEPS} finite numbers, got {shown(levels)}")
    return tensor.double() if tensor.dtype == torch.float32 else tensor


def decreasing_sigmas(name: str, sigmas: torch.Tensor, given: Any) -> torch.Tensor:
    """
    The caller's noise levels `(N,)` in float64; a final zero is dropped, because every run ends at it anyway.

    Raises:
        ValueError: unless they are finite, strictly decreasing levels above 0; it shows `name` and what was `given`.
    """
    levels = sigmas.double()
    if len(levels) > 1 and levels[-1] == 0:
        levels = levels[:-1]
    if len(levels) == 0 or not levels.isfinite().all() or levels.min() <= 0:
        raise ValueError(f"the noise levels of `{name}` must be a list of finite numbers above 0, got {shown(given)}")
    if not (levels.min() >= MIN_SIGMA and levels.max() <= MAX_SIGMA):
        raise ValueError(
            f"the noise levels of `{name}` must lie in [{MIN_SIGMA:g}, {MAX_SIGMA:g}], got {shown(given)}"
        )
    if (levels.diff() >= 0).any():
        raise ValueError(f"the noise levels of `{name}` must decrease strictly, got {shown(given)}")
    return levels


# ---- steps


def as_tensor(name: str, value: Any, images: torch.Tensor | None = None) -> torch.Tensor:
    """A number, or real numbers, as a tensor with values; for `images` one, or one for each."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"`{name}` must be a number or a tensor, got {shown(value)}") from error
    if tensor.is_meta or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"`{name}` must be a real number or a tensor of them, got {shown(value)}")
    if images is not None and (tensor.dim() > 1 or tensor.numel() not in (1, len(images))):
        raise ValueError(
            f"`{name}` must be one value, or one for each of the {len(images)} samples, got shape {tuple(tensor.shape)}"
        )
    return tensor


def check_images(**images: Any) -> None:
    """Tensors in floating point, all of the shape of the first, which has a batch."""
    first, like = next(iter(images.items()))
    for name, image in images.items():
        if not isinstance(image, torch.Tensor) or not image.is_floating_point():
            raise ValueError(f"`{name}` must be a tensor in floating point, got {shown(image)}")
        if image.dim() == 0:
            raise ValueError(f"`{name}` must be a batch of images, got one number")
        if image.device != like.device:
            raise ValueError(f"`{name}` must be on the device of `{first}`, {like.device}, got {image.device}")
        if image.shape != like.shape:
            raise ValueError(
                f"`{name}` must have the shape of `{first}` {tuple(like.shape)}, got {tuple(image.shape)}"
            )


def check_generator(generator: Any, batch_size: int) -> None:
    """None, a generator, or one for each image."""
    entries = generator if isinstance(generator, list) else [generator]
    if generator is not None and not all(isinstance(entry, torch.Generator) for entry in entries):
        raise ValueError(f"`generator` must be a torch.Generator or a list of them, got {shown(generator)}")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"`generator` must have one entry for each of {batch_size} images, got {len(generator)}")
