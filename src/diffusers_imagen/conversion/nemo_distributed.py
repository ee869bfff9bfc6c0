"""Reading of distributed checkpoints of Megatron Core and torch, folders of many files, without executing code.

Two formats are supported: `torch_dist`, of `torch.distributed.checkpoint`, where a pickle `.metadata` locates the
parts of each tensor in the files `*.distcp`; and `zarr`, with one folder per tensor.
"""

import io
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch

from ..utils.arguments import shown
from ..utils.files import read_json_object
from .inert_pickle import Call, Global, PickleMachine
from .nemo_weights import Described, refusing_fault


METADATA, DESCRIPTION, ARRAY = ".metadata", "metadata.json", ".zarray"
MAX_METADATA = 2**26  # bytes; a thousand tensors on a hundred GPUs need ten million
MAX_DIMENSIONS = 8
MAX_CHUNKS = 2**20
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    **{name: getattr(torch, name) for name in ("uint8", "int8", "int16", "int32", "int64", "bool")},
}
ZARR_DTYPES = {"<f2": torch.float16, "<f4": torch.float32, "<f8": torch.float64, "bfloat16": torch.bfloat16}
CHECKPOINT = "torch.distributed.checkpoint"
NAMES = {
    **{
        (f"{CHECKPOINT}.metadata", name): name
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    },
    (f"{CHECKPOINT}.filesystem", "_StorageInfo"): "_StorageInfo",
    ("torch", "Size"): "Size",
    ("torch", "strided"): "layout",
    ("torch.serialization", "_get_layout"): "layout",
    ("collections", "OrderedDict"): "OrderedDict",
    **{(module, "PosixPath"): "path" for module in ("pathlib", "pathlib._local")},
    **{("torch", name): name for name in DTYPES},
}


class Chunk(NamedTuple):
    """Part of a tensor, and its location."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    start: int  # offset in the file, in bytes
    length: int


class MetadataMachine(PickleMachine):
    """Interpreter of a distributed checkpoint's `.metadata`: classes become `Call`s with their state."""

    kinds = NAMES
    max_opcodes = 2**23
    key_types = (str, Call)

    def _call(self, kind: str, args: tuple) -> Any:
        if kind == "OrderedDict" and not args:
            return {}
        if kind in DTYPES:
            raise ValueError(f"it calls {kind}")
        return Call(kind, args)

    def _do_newobj(self, _) -> None:
        self._do_reduce(_)

    def _do_build(self, _) -> None:
        target, state = self._pop(2)
        if type(target) is not Call or target.state is not None or type(state) not in (dict, tuple):
            raise ValueError("it sets the state of a value that has none")
        target.state = state if type(state) is tuple else (state,)
        self._push(target)


class TorchDistWeights:
    """Tensors of a folder of `torch.distributed.checkpoint`.

    Args:
        folder (`Path`): The folder, with a `.metadata` and the files that it names.
        what (`str`): Description of the folder, for messages.

    Raises:
        ValueError: If a file is missing, damaged, or would execute code, or a tensor is incomplete.
    """

    def __init__(self, folder: Path, what: str):
        self.what = what
        self.tensors: dict[str, Described] = {}
        self.chunks: dict[str, list[Chunk]] = {}
        self.dropped: list[str] = []  # entries that are not tensors
        path = folder / METADATA
        if path.stat().st_size > MAX_METADATA:
            raise ValueError(f"{what} has a {METADATA} that has more than {MAX_METADATA} bytes.")
        try:
            content = MetadataMachine(io.BytesIO(path.read_bytes())).run()
            self.take(folder, content)
        except Exception as error:  # damaged pickles raise errors of any type
            reason = error or type(error).__name__
            raise ValueError(f"{what} has a {METADATA} that cannot be read safely: {reason}") from error

    def take(self, folder: Path, content: Any) -> None:
        """Record the tensors and the locations of their parts."""
        fields = fields_of(content, "Metadata")
        places = {}
        for index, info in checked_dict(fields.get("storage_data")).items():
            at = fields_of(index, "MetadataIndex")
            offset = at.get("offset")
            places[at.get("fqn"), () if offset is None else sizes_of(offset)] = fields_of(info, "_StorageInfo")
        for key, value in checked_dict(fields.get("state_dict_metadata")).items():
            if type(key) is not str:
                raise ValueError("it has an entry whose name is not text")
            if type(value) is Call and value.kind == "BytesStorageMetadata":
                self.dropped.append(key)
                continue
            described, parts = describe(value)
            whole = math.prod(described.shape)
            if sum(math.prod(sizes) for _, sizes in parts) != whole or overlap(parts):
                raise ValueError(f"the parts of {shown(key)} do not cover {described.shape}")
            self.tensors[key] = described
            self.chunks[key] = [place_of(folder, places, key, *part) for part in parts]

    def read(self, keys: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield these tensors, each assembled from its parts."""
        for key in keys:
            parts = ((chunk, self.read_part(key, chunk)) for chunk in self.chunks[key])
            yield key, assembled(self.tensors[key], parts)

    def read_part(self, key: str, chunk: Chunk) -> torch.Tensor:
        """Read a part, which is a file of `torch.save` embedded in a file."""
        with open(chunk.path, "rb") as file:
            file.seek(chunk.start)
            data = file.read(chunk.length)
        what = f"{self.what} has a part of {shown(key)} in '{chunk.path.name}' that"
        with refusing_fault(what):
            part = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        described = self.tensors[key]
        if not isinstance(part, torch.Tensor) or tuple(part.shape) != chunk.sizes or part.dtype != described.dtype:
            raise ValueError(f"{what} is no tensor {chunk.sizes} of {described.dtype}.")
        return part


class ZarrWeights:
    """Tensors of a folder in Megatron Core's format `zarr`: uncompressed arrays, one folder each.

    Raises:
        ValueError: If an array is compressed, damaged or incomplete.
    """

    def __init__(self, folder: Path, what: str):
        self.folder, self.what = folder, what
        self.tensors: dict[str, Described] = {}
        self.grids: dict[str, tuple[int, ...]] = {}
        self.dropped = []
        for path in sorted(folder.glob(f"*/{ARRAY}")):
            key, settings = path.parent.name, read_json_object(path)
            dtype = settings.get("dtype")
            shape, chunks = (settings.get(name) or [] for name in ("shape", "chunks"))
            plain = (
                not settings.get("compressor") and not settings.get("filters") and settings.get("order", "C") == "C"
            )
            lists = isinstance(shape, list) and isinstance(chunks, list) and len(shape) == len(chunks)
            if not plain or not lists or settings.get("zarr_format") != 2:
                raise ValueError(
                    f"{what} has {shown(key)} as a compressed or unknown kind of array, which is not read: write the "
                    "checkpoint as a plain state dict with NeMo."
                )
            sizes = [*shape, *chunks]
            if any(type(size) is not int or not 1 <= size < 2**40 for size in sizes) or len(shape) > MAX_DIMENSIONS:
                raise ValueError(f"{what} has {shown(key)} with an invalid shape.")
            if not isinstance(dtype, str) or dtype not in ZARR_DTYPES:
                self.dropped.append(key)
                continue
            self.tensors[key] = Described(tuple(shape), ZARR_DTYPES[dtype])
            self.grids[key] = tuple(chunks)

    def read(self, keys: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield these tensors, each assembled from its chunks."""
        for key in keys:
            yield key, assembled(self.tensors[key], self.read_chunks(key))

    def read_chunks(self, key: str) -> Iterator[tuple[Chunk, torch.Tensor]]:
        """Yield the chunks of an array; those at the end of a dimension may extend beyond it."""
        described, grid = self.tensors[key], self.grids[key]
        counts = [-(-size // step) for size, step in zip(described.shape, grid)]
        if math.prod(counts) > MAX_CHUNKS:
            raise ValueError(f"{self.what} has {shown(key)} in more than {MAX_CHUNKS} chunks.")
        length = math.prod(grid) * described.dtype.itemsize
        for number in range(math.prod(counts)):
            place: list[int] = []
            for count in reversed(counts):
                number, position = divmod(number, count)
                place.insert(0, position)
            path = self.folder / key / (".".join(map(str, place)) or "0")
            if not path.is_file() or path.stat().st_size != length:
                raise ValueError(f"{self.what} lacks the chunk '{path.name}' of {shown(key)}, of {length} bytes.")
            offsets = tuple(at * step for at, step in zip(place, grid))
            sizes = tuple(min(step, size - at) for step, size, at in zip(grid, described.shape, offsets))
            part = torch.frombuffer(bytearray(path.read_bytes()), dtype=described.dtype).view(grid)
            yield Chunk(offsets, sizes, path, 0, length), part[tuple(slice(size) for size in sizes)]


def open_distributed(folder: Path, what: str) -> TorchDistWeights | ZarrWeights:
    """Open the weights of a distributed checkpoint in either format.

    Raises:
        ValueError: If the format is not supported.
    """
    if (folder / METADATA).is_file():
        return TorchDistWeights(folder, what)
    if next(folder.glob(f"*/{ARRAY}"), None) is not None:
        return ZarrWeights(folder, what)
    backend = read_json_object(folder / DESCRIPTION).get("sharded_backend") if is_distributed(folder) else None
    raise ValueError(
        f"{what} has weights in the format {shown(backend)}, but should have torch_dist or zarr. Write it as a plain "
        "state dict with NeMo."
    )


def is_distributed(folder: Path) -> bool:
    """Return whether a folder looks like a distributed checkpoint."""
    return any((folder / name).is_file() for name in (METADATA, DESCRIPTION)) or bool(
        next(folder.glob(f"*/{ARRAY}"), None)
    )


def assembled(described: Described, parts: Iterator[tuple[Chunk, torch.Tensor]]) -> torch.Tensor:
    """Assemble a tensor from its parts; a part that covers the whole tensor is returned unchanged."""
    whole: torch.Tensor | None = None
    for chunk, part in parts:
        if chunk.sizes == described.shape:
            return part
        if whole is None:
            whole = torch.empty(described.shape, dtype=described.dtype)
        whole[tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes))] = part
    return torch.empty(described.shape, dtype=described.dtype) if whole is None else whole


def fields_of(value: Any, kind: str) -> dict[str, Any]:
    """Return the fields of an object of the given kind."""
    if type(value) is not Call or value.kind != kind or value.state is None or type(value.state[0]) is not dict:
        raise ValueError(f"it should have a {kind}")
    return value.state[0]


def checked_dict(value: Any) -> Mapping[Any, Any]:
    """Return the mapping of tensors or of their locations; raise ValueError unless it is one."""
    if type(value) is not dict:
        raise ValueError("it lacks a table of its tensors")
    return value


def sizes_of(value: Any) -> tuple[int, ...]:
    """Return sizes or offsets."""
    if type(value) is Call and value.kind == "Size" and len(value.args) == 1:
        value = value.args[0]
    if type(value) not in (tuple, list) or len(value) > MAX_DIMENSIONS:
        raise ValueError("it has an invalid shape")
    if any(type(size) is not int or not 0 <= size < 2**40 for size in value):
        raise ValueError("it has an invalid shape")
    return tuple(value)


def describe(value: Any) -> tuple[Described, list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """Return the description of a tensor, and offsets and sizes of its parts."""
    fields = fields_of(value, "TensorStorageMetadata")
    properties = fields.get("properties")
    state = properties.state if type(properties) is Call and properties.kind == "TensorProperties" else None
    dtype = state[0].get("dtype") if state and type(state[0]) is dict else state[0] if state else None
    if type(dtype) is not Global or dtype.kind not in DTYPES:
        raise ValueError("it has a tensor of an unknown dtype")
    shape, chunks = sizes_of(fields.get("size")), fields.get("chunks")
    if type(chunks) is not list or not 1 <= len(chunks) <= MAX_CHUNKS:
        raise ValueError("it has a tensor without parts")
    parts = []
    for chunk in chunks:
        part = fields_of(chunk, "ChunkStorageMetadata")
        offsets, sizes = sizes_of(part.get("offsets")), sizes_of(part.get("sizes"))
        if not len(offsets) == len(sizes) == len(shape):
            raise ValueError("it has a part with a different number of dimensions than its tensor")
        if any(at + size > whole for at, size, whole in zip(offsets, sizes, shape)):
            raise ValueError("it has a part that extends beyond its tensor")
        parts.append((offsets, sizes))
    return Described(shape, DTYPES[dtype.kind]), parts


def overlap(parts: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Return whether two parts overlap; for too many parts to compare pairwise, whether two have the same start."""
    if len(parts) > 256:
        return len({offsets for offsets, _ in parts}) < len(parts)
    return any(
        all(a < b + width and b < a + size for a, size, b, width in zip(*first, *second))
        for number, first in enumerate(parts)
        for second in parts[number + 1 :]
    )


def place_of(folder: Path, places: dict, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Chunk:
    """Return the location of a part; raise ValueError unless it is within a file of the folder."""
    info = places.get((key, offsets))
    if info is None:
        raise ValueError(f"it has no location for {shown(key)} is")
    name, start, length = (info.get(field) for field in ("relative_path", "offset", "length"))
    if info.get("transform_descriptors"):
        raise ValueError(f"{shown(key)} is compressed or encrypted")
    if type(name) is not str or not re.fullmatch(r"[\w.-]+", name) or PurePosixPath(name).name != name:
        raise ValueError(f"it has {shown(name)} for a file of the folder")
    path = folder / name
    if type(start) is not int or type(length) is not int or start < 0 or length < 0:
        raise ValueError(f"it has an invalid location for {shown(key)}")
    if path.is_symlink() or not path.is_file() or path.stat().st_size < start + length:
        raise ValueError(f"the file '{name}' is missing or cut")
    return Chunk(offsets, sizes, path, start, length)
