"""Atomic file writes, checksums, and folder locks between processes."""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import filelock


PathLike = str | os.PathLike
# arguments of `from_pretrained` and `load_lora_weights` that locate files
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
OF_A_PROCESS = re.compile(r"\.(.+)\.\d+\.partial", re.DOTALL)  # the names that `partial_of` gives
LOCK, OWNER = ".lock", ".lock-owner.json"  # in a locked folder; not part of its content


@contextmanager
def whole_file(path: PathLike) -> Iterator[Path]:
    """Context manager of a temporary path next to `path`, which is moved into place at the end, or removed on error.

    The file is flushed to disk before it is renamed, so that a crash leaves either the old or the new file.
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
    """Context manager like `whole_file`, for a new or empty folder, which one process writes at a time.

    Raises:
        ValueError: If another process is writing it.
    """
    path = Path(path)
    partial = partial_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with sole_writer(path):
        try:
            partial.mkdir()
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    sync(file)
            os.replace(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Context manager that locks writing of the folder `path`, and first removes unfinished files of killed processes.

    The lock next to the folder is one of the operating system, like that of a `FolderHold`: no process that started to
    write the folder is then alive, including those of other machines or containers, which have other process numbers.

    Raises:
        ValueError: If another process is writing it.
    """
    place = path.with_name(f".{short_name(path)}.partial.lock")
    lock = filelock.FileLock(place, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except (filelock.Timeout, RuntimeError) as error:  # RuntimeError: another object of this process
        raise ValueError(
            f"'{path}' is being written by another process: wait for its end, or name another folder."
        ) from error
    try:
        for other in path.parent.iterdir():
            left = OF_A_PROCESS.fullmatch(other.name)
            if left is not None and left[1] == short_name(path) and other.is_dir():
                shutil.rmtree(other, ignore_errors=True)
        yield
    finally:
        with suppress(OSError):
            place.unlink()  # while it is locked: a waiting process then creates a new one
        lock.release()


def partial_of(path: Path) -> Path:
    """Return the path at which a file or folder is written before it is moved into place."""
    return path.with_name(f".{short_name(path)}.{os.getpid()}.partial")


def short_name(path: Path) -> str:
    """Return a file's name as a part of another; names are limited to 255 bytes."""
    return os.fsdecode(os.fsencode(path.name)[:200])


def remove(path: Path) -> None:
    """Delete a file or a folder if it exists, atomically: it is renamed before its content is deleted."""
    if path.exists():
        doomed = path.with_name(f".{path.name}.removed.partial")
        os.replace(path, doomed)
        shutil.rmtree(doomed) if doomed.is_dir() else doomed.unlink()


def check_writable(path: PathLike, name: str) -> None:
    """Check that a file can be written, by writing a few bytes next to it; missing folders are not created.

    Args:
        path (`str` or `os.PathLike`): The file, which may exist already.
        name (`str`): The argument's name, for the message.

    Raises:
        ValueError: If it cannot be written, because of its name, what exists at the path, its folder, or the disk.
    """
    path = Path(path)
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise ValueError(f"`{name}` is {str(path)!r}, which is not a valid file name.") from None
    if path.name in ("", "..") or "\0" in str(path):
        raise ValueError(f"`{name}` is {str(path)!r}, which is not a valid file name.")
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
            with open(probe, "wb") as file:  # a full disk may raise only when the file is closed
                file.write(b"probe")
        finally:
            probe.unlink(missing_ok=True)


def for_huggingface_hub(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the HUB_OPTIONS that huggingface_hub accepts: it uses only the proxies of the environment."""
    return {name: value for name, value in options.items() if name != "proxies" and value is not None}


def check_new_folder(path: PathLike, name: str) -> None:
    """Check a folder like `check_folder`, and raise ValueError if it is not empty."""
    check_folder(path, name)
    if os.path.isdir(path) and os.listdir(path):
        raise ValueError(f"`{name}` is '{path}', which is not empty: name a new folder.")


def check_folder(path: PathLike, name: str) -> None:
    """Check, without changing anything, that files can be written to a folder, which need not exist yet.

    Args:
        path (`str` or `os.PathLike`): The folder.
        name (`str`): The argument's name, for the message.

    Raises:
        ValueError: If they cannot, because of its name, what exists at the path or above it, or permissions.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:  # model cards and records refer to the folder in UTF-8
        raise ValueError(f"`{name}` is {str(path)!r}, which is not UTF-8.") from None
    if not os.fspath(path) or "\0" in str(path):
        raise ValueError(f"`{name}` is {str(path)!r}, which is not a valid folder name.")
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
    """Convert an OSError to a ValueError that names the argument."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"`{name}` is '{path}', which cannot be written: {error.strerror or error}.") from error


def nearest_existing(path: PathLike) -> Path:
    """Return the path, or the nearest existing parent, including broken links; raise OSError as in `check_name`."""
    path = Path(path).absolute()
    while not os.path.lexists(path):
        check_name(path)
        path = path.parent
    return path


def check_name(path: Path) -> None:
    """Raise OSError for a file name that is not valid, whether its folder exists or not."""
    if len(os.fsencode(path.name)) > 255:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(path))
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # does not exist


def describe_kind(mode: int) -> str:
    """Describe the type of a path in words, from the mode of `os.stat`."""
    kinds = {"a folder": stat.S_ISDIR, "a FIFO": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
    return next((kind for kind, matches in kinds.items() if matches(mode)), "a device")


def write_text(path: PathLike, text: str) -> None:
    """Write a text file in UTF-8 atomically."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: PathLike, value: Any, indent: int = 2) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def read_json_object(path: PathLike) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Raises:
        ValueError: If the file cannot be read, is not JSON, or does not contain an object; names the file.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"'{path}' holds a JSON {type(value).__name__}, but should hold an object.")
    return value


def list_names(folder: PathLike) -> set[str]:
    """Return the names of what is in a folder, none if it does not exist.

    To look for files that other hosts write, list the folder instead of asking for each file: a network file system
    remembers for a while that a file did not exist.
    """
    return set(os.listdir(folder)) if os.path.isdir(folder) else set()


def sync(path: PathLike) -> None:
    """Flush a file to disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sha256(path: PathLike) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


class FolderHold:
    """Lock of a folder against other processes, until it is released or the process ends.

    The operating system's lock is used: it ends with the process, even if killed, and is not inherited by forked
    processes. The owner is recorded next to the lock, for the error message of other processes. Neither remains after
    the release, nor does a folder that was created for the lock and in which nothing was written.

    Args:
        folder (`str` or `os.PathLike`): The folder, created if it does not exist.
        name (`str`): The argument's name, for the message.

    Raises:
        ValueError: If the folder is locked by another process or another object, or cannot be written to.
    """

    def __init__(self, folder: PathLike, name: str):
        check_folder(folder, name)
        self.folder = Path(folder)
        place = self.folder.absolute()
        self._created = list(takewhile(lambda path: not path.exists(), (place, *place.parents)))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(self.folder / LOCK, timeout=0, thread_local=False)
            self._lock.acquire()
        except (filelock.Timeout, RuntimeError) as error:  # RuntimeError: another object of this process
            raise ValueError(
                f"`{name}` is '{self.folder}', which {self._describe_owner()} is using: wait for it to end, or choose "
                "another folder."
            ) from error
        except OSError as error:
            if error.errno == errno.ENOSPC:  # has its own message
                raise
            raise ValueError(f"`{name}` is '{folder}', which cannot be locked: {error.strerror or error}.") from error
        try:
            self._remove_leftovers()
            # without the command's arguments, which can include a token
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "command": Path(sys.argv[0]).name}
            write_json(self.folder / OWNER, owner)
        except BaseException:  # a full disk
            self.release()
            raise

    def _remove_leftovers(self) -> None:
        """Remove unfinished files of killed processes, but not folders that another process is writing here."""
        for leftover in self.folder.glob(".*.partial"):
            written = OF_A_PROCESS.fullmatch(leftover.name)
            if not leftover.is_dir():
                leftover.unlink(missing_ok=True)
            elif written is None:
                shutil.rmtree(leftover)
            else:
                with suppress(ValueError), sole_writer(self.folder / written[1]):
                    pass

    def release(self) -> None:
        """Release the folder; a second call has no effect."""
        if self._lock.is_locked:
            for name in (OWNER, LOCK):  # while it is locked: a waiting process then creates a new lock
                with suppress(OSError):
                    (self.folder / name).unlink()
            with suppress(OSError):  # not empty
                for folder in self._created:
                    folder.rmdir()
            self._lock.release()

    def __enter__(self) -> "FolderHold":
        return self

    def __exit__(self, *exception) -> None:
        self.release()

    def _describe_owner(self) -> str:
        try:
            owner = read_json_object(self.folder / OWNER)
        except ValueError:  # the other process has only just started
            return "another process"
        return f"process {owner.get('pid')} on {owner.get('host')} ({owner.get('command')})"
