"""Callbacks after each network call, and the changes that they may make."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from ..utils.arguments import class_of, is_number, shown


PREDICTED = "pred_original_sample"  # the tensor that a callback may read, but not change; named as in diffusers


class Callback(NamedTuple):
    """Callback of the caller, and the names of the tensors that it takes."""

    function: Callable | None
    tensor_inputs: list[str]


def check_callback(function: Any, tensor_inputs: Any, known: list[str]) -> Callback:
    """Return the caller's callback; diffusers' own callback classes declare the tensors that they take.

    Raises:
        ValueError: If it is not callable, or takes tensors that do not exist.
    """
    if function is not None and not callable(function):
        raise ValueError(
            f"`callback_on_step_end` is {shown(function)}, but should be called as callback(pipe, step, timestep, "
            "tensors)."
        )
    name = "callback_on_step_end_tensor_inputs"
    if isinstance(function, (PipelineCallback, MultiPipelineCallbacks)):
        name = "tensor_inputs` of `callback_on_step_end"
        try:
            tensor_inputs = function.tensor_inputs
        except (NotImplementedError, AttributeError, TypeError) as error:
            raise ValueError(
                f"`callback_on_step_end` is {class_of(function)}, without `tensor_inputs`: {error}"
            ) from error
    if not isinstance(tensor_inputs, (list, tuple)) or not all(isinstance(item, str) for item in tensor_inputs):
        raise ValueError(f"`{name}` is {shown(tensor_inputs)}, but should be a list of names among {known}.")
    unknown = set(tensor_inputs) - set(known)
    if unknown:
        raise ValueError(f"`{name}` has {shown(sorted(unknown))}, but should be among {known}.")
    return Callback(function, list(dict.fromkeys(tensor_inputs)))


def read_changes(returned: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors that a callback returned, as replacements for the given tensors of the same names.

    Raises:
        ValueError: If they cannot replace them.
    """
    if returned is None:
        return {}
    if not isinstance(returned, Mapping):
        raise ValueError(f"`callback_on_step_end` returned {shown(returned)}, but should return a dict of tensors.")
    return {name: _in_place_of(given[name], name, tensor) for name, tensor in returned.items() if name in given}


def read_scale(scale: Any, function: Callable) -> float:
    """Check the guidance scale that a callback may have set.

    Raises:
        ValueError: If it is not a number.
    """
    if not is_number(scale):
        raise ValueError(f"`callback_on_step_end` set `_guidance_scale` to {shown(scale)}, but it should be a number.")
    if scale == 0 and isinstance(function, (PipelineCallback, MultiPipelineCallbacks)):
        return 1.0  # diffusers' callbacks disable guidance by 0, which here is 1
    return scale


def _in_place_of(given: torch.Tensor | None, name: str, tensor: Any) -> torch.Tensor | None:
    """
    Move a tensor that a callback returned to the device of the given one; an unchanged tensor stays the same object.
    """
    if tensor is given:
        return given
    expected = "None" if given is None else f"a tensor of shape {tuple(given.shape)}"
    is_strange = not isinstance(tensor, torch.Tensor) or tensor.is_meta or tensor.is_complex()
    if given is None or is_strange or tensor.shape != given.shape:
        raise ValueError(f"`callback_on_step_end` returned `{name}` as {shown(tensor)}, but should return {expected}.")
    return tensor.to(given.device, given.dtype)
