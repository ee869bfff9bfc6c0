"""Writing and reading of safetensors files tensor by tensor, with at most one tensor in memory."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch


NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
MAX_HEADER = 100_000_000  # limit of the format

Kind = tuple[torch.dtype, tuple[int, ...]]


def write_tensors(path: Path, kinds: Mapping[str, Kind], tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
    """Write a safetensors file.

    Args:
        path (`Path`): The file.
        kinds (`Mapping`): Dtype and shape of every tensor by name, in file order.
        tensors (`Iterable`): Names and tensors, in any order.

    Returns:
        The size of the file in bytes.

    Raises:
        ValueError: If a tensor is missing, duplicate, or of another dtype or shape.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, end = dict[str, int](), 0
    for name, (dtype, shape) in kinds.items():
        places[name], size = end, math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(begin + end)
        for name, tensor in tensors:
            if (tensor.dtype, tuple(tensor.shape)) != kinds[name]:
                raise ValueError(f"`{name}` is {tensor.dtype} {tuple(tensor.shape)}, but should be {kinds[name]}.")
            file.seek(begin + places.pop(name))
            file.write(bytes_of(tensor))
    if places:
        raise ValueError(f"{len(places)} tensors are missing, such as {next(iter(places))}.")
    return begin + end


def read_kinds(path: Path) -> dict[str, tuple[Kind, int]]:
    """Return dtype, shape and file offset of every tensor of a safetensors file.

    Raises:
        ValueError: If it is not a safetensors file, or has other than floating-point numbers; names the file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(MAX_HEADER, size - 8):
            raise ValueError(f"'{path}' is not a safetensors file, or cut.")
        try:
            header = json.loads(file.read(length))
            found = {name: entry for name, entry in header.items() if name != "__metadata__"}
            kinds = {
                name: ((DTYPES[entry["dtype"]], tuple(entry["shape"])), 8 + length + entry["data_offsets"][0])
                for name, entry in found.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise ValueError(f"'{path}' is not a safetensors file of floating-point numbers: {error}") from error
    for name, ((dtype, shape), start) in kinds.items():
        if any(type(part) is not int or part < 0 for part in (start, *shape)):
            raise ValueError(f"'{path}' has {name!r} with an invalid shape.")
        if start + math.prod(shape) * dtype.itemsize > size:
            raise ValueError(f"'{path}' is cut: {name!r} is beyond its end.")
    return kinds


def read_tensors(path: Path, kinds: Mapping[str, tuple[Kind, int]], names: Iterable[str]) -> Iterator[torch.Tensor]:
    """Yield copies of these tensors of a safetensors file; `kinds` is the result of `read_kinds`."""
    with open(path, "rb") as file:
        for name in names:
            (dtype, shape), start = kinds[name]
            data = bytearray(math.prod(shape) * dtype.itemsize)
            file.seek(start)
            file.readinto(data)
            yield torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the contiguous bytes of a tensor."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data
