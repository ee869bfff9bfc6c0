"""Checks of settings: types according to their hints, numbers within the bounds of one table, and none without effect."""

import os
import types
from collections.abc import Collection
from dataclasses import MISSING, fields
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from ..pipelines.stage_table import MAX_GUIDANCE
from ..utils.arguments import check_choice, shown
from ..utils.bounds import MAX_STD, MAX_STEPS, MIN_STD


class Bounds(NamedTuple):
    """Bounds of a value, or of each entry of a list, inclusive, or exclusive with `above` and `below`."""

    low: float
    high: float
    above: bool = False
    below: bool = False
    of: str = "numbers"

    def has(self, value: float) -> bool:
        """Return whether a number is within the bounds; NaN never is."""
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if self.below else value <= self.high
        )

    def __str__(self) -> str:
        low, high = "above" if self.above else "at least", "below" if self.below else "at most"
        return f"{low} {self.low:.17g} and {high} {self.high:.17g}"


RESOLUTION = Bounds(1, 2**14)  # pixels
COUNT, STEPS = Bounds(1, 2**20), Bounds(1, 10**9)
SHARE = Bounds(0, 1)

# bounds of all numbers in the configuration of a run, its data, an adapter and DreamBooth; for lists, of each entry
BOUNDS = {
    **dict.fromkeys(("resolution", "min_resolution", "bucket_step", "low_resolution"), RESOLUTION),
    "max_train_samples": Bounds(1, 10**12),
    "shuffle_buffer_size": Bounds(1, 10**7),
    "caption_probabilities": Bounds(0, 10**6),
    "degradation_blur_sigma": Bounds(0, 1000),
    "degradation_jpeg_quality": Bounds(0, 100),  # for this and crop_size, 0 has a more specific error
    "crop_size": Bounds(0, RESOLUTION.high),
    **dict.fromkeys(("tokenizer_max_length", "train_batch_size", "gradient_accumulation_steps"), COUNT),
    "dataloader_num_workers": Bounds(0, 1024),
    "seed": Bounds(0, 2**32 - 1),  # supported by Python, NumPy and torch
    "layers_per_block": Bounds(0, 100),
    "sigma_data": Bounds(0, 1000, above=True),
    "p_mean": Bounds(-20, 20),
    "p_std": Bounds(0, 20, above=True),
    "snr_gamma": Bounds(0, 10**6, above=True),
    "text_drop_rate": SHARE,
    "noise_conditioning_augmentation": Bounds(0, 1000),
    **dict.fromkeys(("max_train_steps", "num_train_epochs", "validation_epochs"), STEPS),
    "num_validation_images": Bounds(1, 1000),
    "learning_rate": SHARE,
    "lr_warmup_steps": Bounds(0, 10**9),
    "lr_num_cycles": Bounds(1, 10**6),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "ema_decay"), Bounds(0, 1, below=True)),
    "adam_weight_decay": Bounds(0, 100),
    "adam_epsilon": Bounds(0, 1, above=True),  # with 0, a gradient of 0 would result in 0 / 0
    "max_grad_norm": Bounds(0, 10**9),
    "ema_stds": Bounds(MIN_STD, MAX_STD, below=True, of="fractions of the run"),
    "ema_snapshot_steps": STEPS,
    **dict.fromkeys(("checkpointing_steps", "checkpoints_total_limit", "validation_steps", "logging_steps"), STEPS),
    "validation_num_images": Bounds(2, 10**7),
    "validation_num_reference": Bounds(2, 10**7),
    "validation_batch_size": COUNT,
    "validation_num_inference_steps": Bounds(1, MAX_STEPS),
    "validation_guidance_scale": Bounds(0, MAX_GUIDANCE),
    "rank": Bounds(1, 2**14),
    "lora_alpha": Bounds(0, 10**6, above=True),
    "prior_loss_weight": Bounds(0, 10**6, above=True),
    "num_class_images": Bounds(1, 10**6),
    "sample_batch_size": COUNT,
}

KINDS: dict[type, tuple[Any, str]] = {
    int: (Integral, "an integer"),
    float: (Real, "a number"),
    str: ((str, os.PathLike), "a string"),
}


def check_settings(settings: Any) -> None:
    """Check types and bounds of all fields of a dataclass, in place: numbers and paths become int, float and str.

    Raises:
        ValueError: For the first invalid field; names the field, its value and what it should be.
    """
    hints = hints_of(type(settings))
    for field in fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        if get_origin(hint) in (Union, types.UnionType):
            if value is None:
                continue
            hint = next(part for part in get_args(hint) if part is not type(None))
        setattr(settings, field.name, check_value(field.name, value, hint))


def check_unused(settings: Any, given: Collection[str] = ()) -> None:
    """Check that settings without effect are not given.

    Args:
        settings: A dataclass with a method `unused`: the settings that have no effect, with the reason.
        given (`list[str]`):
            Names of settings that are known to be given, with any value; others are if they are not the default.

    Raises:
        ValueError: For the first such setting; names the setting, its value and the reason.
    """
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(settings)}
    for name, reason in settings.unused().items():
        value = getattr(settings, name)
        if name in given or value != defaults[name]:
            raise ValueError(f"`{name}` is {value!r}, but {reason}.")


def hints_of(settings_class: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields."""
    return get_type_hints(settings_class)


def check_value(name: str, value: Any, hint: Any) -> Any:
    """Check a value against its hint and bounds, and return it in the type of the hint."""
    if get_origin(hint) is Literal:
        check_choice(name, value, get_args(hint))
        return str(value)
    if get_origin(hint) is list:
        (kind,) = get_args(hint)
        if not isinstance(value, (list, tuple)) or not all(is_of_kind(entry, kind) for entry in value):
            raise ValueError(f"`{name}` is {shown(value)}, but should be a list, each entry {KINDS[kind][1]}.")
        bounds = BOUNDS.get(name)
        if bounds is not None and not all(map(bounds.has, value)):
            raise ValueError(f"`{name}` is {shown(value)}, but should be {bounds.of} {bounds}.")
        return [plain(name, entry, kind) for entry in value]
    if not is_of_kind(value, hint):
        raise ValueError(
            f"`{name}` is {shown(value)}, but should be {'True or False' if hint is bool else KINDS[hint][1]}."
        )
    if name in BOUNDS and not BOUNDS[name].has(value):
        raise ValueError(f"`{name}` is {shown(value)}, but should be {BOUNDS[name]}.")
    return plain(name, value, hint)


def is_of_kind(value: Any, kind: type) -> bool:
    """Return whether a value is accepted for a type: True is not a number."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, KINDS[kind][0])


def plain(name: str, value: Any, kind: type) -> Any:
    """Convert a value to a type of JSON."""
    if kind is str:
        text = os.fspath(value)
        if not isinstance(text, str) or not is_text(text):
            raise ValueError(f"`{name}` has {shown(text)}, but should be text in UTF-8, without null characters.")
        return text
    if kind is bool or type(value) in (int, float):
        return value
    return kind(value)


def is_text(value: str) -> bool:
    """Return whether a string is valid in files and for tokenizers: shell arguments can contain invalid UTF-8."""
    try:
        return "\0" not in value.encode().decode()
    except UnicodeEncodeError:
        return False
