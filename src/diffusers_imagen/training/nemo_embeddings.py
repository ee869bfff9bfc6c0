"""Text states that NeMo's users pickled beforehand, read without running what a pickle may hold.

NeMo's Imagen kept them in the tar shards of its WebDatasets: beside each image a pickled dictionary, by encoder name
(such as `t5_text`) a dictionary whose `encodings` are the states of the caption's tokens, `(tokens, E)`.
"""

import codecs
import collections
import io
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch


PICKLES = (".pickle", ".pkl")
ARRAY_PARTS = {
    (f"numpy.{core}.{module}", name)
    for core in ("core", "_core")
    for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
}


def _load_torch(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


def _array_part(module: str, name: str) -> Any:
    core = getattr(np, "_core", None) or np.core  # numpy 2, numpy 1; pickles of one are read with the other
    return getattr(getattr(core, module.rsplit(".", 1)[1]), name)


# what arrays and tensors are made of, and nothing that could do more than make them
ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    # torch's own would unpickle without restrictions
    ("torch.storage", "_load_from_bytes"): _load_torch,
}


class TensorUnpickler(pickle.Unpickler):
    """Unpickles dictionaries, lists, numbers, text, arrays and tensors; anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if (module, name) in ARRAY_PARTS:
            return _array_part(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")


def unpickle_states(data: bytes, name: str = "the pickle") -> dict[str, torch.Tensor]:
    """Text states `(tokens, E)` by encoder name.

    Args:
        data (`bytes`): A pickled dictionary of NeMo.
        name (`str`): Its name in errors.

    Raises:
        ValueError: If it holds anything but states, or asks for code.
    """
    try:
        if data[:4] == b"PK\x03\x04":  # torch.save's format
            content = _load_torch(data)
        else:
            content = TensorUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # damaged pickles raise whatever they stumble over
        raise ValueError(f"{name} cannot be read safely: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} holds {type(content).__name__}, but should hold a dictionary by encoder name.")
    states = {}
    for key, value in content.items():
        value = value["encodings"] if isinstance(value, dict) and "encodings" in value else value
        if not isinstance(value, (np.ndarray, torch.Tensor)) or value.ndim != 2:
            raise ValueError(f"{name} has no states (tokens, width) at {key!r}.")
        if isinstance(value, np.ndarray) and value.dtype.kind != "f":
            raise ValueError(f"{name} has {value.dtype} at {key!r}, but states are floating-point numbers.")
        states[key] = torch.as_tensor(value)
    return states


def read_tar(path: str | Path, key: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Captions and states of a WebDataset shard: members of the same stem, `.txt` and `.pickle` or `.pkl`.

    Args:
        path (`str` or `Path`): The tar file.
        key (`str`): The encoder's name.

    Raises:
        ValueError: If a pickle has no caption beside it, or no states of that encoder.
    """
    with tarfile.open(path) as tar:
        waiting: dict[str, dict[str, bytes]] = {}
        for member in tar:
            stem, suffix = Path(member.name).with_suffix("").as_posix(), Path(member.name).suffix.lower()
            if not member.isfile() or suffix not in (".txt", *PICKLES):
                continue
            parts = waiting.setdefault(stem, {})
            parts["text" if suffix == ".txt" else "pickle"] = tar.extractfile(member).read()
            if len(parts) < 2:
                continue
            del waiting[stem]
            states = unpickle_states(parts["pickle"], f"{path}:{stem}")
            if key not in states:
                raise ValueError(f"{path}:{stem} has states of {sorted(states)}, but not of {key!r}.")
            yield parts["text"].decode(), states[key]
    alone = [stem for stem, parts in waiting.items() if "pickle" in parts]
    if alone:
        raise ValueError(f"{path}: {len(alone)} pickles have no caption (.txt) beside them, such as {alone[0]!r}.")
