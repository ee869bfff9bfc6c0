"""Checks of arguments of schedulers (configuration, schedule, step); all of them raise ValueError."""

from typing import Any

import numpy as np
import torch

from ..utils.arguments import bad_argument, check_exactly_one, is_integer, is_number
from ..utils.bounds import MAX_STEPS


MIN_SIGMA, MAX_SIGMA = 1e-10, 1e10  # beyond, float32 overflows where noise levels are squared
MIN_BETA, MAX_BETA = 1e-10, 0.99999  # at 0 a noise level equals the one before, at 1 no image is left
MAX_TRAIN_TIMESTEPS = 1_000_000  # far beyond use, and below what would run until it is killed


# ---- configurations


def check_config_number(name: str, value: Any, minimum: int | float, maximum: int | float) -> int | float:
    """Return a configuration's number as a Python number that can be saved: an integer if its bounds are integers above 0."""
    whole = isinstance(minimum, int) and minimum > 0 and isinstance(maximum, int)
    is_kind = is_integer(value) if whole else is_number(value)
    if not is_kind or not minimum <= value <= maximum:
        raise bad_argument(name, value, f"{'an integer' if whole else 'a number'} in [{minimum:g}, {maximum:g}]")
    return int(value) if is_integer(value) else float(value)


def check_betas(name: str, betas: Any, count: int) -> list[float]:
    """Return custom betas, one for each of `count` timesteps, as a list that can be saved."""
    values = as_values(name, betas)
    if len(values) != count or not ((values >= MIN_BETA) & (values <= MAX_BETA)).all():
        raise bad_argument(
            name, betas, f"a list of `num_train_timesteps`, {count}, numbers in [{MIN_BETA:g}, {MAX_BETA:g}]"
        )
    return values.tolist()


# ---- schedules


def check_request(num_inference_steps: Any, sigmas: Any, timesteps: Any, device: Any) -> None:
    """Check that exactly one of `set_timesteps`' schedule arguments is given, and that the device is None or exists."""
    check_exactly_one(num_inference_steps=num_inference_steps, sigmas=sigmas, timesteps=timesteps)
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: torch without CUDA
        raise bad_argument("device", device, f"one that this torch has: {error}") from error


def check_step_count(num_inference_steps: Any) -> int:
    """Return `num_inference_steps` as an int; floats without a fraction are accepted."""
    # excludes NaN and infinity
    whole = is_number(num_inference_steps) and num_inference_steps % 1 == 0
    if not whole or not 1 <= num_inference_steps <= MAX_STEPS:
        raise bad_argument(
            "num_inference_steps", num_inference_steps, f"an integer of at least 1 and at most {MAX_STEPS}"
        )
    return int(num_inference_steps)


def as_values(name: str, values: Any) -> torch.Tensor:
    """
    Convert a caller's numbers to `(N,)` on the CPU: int64 if all are Python ints, else float64. Tensors of other
    dtypes than float32 keep their dtype, which can be significant.
    """
    expected = f"a list of at most {MAX_STEPS} finite numbers"
    if isinstance(values, torch.Tensor) and not values.is_meta and not values.is_complex():
        tensor = values.detach().cpu()
    elif isinstance(values, np.ndarray) and values.dtype.kind in "iuf":
        tensor = torch.from_numpy(values.astype(np.float64 if values.dtype.kind == "f" else np.int64))
    elif isinstance(values, (list, tuple)) and all(is_number(value) for value in values):
        whole = all(is_integer(value) and abs(value) < 2**63 for value in values) and len(values) > 0
        try:
            numbers = [int(value) if whole else float(value) for value in values]
        except OverflowError as error:  # integers too large for floating point
            raise bad_argument(name, values, expected) from error
        tensor = torch.tensor(numbers, dtype=torch.int64 if whole else torch.float64)
    else:
        raise bad_argument(name, values, expected)
    if tensor.dim() != 1 or tensor.dtype == torch.bool or len(tensor) > MAX_STEPS:
        raise bad_argument(name, values, expected)
    return tensor.double() if tensor.dtype == torch.float32 else tensor


def as_sigmas(name: str, sigmas: torch.Tensor, given: Any) -> torch.Tensor:
    """
    Return the caller's noise levels `(N,)` in float64; a final zero is dropped, because every run ends at zero.

    Raises:
        ValueError: unless they are finite, strictly decreasing and above 0; the message shows `name` and `given`.
    """
    sigmas = sigmas.double()
    if len(sigmas) > 1 and sigmas[-1] == 0:
        sigmas = sigmas[:-1]
    if len(sigmas) == 0 or not sigmas.isfinite().all() or sigmas.min() <= 0:
        raise bad_argument(name, given, "a list of noise levels that are finite and above 0")
    if not (sigmas.min() >= MIN_SIGMA and sigmas.max() <= MAX_SIGMA):
        raise bad_argument(name, given, f"a list of noise levels in [{MIN_SIGMA:g}, {MAX_SIGMA:g}]")
    if (sigmas.diff() >= 0).any():
        raise bad_argument(name, given, "a list of noise levels that decrease strictly")
    return sigmas


# ---- steps


def as_tensor(name: str, value: Any, images: torch.Tensor | None = None) -> torch.Tensor:
    """Convert one or more real numbers to a tensor; with `images`, one number or one per image."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise bad_argument(name, value, "a number or a tensor") from error
    if tensor.is_meta or tensor.is_complex() or tensor.dtype == torch.bool:
        raise bad_argument(name, value, "a real number or a tensor of them")
    if images is not None and (tensor.dim() > 1 or tensor.numel() not in (1, len(images))):
        raise ValueError(
            f"`{name}` is of shape {tuple(tensor.shape)}, but should be one value, or one for each of the "
            f"{len(images)} samples."
        )
    return tensor


def check_images(**images: Any) -> None:
    """Check that all are floating-point tensors with a batch dimension, on one device and of the same shape."""
    first, like = next(iter(images.items()))
    for name, image in images.items():
        if not isinstance(image, torch.Tensor) or not image.is_floating_point() or image.dim() == 0:
            raise bad_argument(name, image, "a tensor of images in floating point")
        if image.device != like.device:
            raise ValueError(
                f"`{name}` is on {image.device}, but should be on the device of `{first}`, {like.device}."
            )
        if image.shape != like.shape:
            raise ValueError(
                f"`{name}` is of shape {tuple(image.shape)}, but should be of the shape of `{first}`, {tuple(like.shape)}."
            )


def check_generator(generator: Any, batch_size: int) -> None:
    """Check that the generator is None, one generator, or a list of one per image."""
    entries = generator if isinstance(generator, list) else [generator]
    if generator is not None and not all(isinstance(entry, torch.Generator) for entry in entries):
        raise bad_argument("generator", generator, "a torch.Generator or a list of them")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(
            f"`generator` is a list of {len(generator)}, but should be one, or one for each of {batch_size} images."
        )
