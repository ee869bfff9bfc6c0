"""States saved as safetensors: reading cannot execute code, and states that do not match are rejected.

A state consists of dictionaries, lists, numbers, strings and tensors. The tensors are those of the file; the rest is
JSON in its metadata. DeepSpeed reads its own files with pickle, which can execute any code. They are checked before:
files that refer to anything other than a few classes of DeepSpeed are rejected.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from ..utils.arguments import class_of
from .devices import own_part


TREE = "state"  # the key of the metadata
ADAMW = {"step", "exp_avg", "exp_avg_sq"}  # state of torch's AdamW for a parameter
# names in DeepSpeed's files besides those that `torch.load(weights_only=True)` allows
DEEPSPEED_NAMES = {
    "argparse.Namespace",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}


def save_state(path: Path, state: Any) -> None:
    """Write a state.

    Raises:
        OSError or SafetensorError: If it cannot be written, for example to a full disk.
        TypeError: If it has other types than dictionaries, lists, numbers, strings and tensors.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _encode(state, "", tensors)
    save_file(tensors, path, metadata={TREE: json.dumps(tree)})


def load_state(path: Path, name: str | None = None) -> Any:
    """Read a state to the CPU, or one value of a dictionary, without the tensors of others.

    Raises:
        ValueError: If the file was not written by `save_state`.
    """
    try:
        with safe_open(path, "pt") as file:
            tree = json.loads((file.metadata() or {})[TREE])
            tree = tree if name is None else dict(tree[1])[name]
            return _decode(tree, file.get_tensor)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"'{path}' is not a saved state: {type(error).__name__} ({error}).") from error


class SavedStates(Sequence[Any]):
    """States of one name in several files, such as those of all processes, each read when it is asked for."""

    def __init__(self, paths: Sequence[Path], name: str):
        self.paths, self.name = paths, name

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index):
        return load_state(self.paths[index], self.name)


def _encode(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Convert a value to JSON: a list of its type and its parts, or the value itself."""
    if isinstance(value, torch.Tensor):
        name = place if place and place not in tensors else f"{place}#{len(tensors)}"
        tensors[name] = (
            own_part(value).detach().cpu().contiguous().clone()
        )  # files cannot contain views of shared memory
        return ["tensor", name]
    if isinstance(value, dict):
        inner = f"{place}." if place else ""
        return ["dict", [[key, _encode(part, f"{inner}{key}", tensors)] for key, part in value.items()]]
    if isinstance(value, (list, tuple)):
        return ["list", [_encode(part, f"{place}.{i}", tensors) for i, part in enumerate(value)]]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"A state has a value {class_of(value)} at '{place}', which is neither a number nor a tensor.")


def _decode(tree: Any, tensor: Callable[[str], torch.Tensor]) -> Any:
    if not isinstance(tree, list):
        return tree
    kind, parts = tree
    if kind == "tensor":
        return tensor(parts)
    if kind == "dict":
        return {key: _decode(part, tensor) for key, part in parts}
    if kind == "list":
        return [_decode(part, tensor) for part in parts]
    raise ValueError(f"it has a {kind!r}")


def copy_into(own: torch.Tensor, saved: Any, name: str) -> None:
    """Copy the values of a saved tensor into a tensor, which keeps its memory layout.

    Raises:
        ValueError: If the saved value is not a tensor of this shape and type of number.
    """
    shape = tuple(saved.shape) if isinstance(saved, torch.Tensor) else type(saved).__name__
    if shape != tuple(own.shape) or saved.is_floating_point() != own.is_floating_point():
        raise ValueError(f"{name} has shape {shape}, but should have {tuple(own.shape)}")
    with torch.no_grad():
        own.copy_(saved)


class NetworkState:
    """State of the weights and buffers of a network, or some of them; of sharded ones, of this process's part.

    Args:
        module (`torch.nn.Module`): The network, without wrappers.
        names (`list[str]`, *optional*): Only these parameters.
    """

    def __init__(self, module: torch.nn.Module, names: list[str] | None = None):
        self.module, self.names = module, names

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors by name, without copies."""
        state = self.module.state_dict()
        names = state if self.names is None else self.names
        return {name: own_part(state[name]) for name in names}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.tensors()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        own = self.tensors()
        if own.keys() != state.keys():
            missing, more = sorted(own.keys() - state.keys()), sorted(map(str, state.keys() - own.keys()))
            raise ValueError(f"the network lacks {more[:3]} and the state {missing[:3]}")
        for name, tensor in own.items():
            copy_into(tensor, state[name], name)


class OptimizerState:
    """State of an optimizer's moments, and of the gradient scaler in fp16. Rates, betas and decay are not included:
    they are those of the run's configuration.

    Args:
        optimizer (`AcceleratedOptimizer`): The optimizer.
        scaler (`torch.amp.GradScaler`, *optional*): Scaler for fp16.
    """

    def __init__(self, optimizer: AcceleratedOptimizer, scaler: Any | None = None):
        self.optimizer = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        self.scaler = scaler

    def state_dict(self) -> dict[str, Any]:
        scaler = None if self.scaler is None else self.scaler.state_dict()
        return {"moments": self.optimizer.state_dict()["state"], "scaler": scaler}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        moments = {}
        for place, values in state["moments"].items():
            if not 0 <= place < len(parameters):
                raise ValueError(f"it has moments of a parameter {place}, but there are {len(parameters)}")
            if values and isinstance(self.optimizer, torch.optim.AdamW) and set(values) != ADAMW:
                raise ValueError(f"parameter {place} has {sorted(map(str, values))}, but should have {sorted(ADAMW)}")
            moments[place] = {name: like(parameters[place], name, value) for name, value in values.items()}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])


def like(parameter: torch.nn.Parameter, name: str, value: torch.Tensor | float) -> torch.Tensor | float:
    """Return a moment in the memory layout of its parameter, and sharded like it: fused optimizers iterate over the
    memory of both in parallel.

    Raises:
        ValueError: If the shapes differ. Step numbers and tables of 8-bit states have other shapes.
    """
    if not isinstance(value, torch.Tensor):
        if name in ADAMW and not (name == "step" and isinstance(value, (int, float))):
            raise ValueError(f"{name} is {class_of(value)}, but should be a tensor")
        return value
    own = own_part(parameter)
    if name in ("exp_avg", "exp_avg_sq"):
        moment = torch.empty_like(own, dtype=value.dtype, device="cpu", requires_grad=False)
        copy_into(moment, value, name)
        value = moment
    elif name == "step" and value.numel() != 1:
        raise ValueError(f"step has shape {tuple(value.shape)}, but should be one number")
    if not isinstance(parameter, DTensor) or value.shape != own.shape or name == "step":
        return value
    mesh, shape, stride = parameter.device_mesh, parameter.shape, parameter.stride()
    return DTensor.from_local(value.to(own.device), mesh, parameter.placements, shape=shape, stride=stride)


def check_deepspeed_files(folder: Path) -> None:
    """Check that files of DeepSpeed cannot execute code.

    Raises:
        ValueError: If a file could.
    """
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name == "latest":
            continue
        if path.suffix != ".pt":
            raise ValueError(f"{path.name} is not a file of DeepSpeed")
        try:
            unknown = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - DEEPSPEED_NAMES
        except Exception as error:  # damaged files raise errors of any type
            raise ValueError(f"{path.name} cannot be checked ({type(error).__name__})") from error
        if unknown:
            raise ValueError(f"{path.name} refers to {sorted(unknown)[0]}, which could execute code")
