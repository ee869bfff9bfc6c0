"""Fingerprints of data sets: independent of machine and folder, and fast to compute."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from .data_config import DataConfig
from .sources import Rows


IMAGES_READ = 256  # maximum number of images whose bytes are hashed, evenly spaced
FILES_READ = 256  # maximum number of a stream's files whose beginnings are hashed, evenly spaced
BYTES_READ = 2**20  # from the beginning of such a file
HIDDEN = (".", "_")


def describe_data(rows: Rows, config: DataConfig) -> dict[str, Any]:
    """Return the number of rows, and digests of captions and file names of all rows, and of the bytes of some images.

    For a stream, which has no numbered rows: a digest of names and sizes of the files in its folder and of the
    beginnings of some, or its name.

    Args:
        rows (`Rows`): The data set.
        config (`DataConfig`): Configuration with its location.
    """
    if not rows.streaming:
        return {
            "rows of the data": len(rows.data),
            "a digest of the captions": digest_columns(rows.data, rows.image_columns),
            "a digest of the images": digest_images(rows),
        }
    place = config.train_data_dir or config.dataset_name or ""
    files = digest_files(Path(place)) if os.path.isdir(place) else [place, config.dataset_config_name]
    return {"shards of the data": rows.data.num_shards, "a digest of the data's files": files}


def digest_columns(data: Dataset, image_columns: list[str]) -> str:
    """Return a digest of all cells except images, in order."""
    columns = [name for name in data.column_names if name not in image_columns or is_text(data, name)]
    sha = hashlib.sha256(json.dumps(columns).encode())
    for part in data.select_columns(columns).iter(batch_size=1000) if columns else ():
        sha.update(json.dumps([part[name] for name in columns], default=str).encode())
    return sha.hexdigest()[:16]


def is_text(data: Dataset, column: str) -> bool:
    """Return whether a column has file names."""
    return getattr(data.features[column], "dtype", None) in ("string", "large_string")


def digest_images(rows: Rows) -> str:
    """Return a digest of the bytes of some images, as stored on disk."""
    sha = hashlib.sha256()
    count = min(len(rows.data), IMAGES_READ)
    for place in np.linspace(0, len(rows.data) - 1, count).round().astype(int):
        row = rows.data[int(place)]
        for column in rows.image_columns:
            sha.update(hashlib.sha256(image_bytes(row[column], rows.folder)).digest())
    return sha.hexdigest()[:16]


def image_bytes(value: Any, folder: str) -> bytes:
    """
    Return the bytes of a cell's image; empty if it is not a file, which is skipped or rejected when images are read.
    """
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return value["bytes"]
        value = value.get("path")
    path = os.path.join(folder, value) if isinstance(value, str) else ""
    try:
        return Path(path).read_bytes() if os.path.isfile(path) else b""
    except (OSError, ValueError):
        return b""


def digest_files(folder: Path) -> str:
    """Return a digest of names and sizes of the files below a folder, except hidden ones, and of some beginnings."""
    sha = hashlib.sha256()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in files if not any(part.startswith(HIDDEN) for part in path.relative_to(folder).parts)]
    read = set(np.linspace(0, len(files) - 1, min(len(files), FILES_READ)).round().astype(int).tolist())
    for number, path in enumerate(files):
        sha.update(json.dumps([path.relative_to(folder).as_posix(), path.stat().st_size]).encode())
        if number in read:
            with open(path, "rb") as file:
                sha.update(hashlib.sha256(file.read(BYTES_READ)).digest())
    return sha.hexdigest()[:16]
