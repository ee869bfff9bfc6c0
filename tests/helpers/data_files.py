"""Small data sets as bytes and folders: images whose red says their number, tar shards, rows of metadata."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

from diffusers_imagen.training import TrainingConfig
from diffusers_imagen.training.data import make_train_batches


READERS = {"memory": {"in_memory": True}, "loader": {"in_memory": False}, "stream": {"streaming": True}}


def picture(number: int, kind: str = "PNG") -> bytes:
    """An image file of 8 x 8 pixels."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (10 * number, 0, 0)).save(file, kind)
    return file.getvalue()


def tar(files: dict[str, bytes]) -> bytes:
    """A tar file."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def samples(numbers, kinds=("png",)) -> dict[str, bytes]:
    """The files of samples whose pictures are of these kinds in turn."""
    files = {}
    for i in numbers:
        kind = kinds[i % len(kinds)]
        files |= {f"{i:04d}.{kind}": picture(i, {"jpg": "JPEG"}.get(kind, kind.upper())), f"{i:04d}.txt": b"n %d" % i}
    return files


def lines(rows: list[dict]) -> bytes:
    """Rows of a metadata.jsonl."""
    return "\n".join(map(json.dumps, rows)).encode()


def write(folder: Path, files: dict[str, bytes]) -> str:
    """A folder with these files."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return str(folder)


def read(folder: str, reader: str, encode, **settings: Any) -> tuple[set[int], dict[str, str]]:
    """The numbers of the images that a run draws in 128 samples, and what it skips and why."""
    sides = {"preset": "emoji_base_64", "resolution": 8, "train_batch_size": 64}
    config = TrainingConfig(train_data_dir=folder, **sides, **settings, **READERS[reader])
    stream = make_train_batches(config, encode)
    drawn = set()
    for _ in range(2):
        drawn |= set(((next(stream).images[:, 0, 0, 0] + 1) * 12.75).round().int().tolist())
    return drawn, stream.skipped


def refusal(folder: str, reader: str, encode, **settings: Any) -> str:
    """Why a run does not begin; empty if it does."""
    try:
        read(folder, reader, encode, **settings)
    except ValueError as error:
        return str(error)
    return ""


def contents(folder: Path) -> dict[str, bytes]:
    """The files below a folder, but for locks, by their relative paths."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
