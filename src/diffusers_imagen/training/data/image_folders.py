"""Files in a data folder: the splits that they belong to, images, and the captions next to them."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from ...text.source import MAX_CAPTION
from ...utils.images import BadImage, check_regular, picture_extensions
from ..settings import is_text


METADATA = {"metadata.jsonl": "json", "metadata.csv": "csv", "metadata.parquet": "parquet"}
SHARDS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
CAPTIONS = (".txt", ".caption", ".TXT")
# words in names of folders and shards that `datasets` interprets as splits
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def list_files(folder: str) -> list[str]:
    """
    List all files in a folder and its subfolders, relative and sorted, except hidden files and those of macOS and
    Jupyter.

    Raises:
        ValueError: If a subfolder cannot be read.
    """
    try:
        return sorted(_walk(Path(folder), "", ()))
    except OSError as error:
        raise ValueError(f"'{error.filename}' cannot be read: {error.strerror}.") from error


def _walk(root: Path, relative: str, above: tuple) -> Iterator[str]:
    place = (root / relative).stat()
    identity = (place.st_dev, place.st_ino)
    if identity in above:  # a link to a parent folder
        return
    with os.scandir(root / relative) as listing:
        entries = list(listing)
    for entry in entries:
        if entry.name.startswith((".", "__")):
            continue
        path = f"{relative}/{entry.name}" if relative else entry.name
        if entry.is_dir():
            yield from _walk(root, path, (*above, identity))
        else:
            yield path


def find_pictures(files: list[str]) -> list[str]:
    """Return the files that are images by their suffix."""
    return [path for path in files if os.path.splitext(path)[1].lower() in picture_extensions()]


def find_shards(files: list[str]) -> list[str]:
    """Return the files that are tar shards by their suffix."""
    return [path for path in files if path.lower().endswith(SHARDS)]


def find_metadata(files: list[str]) -> list[str]:
    """Return the metadata files."""
    return [path for path in files if os.path.basename(path) in METADATA]


def group_by_split(files: list[str], by_file_name: bool) -> dict[str, list[str]]:
    """Group files by split, named by a word in their folder's name, or with `by_file_name` in their own; else `train`.

    Raises:
        ValueError: If some files belong to a split and others to none, which would be ignored silently.
    """
    splits = [_split_of(path, by_file_name) for path in files]
    if not any(splits):
        return {"train": files}
    outside = [path for path, split in zip(files, splits) if split is None]
    if outside:
        inside, split = next(item for item in zip(files, splits) if item[1] is not None)
        raise ValueError(
            f"it has files of splits, such as '{inside}' of {split!r}, and {len(outside)} without a split, such as "
            f"'{outside[0]}': move or rename them."
        )
    return {
        split: [path for path, found in zip(files, splits) if found == split]
        for split in dict.fromkeys(filter(None, splits))
    }


def _split_of(path: str, by_file_name: bool) -> str | None:
    *parts, name = path.split("/")
    if by_file_name:
        numbered = re.fullmatch(r"(\w+)-\d{5}-of-\d{5}.*", name)
        if numbered and not any(word in SPLITS for word in re.split(r"[\W\d_]+", numbered[1].lower())):
            return numbered[1]
        parts = [*parts, name.split(".")[0]]
    words = (word for part in parts for word in re.split(r"[-._ 0-9]+", part.lower()))
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def picture_columns(folder: str, pictures: list[str]) -> tuple[str, ...]:
    """Return the columns of a folder of images: `file_name`; `text`, if there are .txt or .caption files next to them;
    `label`, the name of the folder, if there are several.

    Raises:
        ValueError: If the name of an image is not UTF-8.
    """
    for path in pictures:
        if not is_text(path):
            raise ValueError(f"the image {os.fsencode(path)!r} has a name that is not UTF-8: rename it.")
    has_text = any(find_caption(folder, path) for path in pictures)
    has_label = len({_label(path) for path in pictures}) > 1
    return ("file_name", *(("text",) if has_text else ()), *(("label",) if has_label else ()))


def picture_rows(folder: str, pictures: list[str], columns: tuple[str, ...]) -> Iterator[dict[str, str | None]]:
    """Yield the rows of a folder of images, with these of its columns.

    Raises:
        ValueError: If a caption file cannot be read.
    """
    readers: dict[str, Callable[[str], str | None]] = {
        "file_name": str,
        "text": partial(read_caption, folder),
        "label": _label,
    }
    for path in pictures:
        yield {column: readers[column](path) for column in columns}


def digest_pictures(folder: str, pictures: list[str], columns: tuple[str, ...]) -> str:
    """Return a digest of the rows of a folder of images: names, and size and modification time of the caption files."""
    sha = hashlib.sha256(json.dumps([os.path.abspath(folder), columns]).encode())
    for path in pictures:
        caption = find_caption(folder, path)
        # what cannot be read is reported when it is
        place = os.stat(caption) if caption and os.path.exists(caption) else None
        state = [path, caption, *([place.st_size, place.st_mtime_ns] if place else [])]
        sha.update(json.dumps(state).encode())
    return sha.hexdigest()[:32]


def find_caption(folder: str, picture: str) -> str | None:
    """Return the path of an image's caption file, with the same name and another suffix; None without a file."""
    stem = os.path.join(folder, os.path.splitext(picture)[0])
    return next((stem + ending for ending in CAPTIONS if os.path.lexists(stem + ending)), None)


def read_caption(folder: str, picture: str) -> str | None:
    """Read the caption file of an image as one line; None without a file."""
    path = find_caption(folder, picture)
    if path is None:
        return None
    try:
        check_regular(path)
        if os.stat(path).st_size > MAX_CAPTION:
            raise BadImage(f"it is larger than {MAX_CAPTION} bytes")
        return " ".join(Path(path).read_text(encoding="utf-8-sig").split())
    except (OSError, ValueError) as error:
        raise ValueError(f"the caption '{path}' cannot be read: {error}.") from error


def _label(picture: str) -> str:
    return os.path.basename(os.path.dirname(picture))
