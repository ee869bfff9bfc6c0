"""Reading of precomputed text embeddings of NeMo's Imagen from pickles, without executing code.

NeMo's Imagen stores them in the tar shards of its WebDatasets: next to each image a pickled dictionary that maps an
encoder name (such as `t5_text`) to a dictionary whose `encodings` are the caption's text embeddings, `(tokens, E)`.
"""

import io
import math
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..text.source import MAX_CAPTION
from ..utils.arguments import shown
from .inert_pickle import Call, PickleMachine
from .safe_tar import read_members


SUFFIXES = {".txt": "caption", ".pickle": "pickle", ".pkl": "pickle"}
PICKLE_BYTES = 64 * 2**20  # 512 tokens of T5-XXL in float32 are 8 MiB
MAX_ENCODERS = 16
ZIP, ZIP_ENTRY = b"PK\x03\x04", b"PK\x01\x02"  # first bytes of torch.save's files, and of each entry of their list
MAX_ZIP_ENTRIES = 10_000
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # content of the first pickle in torch.save's older format
LEGACY_PROTOCOL = 1001
DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
NUMPY_KINDS = {"f": "float", "i": "int", "u": "uint", "c": "complex", "b": "bool"}


class Storage(NamedTuple):
    """Contiguous numbers, as uninterpreted bytes."""

    dtype: str
    data: bytes
    big_endian: bool = False


class Content(NamedTuple):
    """Content of a file: plain values and calls, and its storages by persistent id."""

    value: Any
    read_storage: Callable[[Any], Storage]


class WrongType(ValueError):
    """Raised for arrays of integers, objects or other types than floating point."""


def unpickle_embeddings(data: bytes, name: str = "the pickle") -> dict[str, torch.Tensor]:
    """Read text embeddings `(tokens, E)` by encoder name, in their original floating-point dtype.

    No function in the file is called: arrays and tensors are created here from their bytes, after type, shape and
    number of bytes have been checked.

    Args:
        data (`bytes`): A pickled dictionary of NeMo, by `pickle` or `torch.save`; up to 64 MiB.
        name (`str`): Its name in errors.

    Raises:
        ValueError: If it has any content other than embeddings, or would execute code.
    """
    if len(data) > PICKLE_BYTES:
        raise ValueError(f"{name} cannot be read safely: it has {len(data)} bytes, more than {PICKLE_BYTES}")
    try:
        content = read_content(data)
    except Exception as error:  # damaged pickles raise errors of any type
        raise ValueError(f"{name} cannot be read safely: {error or type(error).__name__}") from error
    if type(content.value) is not dict:
        kind = content.value.kind if isinstance(content.value, Call) else type(content.value).__name__
        raise ValueError(f"{name} holds {kind}, but should hold a dictionary by encoder name.")
    if len(content.value) > MAX_ENCODERS:
        raise ValueError(f"{name} has {len(content.value)} encoders, more than {MAX_ENCODERS}.")
    embeds, total = {}, 0
    for key, value in content.value.items():
        value = value["encodings"] if type(value) is dict and "encodings" in value else value
        if not isinstance(value, Call) or value.kind not in BUILDERS:
            raise ValueError(f"{name} has no embeddings (tokens, width) at {shown(key)}.")
        try:
            embeds[key] = BUILDERS[value.kind](value, content)
        except WrongType as error:
            raise ValueError(
                f"{name} has {error} at {shown(key)}, but embeddings are floating-point numbers."
            ) from None
        except Exception as error:
            reason = error or type(error).__name__
            raise ValueError(f"{name} cannot be read safely: at {shown(key)}, {reason}") from error
        if embeds[key].ndim != 2:
            raise ValueError(f"{name} has no embeddings (tokens, width) at {shown(key)}.")
        total += embeds[key].nbytes
        if total > 4 * PICKLE_BYTES:  # one array under many names
            raise ValueError(f"{name} cannot be read safely: its embeddings need more than {4 * PICKLE_BYTES} bytes")
    return embeds


def read_content(data: bytes) -> Content:
    """Parse a file of `pickle`, or of `torch.save` in its zip or older format."""
    if data.startswith(ZIP):
        return read_zip(data)
    file = io.BytesIO(data)
    value = PickleMachine(file, nested=read_nested).run()
    if type(value) is int and value == LEGACY_MAGIC:
        return read_legacy(file)
    return Content(value, no_storage)


def read_nested(data: bytes) -> Storage:
    """Read a storage as `pickle` writes it: a file of `torch.save` that contains only the storage."""
    file = io.BytesIO(data)
    if not data.startswith(ZIP) and PickleMachine(file).run() != LEGACY_MAGIC:
        raise ValueError("it has a nested file that is not torch's")
    content = read_zip(data) if data.startswith(ZIP) else read_legacy(file)
    if type(content.value) is not Call or content.value.kind != "storage":
        raise ValueError("it has a nested file that is not a storage")
    return content.read_storage(content.value)


def no_storage(_) -> Storage:
    """Raise ValueError for a persistent id in a file that has no storages."""
    raise ValueError("it has a tensor without numbers")


def note_storage(pid: Any) -> Call:
    """Record a persistent id: ("storage", type, key, location, count, and in the older format None)."""
    if type(pid) is not tuple or pid[:1] != ("storage",) or pid[5:] not in ((), (None,)) or len(pid) < 5:
        raise ValueError("it has a persistent id that is not a storage")
    _, kind, key, _, count = pid[:5]
    if type(key) is not str or type(count) is not int or count < 0:
        raise ValueError("it has a storage without a name or a size")
    return Call("storage", (getattr(kind, "kind", "objects"), key, count))


def read_legacy(file: io.BytesIO) -> Content:
    """Read the rest of torch.save's older format: two pickles, the content, the keys of the storages, and their data."""
    protocol = PickleMachine(file).run()
    if protocol != LEGACY_PROTOCOL:
        raise ValueError("it has an unknown format of torch")
    PickleMachine(file).run()  # about the machine; numbers are always little-endian
    storages: dict[str, Call] = {}

    def persistent(pid: Any) -> Call:
        storage = note_storage(pid)
        return storages.setdefault(storage.args[1], storage)

    value = PickleMachine(file, persistent).run()
    numbers = {}
    keys = PickleMachine(file).run()
    if type(keys) is not list or any(type(key) is not str or key not in storages for key in keys):
        raise ValueError("it lists storages that no tensor uses")
    for key in keys:
        kind, _, count = storages[key].args
        if key in numbers or int.from_bytes(file.read(8), "little", signed=True) != count:
            raise ValueError("it has a storage whose size differs from its declared size")
        size = itemsize(kind)
        numbers[key] = file.read(count * size)
        if len(numbers[key]) != count * size:
            raise ValueError("it ends within a storage")
    if len(numbers) < len(storages):
        raise ValueError("it lacks a storage")
    return Content(value, lambda call: Storage(call.args[0], numbers[call.args[1]]))


def read_zip(data: bytes) -> Content:
    """Read torch.save's zip format: a pickle, and one uncompressed entry per storage."""
    if data.count(ZIP_ENTRY) > MAX_ZIP_ENTRIES:
        raise ValueError(f"it has more than {MAX_ZIP_ENTRIES} entries")
    archive = zipfile.ZipFile(io.BytesIO(data))
    entries = {entry.filename: entry for entry in archive.infolist()}

    def read(name: str) -> bytes:
        if name not in entries:
            raise ValueError(f"it lacks its entry {shown(name)}")
        entry = entries[name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > len(data):
            raise ValueError(f"its entry {shown(name)} is compressed")
        return archive.read(entry)

    folders = [name.partition("/")[0] for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(folders) != 1:
        raise ValueError("it is a zip file, but not from torch.save")
    (folder,) = folders
    big_endian = f"{folder}/byteorder" in entries and read(f"{folder}/byteorder") == b"big"

    def read_storage(call: Call) -> Storage:
        kind, key, count = call.args
        numbers = read(f"{folder}/data/{key}")
        if len(numbers) != count * itemsize(kind):
            raise ValueError("it has a storage whose size differs from its declared size")
        return Storage(kind, numbers, big_endian)

    return Content(PickleMachine(io.BytesIO(read(f"{folder}/data.pkl")), note_storage).run(), read_storage)


def itemsize(dtype: str) -> int:
    """Return the size in bytes of a number of a storage's dtype."""
    bits = re.fullmatch(r"\D+(\d+)", dtype)
    if bits is None and dtype != "bool":
        raise ValueError(f"it has a storage of {dtype}")
    return int(bits[1]) // 8 if bits else 1


def build_tensor(call: Call, content: Content) -> torch.Tensor:
    """Build a torch tensor from storage, offset, shape and strides."""
    if len(call.args) < 4:
        raise ValueError("it has a tensor without a shape")
    storage, offset, size, stride = call.args[:4]
    if type(storage) is Call and storage.kind == "storage":
        storage = content.read_storage(storage)
    if type(storage) is not Storage:
        raise ValueError("it has a tensor without numbers")
    numbers = as_numbers(storage)
    size, stride = check_sizes(size), check_sizes(stride)
    (offset,) = check_sizes((offset,))
    if len(stride) != len(size):
        raise ValueError("it has a tensor with different numbers of strides and sizes")
    count, last = math.prod(size), offset + sum((length - 1) * step for length, step in zip(size, stride))
    if count > len(numbers) or (count and last >= len(numbers)):
        raise ValueError("it has a tensor with more numbers than its storage")
    if not count:
        return torch.zeros(size, dtype=numbers.dtype)
    return numbers.as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)


def build_parameter(call: Call, content: Content) -> torch.Tensor:
    """Build a torch parameter, recorded as a tensor and whether it requires gradients."""
    tensor = call.args[0] if call.args else None
    if type(tensor) is not Call or tensor.kind != "tensor":
        raise ValueError("it has a parameter that is not a tensor")
    return build_tensor(tensor, content)


def build_array(call: Call, content: Content) -> torch.Tensor:
    """Build a NumPy array from the arguments of `ndarray.__setstate__`."""
    if call.state is None or len(call.state) != 5:
        raise ValueError("it has an array without a state")
    _, shape, dtype, columns_first, data = call.state
    return of_array(data, dtype, shape, columns_first)


def build_buffer_array(call: Call, content: Content) -> torch.Tensor:
    """Build a NumPy array from protocol 5: `_frombuffer(data, dtype, shape, order)`."""
    if len(call.args) < 4:
        raise ValueError("it has an array without a shape")
    data, dtype, shape, order = call.args[:4]
    if order not in ("C", "F"):
        raise ValueError("it has an array of unknown order")
    return of_array(data, dtype, shape, order == "F")


BUILDERS = {
    "array": build_array,
    "buffer_array": build_buffer_array,
    "tensor": build_tensor,
    "parameter": build_parameter,
}


def of_array(data: Any, dtype: Any, shape: Any, columns_first: Any) -> torch.Tensor:
    """Convert the data of an array to a tensor, in C or Fortran order."""
    name, big_endian = read_dtype(dtype)
    shape = check_sizes(shape)
    if type(data) not in (bytes, bytearray):
        raise ValueError("it has an array without bytes")
    numbers = as_numbers(Storage(name, bytes(data), big_endian))
    if math.prod(shape) != len(numbers):
        raise ValueError(f"it has an array {shape} of {len(numbers)} numbers")
    if columns_first:
        return numbers.reshape(shape[::-1]).permute(*reversed(range(len(shape)))).contiguous()
    return numbers.reshape(shape)


def read_dtype(dtype: Any) -> tuple[str, bool]:
    """Return the name of a NumPy dtype, and whether it is big-endian."""
    if type(dtype) is not Call or dtype.kind != "dtype":
        raise ValueError("it has an array without a type")
    code = re.fullmatch(r"[<>=|]?(.)(\d+)", dtype.args[0])
    if code is None or code[1] not in NUMPY_KINDS:
        raise WrongType("text")
    name = "bool" if code[1] == "b" else f"{NUMPY_KINDS[code[1]]}{8 * int(code[2])}"
    order = dtype.state[1] if dtype.state is not None and len(dtype.state) > 1 else "<"
    if order not in ("<", ">", "=", "|"):
        raise ValueError("it has an array of unknown byte order")
    return name, order == ">"


def check_sizes(sizes: Any) -> tuple[int, ...]:
    """Check and return up to three sizes, strides or offsets."""
    if type(sizes) is Call and sizes.kind == "Size" and len(sizes.args) == 1:
        (sizes,) = sizes.args
    if type(sizes) is not tuple or len(sizes) > 3:
        raise ValueError("it has an array of more than three dimensions")
    if any(type(size) is not int or not 0 <= size <= PICKLE_BYTES for size in sizes):
        raise ValueError("it has an array with invalid sizes")
    return sizes


def as_numbers(storage: Storage) -> torch.Tensor:
    """Return the numbers of a storage `(N,)`, copied, in native byte order."""
    if storage.dtype not in DTYPES:
        raise WrongType(storage.dtype)
    size = DTYPES[storage.dtype].itemsize
    if len(storage.data) % size:
        raise ValueError("it has an array whose size is not a multiple of its item size")
    words = np.frombuffer(storage.data, f"{'>' if storage.big_endian else '<'}i{size}").astype(f"=i{size}")
    return torch.from_numpy(words).view(DTYPES[storage.dtype])


def read_tar(path: str | Path, key: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield captions and embeddings of a WebDataset shard: members with the same stem, `.txt` and `.pickle` or `.pkl`.

    Args:
        path (`str` or `Path`): The tar file.
        key (`str`): The encoder's name.

    Raises:
        ValueError: If the file is damaged or truncated, a pickle has no caption, or no embeddings of that encoder.
    """
    waiting: dict[str, dict[str, bytes]] = {}
    for name, data in read_members(path, {".txt": MAX_CAPTION, ".pickle": PICKLE_BYTES, ".pkl": PICKLE_BYTES}):
        stem, suffix = name.with_suffix("").as_posix(), name.suffix.lower()
        parts = waiting.setdefault(stem, {})
        if SUFFIXES[suffix] in parts:
            raise ValueError(f"{path}: {shown(stem)} has two members with the suffix {SUFFIXES[suffix]}.")
        parts[SUFFIXES[suffix]] = data
        if len(parts) < 2:
            continue
        del waiting[stem]
        embeds = unpickle_embeddings(parts["pickle"], f"{path}:{stem}")
        if key not in embeds:
            names = ", ".join(map(shown, sorted(embeds)))
            raise ValueError(f"{path}:{stem} has embeddings of [{names}], but not of {key!r}.")
        try:
            caption = parts["caption"].decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{stem} has a caption that is not UTF-8: {error}") from error
        yield caption, embeds[key]
    alone = [stem for stem, parts in waiting.items() if "pickle" in parts]
    if alone:
        raise ValueError(f"{path}: {len(alone)} pickles have no caption (.txt) next to them, such as {alone[0]!r}.")
