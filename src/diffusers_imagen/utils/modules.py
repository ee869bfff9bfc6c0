"""Networks as they are loaded and held: without reports, compiled, offloaded, with weights that are not finite."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils.torch_utils import is_compiled_module
from transformers.utils import logging as transformers_logging


def unwrapped(module: Any) -> Any:
    """Return the network that `torch.compile` wrapped; anything else as it is."""
    return module._orig_mod if is_compiled_module(module) else module


def is_offloaded(module: torch.nn.Module) -> bool:
    """Return whether weights may be elsewhere, with the meta device in their place."""
    return any(hasattr(part, "_hf_hook") for part in module.modules())


def is_quantized(module: torch.nn.Module) -> bool:
    """Return whether a library holds weights in its own form, as bitsandbytes and torchao do, and not as floating-point numbers."""
    return getattr(module, "hf_quantizer", None) is not None


def memory_of(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; of one that is made of others, as torchao's quantized weights are, theirs."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(memory_of(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def first_names(names: list[str]) -> str:
    """Return a few of many names."""
    return ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")


def find_not_finite(module: torch.nn.Module) -> str | None:
    """Return the name of the first weight or buffer that holds NaN or infinity, of those that are not offloaded elsewhere.

    Quantized weights are passed over, which are integers, or of torchao's kinds of tensor, that call themselves floats.
    """
    for name, tensor in [*unwrapped(module).named_parameters(), *unwrapped(module).named_buffers()]:
        if not tensor.is_floating_point() or tensor.is_meta:
            continue
        try:
            finite = tensor.float().isfinite().all()
        except NotImplementedError:  # of torchao
            continue
        if not finite:
            return name
    return None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' reports and progress bars of loading: what is missing is refused in one line."""
    verbosity, has_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if has_bars:
            transformers_logging.enable_progress_bar()
