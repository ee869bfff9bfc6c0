"""Safe reading of tar files, member by member, with limits; truncated files raise an error."""

import gzip
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tarfile import BLOCKSIZE
from typing import IO, cast

from ..utils.arguments import shown


HEADER_BYTES = 2**14  # per member, including extended headers
PART_BYTES = 2**24  # of a member, read at once
GZIP = b"\x1f\x8b"
GZIP_RATIO = 50  # pixels and embeddings hardly compress; zeros compress a thousandfold


class GuardedFile:
    """File wrapper that limits reads to the size of a header, because `tarfile` trusts the length in a header."""

    def __init__(self, file: IO[bytes]):
        self.file, self.left = file, 0
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """Read a part of a header."""
        if not 0 <= size <= self.left:
            raise ValueError(f"a header has more than {HEADER_BYTES} bytes")
        self.left -= size
        return self.file.read(size)


def read_members(path: str | Path, limits: dict[str, int]) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Yield names and contents of a tar file's members with certain suffixes; the file may be gzip-compressed.

    Args:
        path (`str` or `Path`): The tar file.
        limits (`dict`): Maximum size in bytes by suffix, in lower case.

    Raises:
        ValueError: If it is not a tar file, is damaged or truncated, or has a member that is not a regular file or
            directory, has a name outside the folder, or is larger than its limit; names the member.
    """
    path = Path(path)
    with opened(path) as file:
        for name, member in checked_members(path, file):
            suffix = name.suffix.lower()
            if not member.isfile() or suffix not in limits:
                continue
            if member.size > limits[suffix]:
                raise ValueError(
                    f"'{path}' has {shown(member.name)} of {member.size} bytes, more than {limits[suffix]}."
                )
            yield name, b"".join(read_data(path, file, member))


def extract_members(path: str | Path, folder: Path, wanted: Callable[[PurePosixPath], bool]) -> list[PurePosixPath]:
    """Extract the selected members of a tar file to a folder as regular files, one part at a time.

    Args:
        path (`str` or `Path`): The tar file, which may be gzip-compressed.
        folder (`Path`): The destination.
        wanted (`Callable`): Whether to extract the member of a name.

    Returns:
        The names of the files.

    Raises:
        ValueError: As in `read_members`, and for a duplicate name; files written before the error are kept.
    """
    path = Path(path)
    names: dict[PurePosixPath, None] = {}
    with opened(path) as file:
        for name, member in checked_members(path, file):
            if not member.isfile():
                continue
            if name in names:
                raise ValueError(f"'{path}' has {shown(member.name)} twice.")
            names[name] = None
            if wanted(name):
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with open(target, "xb") as out:
                    for part in read_data(path, file, member):
                        out.write(part)
    return [name for name in names if wanted(name)]


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a tar file, decompressing gzip."""
    if not path.is_file():
        raise ValueError(f"'{path}' is not a file.")
    with open(path, "rb") as raw:
        compressed = raw.read(2) == GZIP
        raw.seek(0)
        yield cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if compressed else raw


def checked_members(path: Path, file: IO[bytes]) -> Iterator[tuple[PurePosixPath, tarfile.TarInfo]]:
    """Yield names and headers of all members, checked not to claim more bytes than the file can have."""
    compressed, size = isinstance(file, gzip.GzipFile), path.stat().st_size
    limit = size * GZIP_RATIO + 2**20 if compressed else size
    for member in walk(path, file):
        yield check_member(path, member, limit, compressed), member


def walk(path: Path, file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of a tar file, up to the empty block that ends it."""
    guarded = GuardedFile(file)
    tar = None
    while True:
        guarded.left = HEADER_BYTES
        try:
            if tar is None:
                tar = tarfile.TarFile(fileobj=cast(IO[bytes], guarded))
            member = tar.next()
            if member is None:
                file.seek(tar.offset)
                end = file.read(BLOCKSIZE)
        except Exception as error:  # damaged headers raise errors of any type
            raise ValueError(f"'{path}' cannot be read as a tar file: {error or type(error).__name__}") from error
        if member is None:
            break
        yield member
        tar.members.clear()  # type: ignore[attr-defined]  # which tarfile keeps, and does not declare
    if end != bytes(BLOCKSIZE):
        raise ValueError(f"'{path}' is cut or damaged at byte {tar.offset}: a tar file ends in an empty block.")


def check_member(path: Path, member: tarfile.TarInfo, limit: int, compressed: bool) -> PurePosixPath:
    """Check a member's type, name and size; return its name."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"'{path}' has {shown(member.name)}, a name that points outside the folder.")
    if not (member.isdir() or member.isfile()) or member.issparse():
        raise ValueError(
            f"'{path}' has {shown(member.name)}, which is not a regular file: links, devices and others are not supported."
        )
    if member.size < 0:
        raise ValueError(f"'{path}' has {shown(member.name)} of {member.size} bytes.")
    if member.offset_data + member.size > limit:
        what = f"more than {GZIP_RATIO} times its compressed size" if compressed else "beyond the end of the file"
        raise ValueError(f"'{path}' has {shown(member.name)} of {member.size} bytes, {what}: it is cut or damaged.")
    return name


def read_data(path: Path, file: IO[bytes], member: tarfile.TarInfo) -> Iterator[bytes]:
    """Yield the content of a member in parts."""
    left = member.size
    try:
        file.seek(member.offset_data)
        while left and (part := file.read(min(left, PART_BYTES))):
            left -= len(part)
            yield part
    except Exception as error:  # gzip and zlib raise their own errors, EOFError or OSError
        raise ValueError(
            f"'{path}' cannot be read at {shown(member.name)}: {error or type(error).__name__}"
        ) from error
    if left:
        raise ValueError(f"'{path}' is cut within {shown(member.name)}.")
