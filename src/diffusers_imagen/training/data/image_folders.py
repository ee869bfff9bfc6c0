"""What lies in a folder of data: its files, the splits that they belong to, pictures and the captions beside them."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ...text.source import MAX_CAPTION
from ...utils.images import BadImage, check_regular, picture_extensions


METADATA = {"metadata.jsonl": "json", "metadata.csv": "csv", "metadata.parquet": "parquet"}
SHARDS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
CAPTIONS = (".txt", ".caption")
# the words of folders and shards that `datasets` takes for splits
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def list_files(folder: str) -> list[str]:
    """All files of a folder and the folders in it, relative and sorted, but hidden ones and what macOS and Jupyter add.

    Raises:
        ValueError: If a folder in it cannot be read.
    """
    try:
        return sorted(_walk(Path(folder), "", ()))
    except OSError as error:
        raise ValueError(f"'{error.filename}' cannot be read: {error.strerror}.") from error


def _walk(root: Path, relative: str, above: tuple) -> Iterator[str]:
    place = (root / relative).stat()
    identity = (place.st_dev, place.st_ino)
    if identity in above:  # a link to a folder that it is in
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
    """Those files that are pictures by their ending."""
    return [path for path in files if os.path.splitext(path)[1].lower() in picture_extensions()]


def find_shards(files: list[str]) -> list[str]:
    """Those files that are tar shards by their ending."""
    return [path for path in files if path.lower().endswith(SHARDS)]


def find_metadata(files: list[str]) -> list[str]:
    """Those files that say what belongs to pictures."""
    return [path for path in files if os.path.basename(path) in METADATA]


def group_by_split(files: list[str], by_file_name: bool) -> dict[str, list[str]]:
    """Files by the split that a word of their folder's name means, or with `by_file_name` of their own; else `train`.

    Raises:
        ValueError: If some files belong to a split and others to none: those would be left out without a word.
    """
    splits = {path: _split_of(path, by_file_name) for path in files}
    if not any(splits.values()):
        return {"train": files}
    outside = [path for path, split in splits.items() if split is None]
    if outside:
        inside, split = next(item for item in splits.items() if item[1] is not None)
        raise ValueError(
            f"it has files of splits, such as '{inside}' of {split!r}, and {len(outside)} that belong to none, such as "
            f"'{outside[0]}': move or rename either."
        )
    return {
        split: [path for path in files if splits[path] == split]
        for split in dict.fromkeys(filter(None, splits.values()))
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


def picture_rows(folder: str, pictures: list[str]) -> dict[str, list]:
    """The columns of a folder of pictures: `file_name`; `text` of the .txt or .caption files beside them, where there are
    any; `label`, the name of the folder, where they lie in several.

    Raises:
        ValueError: If the file of a caption cannot be read.
    """
    columns: dict[str, list] = {"file_name": pictures}
    texts = [read_caption(folder, path) for path in pictures]
    if any(text is not None for text in texts):
        columns["text"] = texts
    labels = [os.path.basename(os.path.dirname(path)) for path in pictures]
    if len(set(labels)) > 1:
        columns["label"] = labels
    return columns


def read_caption(folder: str, picture: str) -> str | None:
    """The caption in the file that has a picture's name and another ending, its lines as one; None without a file."""
    stem = Path(folder) / os.path.splitext(picture)[0]
    for ending in CAPTIONS:
        path = stem.with_name(stem.name + ending)
        if not os.path.lexists(path):
            continue
        try:
            check_regular(path)
            if path.stat().st_size > MAX_CAPTION:
                raise BadImage(f"it is larger than {MAX_CAPTION} bytes")
            return " ".join(path.read_text(encoding="utf-8-sig").split())
        except (OSError, ValueError) as error:
            raise ValueError(f"the caption '{path}' cannot be read: {error}.") from error
    return None
