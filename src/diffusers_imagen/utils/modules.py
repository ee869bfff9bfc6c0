"""Helpers for modules: compiled, offloaded and quantized networks, weights on disk and not finite, and quiet loading."""

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from diffusers.utils.torch_utils import is_compiled_module
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME as TRANSFORMERS_SAFETENSORS_NAME
from transformers.utils import WEIGHTS_NAME as TRANSFORMERS_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging


# names of weights in safetensors and in torch's format, of modules of diffusers and of transformers
WEIGHT_FILES = (
    (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME),
    (TRANSFORMERS_SAFETENSORS_NAME, TRANSFORMERS_WEIGHTS_NAME),
)


def unwrapped(module: Any) -> Any:
    """Return the module inside a `torch.compile` wrapper; other modules unchanged."""
    return module._orig_mod if is_compiled_module(module) else module


def refuse_adapters(components: dict[str, Any]) -> None:
    """Raise ValueError if components that are to be saved have LoRA adapters, fused or not.

    diffusers would save their layers under other names than those of the component, which could not be loaded again.
    """
    for name, component in components.items():
        adapters = getattr(unwrapped(component), "peft_config", None)
        if adapters:
            raise ValueError(
                f"`{name}` has the LoRA adapters {list(adapters)}, which cannot be saved with it: call `fuse_lora()` and "
                "`unload_lora_weights()` before, to save the merged weights, only `unload_lora_weights()` to save those "
                "without adapters, or `save_lora_adapter` to save an adapter."
            )


def remove_earlier_weights(
    module: torch.nn.Module, folder: str | os.PathLike, variant: str | None, safe_serialization: bool = True
) -> None:
    """
    Delete weights of a variant that the last save of a module to a folder replaced, but that could be loaded instead.

    Safetensors files are loaded before others; an index of shards by diffusers before a single file, by transformers
    after it. Neither library deletes all files of an earlier save in another form.
    """
    names = WEIGHT_FILES[isinstance(module, PreTrainedModel)]
    suffix = "" if variant is None else f".{variant}"
    for name, is_kept in zip(names, (safe_serialization, not safe_serialization)):
        stem, extension = os.path.splitext(name)
        shards = list(Path(folder).glob(f"{stem}{glob.escape(suffix)}-*-of-*{extension}"))
        index = Path(folder, f"{name}.index{suffix}.json")
        single = Path(folder, f"{stem}{suffix}{extension}")
        replaced = [single if shards else index] if is_kept else [*shards, index, single]
        for file in replaced:
            file.unlink(missing_ok=True)


def is_compiled(module: torch.nn.Module) -> bool:
    """Return whether a module or a part of it is compiled, by `torch.compile` or by its own `compile`."""
    parts = module.modules()
    return is_compiled_module(module) or any(getattr(part, "_compiled_call_impl", None) is not None for part in parts)


def is_offloaded(module: torch.nn.Module) -> bool:
    """Return whether weights may be offloaded, with parameters on the meta device."""
    return any(hasattr(part, "_hf_hook") for part in module.modules())


def is_quantized(module: torch.nn.Module) -> bool:
    """Return whether weights are quantized in a library's own format, such as bitsandbytes or torchao."""
    return getattr(module, "hf_quantizer", None) is not None


def memory_of(tensor: torch.Tensor) -> int:
    """Return the memory of a tensor in bytes; for one composed of others, such as torchao's, their sum."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(memory_of(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def first_names(names: list[str]) -> str:
    """List the first few of many names."""
    return ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")


def find_not_finite(module: torch.nn.Module) -> str | None:
    """Return the name of the first weight or buffer with NaN or infinity, among those that are not offloaded.

    Quantized weights are skipped: integers, and torchao's tensor subclasses, which report a floating-point dtype.
    """
    for name, tensor in [*unwrapped(module).named_parameters(), *unwrapped(module).named_buffers()]:
        if not tensor.is_floating_point() or tensor.is_meta:
            continue
        try:
            finite = tensor.float().isfinite().all()
        except NotImplementedError:  # raised by torchao
            continue
        if not finite:
            return name
    return None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Context without transformers' loading reports and progress bars; missing weights raise a one-line error."""
    verbosity, has_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if has_bars:
            transformers_logging.enable_progress_bar()
