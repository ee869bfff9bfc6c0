"""Files that are whole or absent, their checksums, and folders that one process holds at a time."""

import errno
import hashlib
import json
import os
import shutil
import socket
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock


PathLike = str | os.PathLike
# of `from_pretrained` and `load_lora_weights`: where a file comes from
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
LOCK, OWNER = ".lock", ".lock-owner.json"  # in a folder that is held; no part of what is in it


@contextmanager
def whole_file(path: PathLike) -> Iterator[Path]:
    """A path beside `path` to write to; what is there at the end is moved into place, and removed after an error.

    The file is on the disk before it takes its name, so that a crash of the machine leaves the old one or the new one.
    """
    path = Path(path)
    partial = partial_of(path)
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: PathLike) -> Iterator[Path]:
    """As `whole_file`, for a folder that is not there yet, or is empty."""
    path = Path(path)
    partial = partial_of(path)
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a killed process with the same number, as in a container
        partial.mkdir(parents=True)
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                sync(file)
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def partial_of(path: Path) -> Path:
    """Where a file or folder is written before it is moved into place; names are limited in bytes, to 255."""
    name = os.fsdecode(os.fsencode(path.name)[:200])
    return path.with_name(f".{name}.{os.getpid()}.partial")


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there. It is gone from its place at once: nobody finds half of it."""
    if path.exists():
        doomed = path.with_name(f".{path.name}.removed.partial")
        os.replace(path, doomed)
        shutil.rmtree(doomed) if doomed.is_dir() else doomed.unlink()


def check_writable(path: PathLike, name: str) -> None:
    """Find out whether a file can be written, by writing a few bytes beside it; folders that lack are not made.

    Args:
        path (`str` or `os.PathLike`): The file, which may be there already.
        name (`str`): The argument that named it, for the message.

    Raises:
        ValueError: If it cannot: because of its name, what is in its place, its folder, or the disk.
    """
    path = Path(path)
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise ValueError(f"`{name}` is {str(path)!r}, which no file can be called.") from None
    if path.name in ("", "..") or "\0" in str(path):
        raise ValueError(f"`{name}` is {str(path)!r}, which no file can be called.")
    with refusing(path, name):
        check_name(path)
        if path.exists() and not path.is_file():
            kind = describe_kind(path.stat().st_mode)
            raise ValueError(f"`{name}` is '{path}', which is {kind}, but should be a file.")
        folder = nearest_existing(path.parent)
        if not folder.is_dir():
            raise ValueError(f"`{name}` is '{path}', which needs the folder '{folder}', but that is a file.")
        probe = partial_of(folder / "probe")
        try:
            with open(probe, "wb") as file:  # a full disk may tell only when the file is closed
                file.write(b"probe")
        finally:
            probe.unlink(missing_ok=True)


def for_huggingface_hub(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of HUB_OPTIONS that huggingface_hub takes: it has no proxies but those of the environment."""
    return {name: value for name, value in options.items() if name != "proxies" and value is not None}


def check_new_folder(path: PathLike, name: str) -> None:
    """As `check_folder`; raises ValueError for a folder with something in it too."""
    check_folder(path, name)
    if os.path.isdir(path) and os.listdir(path):
        raise ValueError(f"`{name}` is '{path}', which is not empty: name a new folder.")


def check_folder(path: PathLike, name: str) -> None:
    """Find out, without a change, whether files can be written into a folder, which need not be there yet.

    Args:
        path (`str` or `os.PathLike`): The folder.
        name (`str`): The argument that named it, for the message.

    Raises:
        ValueError: If they cannot: because of its name, what is in its place or in that of a folder above it, or rights.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:  # cards and records of the folder are in UTF-8
        raise ValueError(f"`{name}` is {str(path)!r}, which is not UTF-8.") from None
    if not os.fspath(path) or "\0" in str(path):
        raise ValueError(f"`{name}` is {str(path)!r}, which no folder can be called.")
    with refusing(path, name):
        folder = nearest_existing(path)
        if not folder.is_dir():
            kind = "a link to nothing" if folder.is_symlink() and not folder.exists() else "a file"
            above = "" if folder == Path(path).absolute() else f" needs the folder '{folder}', which"
            raise ValueError(f"`{name}` is '{path}', which{above} is {kind}, but should be a folder.")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


@contextmanager
def refusing(path: PathLike, name: str) -> Iterator[None]:
    """Turn an OSError into a ValueError that names the argument."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"`{name}` is '{path}', which cannot be written: {error.strerror or error}.") from error


def nearest_existing(path: PathLike) -> Path:
    """Return the path, or the nearest folder above it that there is, be it a link to nothing; OSError as in `check_name`."""
    path = Path(path).absolute()
    while not os.path.lexists(path):
        check_name(path)
        path = path.parent
    return path


def check_name(path: Path) -> None:
    """Raise OSError for a name that no file of a file system can have, whether its folder is there or not."""
    if len(os.fsencode(path.name)) > 255:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(path))
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # nothing there


def describe_kind(mode: int) -> str:
    """Return what is in the place of a file, of the mode that `os.stat` tells."""
    kinds = {"a folder": stat.S_ISDIR, "a FIFO": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
    return next((kind for kind, matches in kinds.items() if matches(mode)), "a device")


def write_text(path: PathLike, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: PathLike, value: Any, indent: int = 2) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def read_json_object(path: PathLike) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: If the file cannot be read, is not JSON, or holds something else than an object; names the file.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"'{path}' holds a JSON {type(value).__name__}, but should hold an object.")
    return value


def sync(path: PathLike) -> None:
    """Wait until a file is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sha256(path: PathLike) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


class FolderHold:
    """Keeps other processes out of a folder until it is released, or its process ends.

    The lock is the operating system's: it goes with its process, however that ends, and is not inherited by the
    processes that it forks. Who holds it is written beside the lock for the message that others get.

    Args:
        folder (`str` or `os.PathLike`): The folder, made if it is not there.
        name (`str`): The argument that named the folder, for the message.

    Raises:
        ValueError: If another process, or another object of this one, holds the folder, or it cannot be written to.
    """

    def __init__(self, folder: PathLike, name: str):
        check_folder(folder, name)
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(self.folder / LOCK, timeout=0, thread_local=False)
            self._lock.acquire()
        except (filelock.Timeout, RuntimeError) as error:  # RuntimeError: another object of this process
            raise ValueError(
                f"`{name}` is '{self.folder}', which {self._describe_owner()} is using: wait for its end, or name "
                "another folder."
            ) from error
        except OSError as error:
            if error.errno == errno.ENOSPC:  # which has a line of its own
                raise
            raise ValueError(f"`{name}` is '{folder}', which cannot be locked: {error.strerror or error}.") from error
        try:
            for leftover in self.folder.glob(".*.partial"):  # of a process that was killed
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
            # without the command's arguments, among which may be a token
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "command": Path(sys.argv[0]).name}
            write_json(self.folder / OWNER, owner)
        except BaseException:  # a full disk
            self._lock.release()
            raise

    def release(self) -> None:
        """Let others have the folder; a second call does nothing."""
        if self._lock.is_locked:
            (self.folder / OWNER).unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> "FolderHold":
        return self

    def __exit__(self, *exception) -> None:
        self.release()

    def _describe_owner(self) -> str:
        try:
            owner = read_json_object(self.folder / OWNER)
        except ValueError:  # it has only just begun
            return "another process"
        return f"process {owner.get('pid')} on {owner.get('host')} ({owner.get('command')})"
