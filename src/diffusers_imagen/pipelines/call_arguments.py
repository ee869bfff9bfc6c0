"""The arguments of a call as one object."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch

from .image_inputs import ImageInput
from .prompts import Prompts


T = TypeVar("T")
PerStage: TypeAlias = T | list[T] | dict[str, T]


@dataclass
class CallArguments:
    """Arguments of a pipeline's `__call__`; arguments that a pipeline does not have keep their defaults."""

    num_inference_steps: PerStage[int] | None
    sigmas: list[float] | dict[str, list[float]] | None
    timesteps: list[float] | dict[str, list[float]] | None
    guidance_scale: PerStage[float] | None
    guidance_interval: PerStage[tuple[float, float]] | None
    guidance_rescale: PerStage[float]
    height: int | None
    width: int | None
    num_images_per_prompt: int
    generator: torch.Generator | list[torch.Generator] | None
    latents: torch.Tensor | None
    output_type: str
    return_dict: bool
    callback_on_step_end: Callable | None
    callback_on_step_end_tensor_inputs: list[str]
    cross_attention_kwargs: dict[str, float] | None
    text: Prompts
    image: ImageInput | None = None
    mask_image: ImageInput | None = None
    strength: float | None = None
    num_resample_times: int = 1
    low_res_noise_level: PerStage[float] | None = None
    output_resolution: int | None = None

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> "CallArguments":
        """Collect the arguments from the local variables at the beginning of `__call__`."""
        arguments = {name: value for name, value in arguments.items() if name != "self"}
        text = Prompts(**{name: arguments.pop(name) for name in Prompts.__dataclass_fields__})
        return cls(text=text, **arguments)
