"""Data of a training run that the benchmark reads: JPEG files in a folder, in tar shards and in Parquet shards.

A measured call reads every image of the set once, from the file to a batch, in this process: its CPU time is that of one
core. The images are drawn once for each size, and every row repeats one of them.
"""

import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow
import torch
from benchmark_kernels import picture
from benchmark_measures import Case, Group
from pyarrow import parquet

from diffusers_imagen.text.cache import EmbeddingCache
from diffusers_imagen.text.cache_writer import CacheWriter
from diffusers_imagen.training import TrainingConfig
from diffusers_imagen.training.data import make_train_batches


# pixels of the file, of the image, of its low-resolution image, and of a crop
TASKS: dict[str, dict[str, Any]] = {
    "64 -> 64": {"source": 64, "resolution": 64},
    "256 -> 64": {"source": 256, "resolution": 64},
    "1024 -> 64": {"source": 1024, "resolution": 64},
    "1024 -> 256, low-resolution 64": {"source": 1024, "resolution": 256, "low_resolution": 64},
    "1024, crops of 256, low-resolution 256": {
        "source": 1024,
        "resolution": 1024,
        "low_resolution": 256,
        "crop_size": 256,
    },
}
PICTURES = 16  # different ones
ROWS, SHARDS = 256, 2
BATCH = 32
TOKENS, WIDTH = 128, 4096  # T5-XXL's embeddings
CAPTION = "caption {}"


def data_groups() -> list[Group]:
    """Return the reading of all kinds of data, by the sizes of the files and of the images."""
    return [Group("data", f"JPEG {task}", ROWS, partial(data_cases, task)) for task in TASKS]


def data_cases(task: str) -> list[Case]:
    folder = tempfile.TemporaryDirectory()  # removed with the last case that refers to it
    root = Path(folder.name)
    write_data(root, TASKS[task]["source"])
    cases = [Case(kind, partial(reader, folder, kind, task, None)) for kind in ("files", "tar", "parquet")]
    if task == next(iter(TASKS)):
        write_embeddings(root / "cache")
        cache = root / "cache"
        cases += [Case(f"{kind}, text", partial(reader, folder, kind, task, cache)) for kind in ("files", "tar")]
    return cases


def reader(folder: tempfile.TemporaryDirectory, kind: str, task: str, cache: Path | None) -> Callable[[], Any]:
    """Return a function that reads all images of a set once."""
    settings = {name: value for name, value in TASKS[task].items() if name != "source"}
    root = Path(folder.name)
    config = TrainingConfig(
        preset="emoji_base_64",
        train_data_dir=str(root / kind),
        cache_dir=str(root / "datasets"),
        caption_column=["txt"],
        image_column="image",
        streaming=kind != "files",
        in_memory=None if kind != "files" else False,
        train_batch_size=BATCH,
        **settings,
    )
    # a tensor without data stands for the device, whose work is not measured
    text = None if cache is None else EmbeddingCache(cache)
    stream = make_train_batches(config, text, device=torch.device("meta"))

    def read() -> None:
        for _ in range(ROWS // BATCH):
            next(stream)

    read.folder, read.stream = folder, stream
    return read


def write_data(root: Path, source: int) -> None:
    """Write the same images as files with a metadata.jsonl, as tar shards and as Parquet shards."""
    files = pictures(source)
    for kind in ("files", "tar", "parquet"):
        (root / kind).mkdir()
    lines = []
    for i in range(ROWS):
        (root / "files" / f"{i}.jpg").write_bytes(files[i % PICTURES])
        lines.append(json.dumps({"file_name": f"{i}.jpg", "txt": CAPTION.format(i)}) + "\n")
    (root / "files" / "metadata.jsonl").write_text("".join(lines))
    for shard in range(SHARDS):
        numbers = range(shard * ROWS // SHARDS, (shard + 1) * ROWS // SHARDS)
        with tarfile.open(root / "tar" / f"{shard:05d}.tar", "w") as archive:
            for i in numbers:
                for ending, data in (("jpg", files[i % PICTURES]), ("txt", CAPTION.format(i).encode())):
                    member = tarfile.TarInfo(f"{i:08d}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        images = [{"bytes": files[i % PICTURES], "path": f"{i}.jpg"} for i in numbers]
        table = pyarrow.table({"image": images, "txt": [CAPTION.format(i) for i in numbers]})
        parquet.write_table(table, root / "parquet" / f"{shard:05d}.parquet")


def write_embeddings(folder: Path) -> None:
    """Write random embeddings of all captions, of half of the tokens on average."""
    generator = torch.Generator().manual_seed(0)
    with CacheWriter(folder, {"width": WIDTH, "max_length": TOKENS}, "bfloat16") as writer:
        for i in range(ROWS):
            length = 1 + i * 53 % TOKENS
            writer.add([CAPTION.format(i)], [torch.randn(length, WIDTH, generator=generator)])
        writer.flush()


@lru_cache(maxsize=1)
def pictures(side: int) -> list[bytes]:
    return [picture(side, seed) for seed in range(PICTURES)]
