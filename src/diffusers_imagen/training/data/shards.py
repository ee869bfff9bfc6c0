"""Local WebDataset tar shards: integrity checks, and the samples in them.

Tar files end with zeros, so that truncation can be detected; sequential readers (`tarfile`, `datasets`) treat a
truncated file or a damaged header as the end, and ignore the samples after it.
"""

import bz2
import gzip
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from datasets import Features, Image, Value
from datasets.packaged_modules.webdataset.webdataset import base_plus_ext
from tqdm.auto import tqdm

from ...text.source import MAX_CAPTION
from ...utils.errors import one_line
from ...utils.images import check_regular, picture_extensions


COMPRESSIONS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
TEXTS = ("txt", "text", "caption", "cap", "transcript", "label", "style", "split", "url")
NUMBERS = ("cls", "cls2", "index", "inx", "id")
MOST_EXAMINED = 256  # maximum number of a stream's shards whose headers are all read; of others only the end is read
MAX_FIELD = 2**30  # bytes of one file in a shard; headers of sparse files can declare any size
DAMAGE = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError, ValueError)


class Shard(NamedTuple):
    """A tar file, with its size and modification time when it was checked."""

    path: str
    size: int
    changed: int

    @classmethod
    def at(cls, path: str) -> "Shard":
        place = os.stat(path)
        return cls(path, place.st_size, place.st_mtime_ns)


class Contents(NamedTuple):
    """Content of a shard."""

    samples: int
    fields: frozenset[str]  # the suffixes of its files
    pictures: frozenset[tuple[str, ...]]  # the suffixes of images that belong to the same sample
    fault: str | None  # description of damage


class Fault(Exception):
    """Damage of a shard."""


def check_shards(shards: list[Shard], most: int) -> list[Contents]:
    """Check shards, and return their contents.

    Args:
        shards (`list[Shard]`): The shards.
        most (`int`):
            Maximum number of shards to read completely, evenly spaced. Others are read completely only if they do not
            end like a complete archive: a header takes about 10 us, and 40,000 shards have 800 million of them.

    Raises:
        ValueError: If shards are truncated or damaged; names them, and the number of readable samples.
    """
    spread = set(np.linspace(0, len(shards) - 1, min(most, len(shards))).round().astype(int).tolist())
    contents, faults = [], []
    for number, shard in enumerate(tqdm(shards, desc="Checking shards", mininterval=5)):
        if number in spread or not is_ended(shard):
            contents.append(examine(shard))
            if contents[-1].fault:
                faults.append(f"'{shard.path}' {contents[-1].fault}")
    if faults:
        more = f"; and {len(faults) - 3} more shards" if len(faults) > 3 else ""
        raise ValueError(f"{'; '.join(faults[:3])}{more}: write them again, or move them away")
    return contents


def is_ended(shard: Shard) -> bool:
    """Return whether a shard ends with the zeros of a tar file, or begins like a compressed file."""
    check_regular(shard.path)
    with open(shard.path, "rb") as file:
        start = file.read(6)
        if any(start.startswith(magic) for magic in COMPRESSIONS):
            return True
        file.seek(max(0, shard.size - tarfile.BLOCKSIZE))
        end = file.read()
    return len(end) == tarfile.BLOCKSIZE and not any(end)


@lru_cache(maxsize=None)
def examine(shard: Shard) -> Contents:
    """Read all headers of a shard up to its end, decompressing it if necessary."""
    samples = 0
    fields: set[str] = set()
    pictures: set[tuple[str, ...]] = set()
    seen: set[str] = set()
    fault = None
    try:
        for key, members in _group(shard.path, lambda archive, member: None):
            if key in seen:
                raise Fault(
                    f"has files of the sample {key!r} in two places: the files of a sample should be consecutive"
                )
            seen.add(key)
            samples += 1
            fields.update(members)
            pictures.add(tuple(sorted(field for field in members if is_picture(field))))
    except Fault as error:
        fault = f"{error} ({samples} samples can be read)"
    except DAMAGE as error:
        fault = f"cannot be read: {one_line(error)} ({samples} samples can be read)"
    return Contents(samples, frozenset(fields), frozenset(pictures), fault)


def is_picture(field: str) -> bool:
    """Return whether a suffix is that of an image; one of two parts, such as `mask.png`, is not."""
    return f".{field.lower()}" in picture_extensions()


@contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    check_regular(path)
    with open(path, "rb") as file:
        start = file.read(6)
        file.seek(0)
        unpack = next((unpack for magic, unpack in COMPRESSIONS.items() if start.startswith(magic)), None)
        if unpack is None:
            yield file
        else:
            with unpack(file) as unpacked:
                yield unpacked


def _group(
    path: str, take: Callable[[tarfile.TarFile, tarfile.TarInfo], bytes | None]
) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """
    Iterate over the samples of a shard, consecutive files with the same name up to the first dot: name, and `take`'s
    results.

    Raises:
        Fault: If the archive is not complete.
    """
    current, before = "", None
    members: dict[str, bytes | None] = {}
    with _open(path) as file, _archive(file) as archive:
        try:
            for member in _members(archive, file):
                key, field = base_plus_ext(member.name)
                if not member.isreg() or key is None or os.path.basename(member.name).startswith((".", "__")):
                    continue
                if member.size > MAX_FIELD:
                    raise Fault(f"has '{member.name}' of {member.size} bytes, more than the supported {MAX_FIELD}")
                if key != current and members:
                    yield current, members
                    members, before = {}, set(members)
                if field in members:
                    raise Fault(f"has '{member.name}' twice")
                current, members[field] = key, take(archive, member)
        except Fault:  # after the last member
            if set(members) == before:
                yield current, members
            raise
        if members:
            yield current, members


@contextmanager
def _archive(file: BinaryIO) -> Iterator[tarfile.TarFile]:
    if not file.read(1):
        raise Fault("is empty, 0 bytes")
    file.seek(0)
    with tarfile.open(fileobj=cast(BinaryIO, Bounded(file)), mode="r:") as archive:
        yield archive


class Bounded:
    """
    File of which at most `MAX_FIELD` bytes are read at a time: damaged or malicious headers can declare any size.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """Read this number of bytes."""
        if not 0 <= size <= MAX_FIELD:
            raise Fault(f"has a header at byte {self.tell()} that declares more than the supported {MAX_FIELD} bytes")
        return self.file.read(size)


def _members(archive: tarfile.TarFile, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Iterate over the members of an archive, and check its end."""
    while (member := archive.next()) is not None:
        yield member
        archive.members = []  # type: ignore[attr-defined]  # a list that tarfile keeps, and does not declare
    file.seek(archive.offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise Fault(f"is cut: it ends at byte {archive.offset + len(block)}, without the zeros that end a tar file")
    if any(block):
        raise Fault(f"has a damaged header at byte {archive.offset}")
    while part := file.read(2**20):
        if any(part):
            raise Fault(f"continues after the zeros that end a tar file, at byte {archive.offset}")


# ---- rows


def choose_pictures(contents: list[Contents], image_column: str) -> list[str]:
    """Return the suffixes of image files: `image_column`, or, if it is not a suffix, those of all images.

    Raises:
        ValueError: If samples have several images, and `image_column` selects none of them.
    """
    fields = set().union(*(found.fields for found in contents))
    together = set().union(*(found.pictures for found in contents))
    if image_column in fields and not is_picture(image_column):
        return [image_column]
    several = [group for group in together if len(group) > 1 and image_column not in group]
    if several:
        raise ValueError(
            f"`image_column` is {image_column!r}, but samples have several images, {list(several[0])}: choose one."
        )
    pictures = sorted({field for group in together for field in group})
    if not pictures:
        raise ValueError(f"`image_column` is {image_column!r}, but the samples have the files {sorted(fields)}.")
    return sorted(pictures, key=lambda field: field != image_column)


def shard_features(contents: list[Contents], image_column: str) -> Features:
    """Return the columns of the rows: the image, and the files with text and numbers."""
    fields = sorted(set().union(*(found.fields for found in contents)))
    columns = {field: Value("string") for field in fields if _ending(field) in TEXTS}
    columns |= {field: Value("int64") for field in fields if _ending(field) in NUMBERS}
    return Features({**columns, image_column: Image(decode=False)})


def read_rows(shards: list[Shard], pictures: tuple[str, ...], features: Features) -> Iterator[dict[str, Any]]:
    """Iterate over the samples of shards as rows, with images as bytes.

    Raises:
        ValueError: If a shard was changed after it was checked, and cannot be read.
    """
    (image_column,) = (name for name, feature in features.items() if isinstance(feature, Image))
    texts = [name for name in features if name != image_column]
    wanted = {*pictures, *texts}

    def take(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
        file = archive.extractfile(member) if base_plus_ext(member.name)[1] in wanted else None
        return None if file is None else file.read()

    for shard in shards:
        try:
            for key, members in _group(shard.path, take):
                picture = next((field for field in pictures if field in members), None)
                name = f"{os.path.basename(shard.path)}/{key}" + (f".{picture}" if picture else "")
                image = {"bytes": members[picture] if picture else b"", "path": name}
                yield {image_column: image, **{text: _decode(text, members.get(text)) for text in texts}}
        except (Fault, *DAMAGE) as error:
            raise ValueError(f"'{shard.path}' can no longer be read: {one_line(error)}") from error


def _ending(field: str) -> str:
    return field.rsplit(".", 1)[-1].lower()


def _decode(field: str, data: bytes | None) -> Any:
    """Decode a file with text or a number; None if it is missing or invalid."""
    if data is None or len(data) > MAX_CAPTION:
        return None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    if _ending(field) not in NUMBERS:
        return text
    return int(text) if re.fullmatch(r"\s*[-+]?\d{1,18}\s*", text) else None
