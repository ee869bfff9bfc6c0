"""Checks of tensor arguments and weights."""

from typing import Any

import torch

from .arguments import shown


INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, value: Any, form: str, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """Check that a value is a dense tensor of real, finite numbers, with data; `form` is the shape for messages."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"`{name}` is {shown(value)}, but should be a tensor {form}.")
    if value.is_nested or value.is_quantized or value.layout != torch.strided:
        raise ValueError(f"`{name}` is a nested, sparse or quantized tensor, but should be a dense one {form}.")
    if value.is_meta:
        raise ValueError(f"`{name}` is on the meta device, where tensors have no data, but should be on a CPU or GPU.")
    if value.dtype not in dtypes:
        raise ValueError(
            f"`{name}` is of {value.dtype}, but should be a tensor {form} of one of {[str(dtype) for dtype in dtypes]}."
        )
    if value.is_floating_point() and not value.isfinite().all():
        raise ValueError(f"`{name}` has values that are not finite (NaN or infinite).")
