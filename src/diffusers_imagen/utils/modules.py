"""Networks as they are held: compiled, offloaded, with weights that are not finite."""

from typing import Any

import torch
from diffusers.utils.torch_utils import is_compiled_module


def unwrapped(module: Any) -> Any:
    """The network that `torch.compile` wrapped; anything else as it is."""
    return module._orig_mod if is_compiled_module(module) else module


def is_offloaded(module: torch.nn.Module) -> bool:
    """Whether weights may be elsewhere, with the meta device in their place."""
    return any(hasattr(part, "_hf_hook") for part in module.modules())


def first_names(names: list[str]) -> str:
    """A few of many names."""
    return ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")
