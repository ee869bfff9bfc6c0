"""Reading of weights from files of `torch.save`, tensor by tensor, without executing code or loading the whole file.

Lightning's checkpoints contain other objects besides the weights, of omegaconf and of Lightning. Their classes are not
imported: a placeholder class stores the object's state and has no behavior.
"""

import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from ..utils.arguments import class_of, shown
from ..utils.errors import describe_fault, is_out_of_memory


MAX_ENTRIES = 2**18  # per file: one per tensor
MAX_PICKLE = 2**28  # bytes of the pickle that describes the tensors
# Pages of a memory-mapped file that have been read count as the process's memory until the file is closed.
MAPPED_BYTES = 2**30
ZIP = b"PK\x03\x04"
# Names that are replaced by a placeholder; a file with others raises an error.
INERT_NAMES = re.compile(
    r"(omegaconf|pytorch_lightning|lightning|lightning_fabric|lightning_utilities|nemo|megatron|apex|hydra)\.[\w.]+"
    r"|(builtins|__builtin__)\.(dict|list|tuple|set|frozenset|int|long|float|bool|str|unicode|bytes|object|slice|range)"
    r"|typing\.\w+|pathlib\.\w+|pathlib\._local\.\w+|collections\.\w+|argparse\.Namespace|datetime\.\w+|enum\.\w+"
    r"|numpy\.(dtype|ndarray|core\.multiarray\.\w+|_core\.multiarray\.\w+)|copyreg\._reconstructor|copy_reg\._reconstructor"
)


class Described(NamedTuple):
    """Description of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Weights(Protocol):
    """Named tensors that are read one at a time."""

    tensors: dict[str, Described]  # by key, in file order

    def read(self, keys: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield these tensors; each is valid until the next is read."""
        ...


class Inert(dict):
    """Placeholder for an object of another package's class, with its arguments and state."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # a file may have one as a key

    def __init__(self, *args: Any):
        super().__init__()
        self.args, self.state = args, None

    def __new__(cls, *args: Any) -> "Inert":
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


class TorchFile:
    """Tensors of one file of `torch.save`: a state dict, or a Lightning checkpoint that contains one.

    Args:
        path (`Path`): The file.
        what (`str`): Description of the file for messages, such as "`sr256` is 'sr.ckpt', which".

    Raises:
        ValueError: If it is damaged or truncated, would execute code, or has no state dict.
    """

    def __init__(self, path: Path, what: str):
        self.path, self.what = path, what
        self.is_zip = check_file(path, what)
        self.names = inert_names(path, what) if self.is_zip else []
        content = self.load()
        self.is_checkpoint = isinstance(content.get("state_dict"), Mapping)
        # besides the weights: names of sections, and the configuration of the run
        self.sections = [str(name) for name in content if name != "state_dict"] if self.is_checkpoint else []
        self.settings = to_plain(content.get("hyper_parameters")) if self.is_checkpoint else None
        self.tensors = {}
        for key, value in self.select(content).items():
            if not isinstance(key, str) or not isinstance(value, torch.Tensor):
                raise ValueError(f"{what} has {shown(value)[:60]} under {shown(key)}, but should have a tensor.")
            if value.is_nested or value.layout != torch.strided or value.is_quantized or value.is_meta:
                raise ValueError(f"{what} has a nested, sparse, quantized or empty tensor under {shown(key)}.")
            self.tensors[key] = Described(tuple(value.shape), value.dtype)

    def load(self) -> dict[Any, Any]:
        """Load the content of the file, with memory-mapped tensors."""
        stand_ins: list[Any] = [(Inert, name) for name in self.names]
        with refusing_fault(self.what), torch.serialization.safe_globals(stand_ins):
            content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self.is_zip)
        if not isinstance(content, dict):
            raise ValueError(f"{self.what} holds an object {class_of(content)}, but should hold weights by name.")
        return content

    def select(self, content: dict[Any, Any]) -> Mapping[Any, Any]:
        """Select the weights from the content."""
        return content["state_dict"] if self.is_checkpoint else content

    def read(self, keys: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield these tensors, in the order given; reopen the file after many bytes to release memory."""
        content, left = self.select(self.load()), MAPPED_BYTES
        for key in keys:
            if left <= 0:
                del content
                content, left = self.select(self.load()), MAPPED_BYTES
            left -= content[key].nbytes
            yield key, content[key].detach()


class DictWeights:
    """Tensors in memory."""

    def __init__(self, state_dict: Mapping[str, torch.Tensor]):
        self.state_dict = state_dict
        self.tensors = {key: Described(tuple(value.shape), value.dtype) for key, value in state_dict.items()}

    def read(self, keys: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """These tensors."""
        for key in keys:
            yield key, self.state_dict[key].detach()


class RankWeights:
    """Weights of several ranks of a run: each has all of them, or a part.

    NeMo's Imagen does not split layers over ranks, so a key must have the same tensor in every rank that has it; this
    is checked on reading.
    """

    def __init__(self, ranks: dict[str, TorchFile], what: str):
        self.ranks, self.what = ranks, what
        self.tensors: dict[str, Described] = {}
        self.owners: dict[str, list[str]] = {}
        for name, weights in ranks.items():
            for key, described in weights.tensors.items():
                self.owners.setdefault(key, []).append(name)
                if self.tensors.setdefault(key, described) != described:
                    raise self.differ(key, name)

    def read(self, keys: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield these tensors, rank by rank."""
        for number, (name, weights) in enumerate(self.ranks.items()):
            own = [key for key in keys if self.owners[key][0] == name]
            copies = list(self.ranks.items())[number + 1 :]
            others = [(other, file.read([key for key in own if other in self.owners[key]])) for other, file in copies]
            for key, tensor in weights.read(own):
                for other, copy in others:
                    if other in self.owners[key] and not torch.equal(next(copy)[1], tensor):
                        raise self.differ(key, other)
                yield key, tensor

    def differ(self, key: str, rank: str) -> ValueError:
        """Return the error for a rank whose tensor differs from the first rank's."""
        return ValueError(
            f"{self.what} has {shown(key)} in several ranks, but {rank} has another than {self.owners[key][0]}: NeMo's Imagen "
            "has no layers that are split over ranks. Convert the folder of a single rank."
        )


@contextmanager
def refusing_fault(what: str) -> Iterator[None]:
    """Convert errors that torch raises for an unreadable file to one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or is_out_of_memory(error):
            raise
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if asked:
            raise unknown_name(what, asked[1]) from error
        reason = re.search(r"WeightsUnpickler error: (.{1,200})", str(error))  # preceded by unrelated advice
        raise ValueError(
            f"{what} cannot be read as weights: {reason[1] if reason else describe_fault(error)}"
        ) from error


def unknown_name(what: str, name: str) -> ValueError:
    """Return the error for a file that names a class or function which no NeMo checkpoint needs."""
    return ValueError(f"{what} asks for {shown(name)}, which no weights need: no code was executed.")


def check_file(path: Path, what: str) -> bool:
    """Return whether a file is in torch's zip format, after checking its entries."""
    if not path.is_file():
        raise ValueError(f"{what} is not a regular file." if path.exists() else f"{what} does not exist.")
    with open(path, "rb") as file:
        if file.read(4) != ZIP:
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # damaged files raise many types of errors
        raise ValueError(
            f"{what} cannot be read as weights: it is cut or damaged ({describe_fault(error)})."
        ) from error
    names, size = {entry.filename for entry in entries}, path.stat().st_size
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ValueError(f"{what} has the entry {shown(entry.filename)}, which is compressed; torch's are not.")
        if entry.filename.endswith("data.pkl") and entry.file_size > MAX_PICKLE:
            raise ValueError(f"{what} has {shown(entry.filename)} of {entry.file_size} bytes, more than {MAX_PICKLE}.")
    if len(entries) > MAX_ENTRIES or len(names) < len(entries):
        raise ValueError(f"{what} has {len(entries)} entries, more than {MAX_ENTRIES} or several of one name.")
    total = sum(entry.file_size for entry in entries)
    if total > size:
        raise ValueError(f"{what} has entries of {total} bytes in {size}: it is damaged or malicious.")
    return True


def inert_names(path: Path, what: str) -> list[str]:
    """Return the classes and functions in a file that torch does not allow by default, to be replaced by placeholders.

    Raises:
        ValueError: For one that no NeMo checkpoint needs.
    """
    with refusing_fault(what):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    for name in names:
        if not INERT_NAMES.fullmatch(name):
            raise unknown_name(what, name)
    return names


def to_plain(value: Any, depth: int = 0) -> Any:
    """Convert a configuration saved by Lightning, including omegaconf's objects, to dicts, lists and plain values.

    Other values become None.
    """
    if depth > 32:
        return None
    if isinstance(value, Inert):
        state: dict[Any, Any] = value.state if isinstance(value.state, dict) else {}
        if "_content" in state:
            return to_plain(state["_content"], depth + 1)
        if "_val" in state:
            return to_plain(state["_val"], depth + 1)
        value = dict(value)
    if isinstance(value, dict):
        return {str(key): to_plain(part, depth + 1) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(part, depth + 1) for part in value]
    return value if isinstance(value, (str, int, float, bool)) else None
