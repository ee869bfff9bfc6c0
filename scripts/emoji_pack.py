"""The emoji set in one Parquet file that a training run reads as it is: a part of `train_emoji_cascade.py`.

Pictures are WebP of 256 px on white. Of most drawings the lossless form is no larger than the lossy one, once each channel
is rounded to a multiple of 5 from white on, which changes a value by 2 of 255 at most; a lossy WebP halves the resolution
of colours, which shows at the edges of drawings. Renders with their smooth shades are lossy.

Captions and what else metadata.jsonl says are columns; the notices of the works are in the file's metadata.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Features, Image, List, Value
from PIL import Image as Pictures
from pyarrow import parquet

from diffusers_imagen.utils.files import whole_file, write_text
from diffusers_imagen.utils.images import read_image


COLUMNS = ("text", "label", "style", "concept", "split", "tone", "group")
LISTS = ("tags",)
NUMBERS = ("weight",)
NOTICES = b"notices"  # key of the file's metadata
LEVELS = 5  # distance of a channel's values in rounded pictures
LARGER = 2.0  # a lossless picture may be so many times as large as the lossy one
ROW_GROUP = 256


class Measured(NamedTuple):
    """What a picture took."""

    bytes: int
    lossless: bool  # of the rounded picture
    squared_error: float  # mean over values of 0 to 255


class StyleReport(NamedTuple):
    """What became of the pictures of a style."""

    pictures: int
    rounded: int  # as many of them are lossless, but for the rounding
    bytes: int
    psnr: float  # of all pixels together, in dB
    lowest_psnr: float  # of one picture


def round_levels(pixels: np.ndarray) -> np.ndarray:
    """uint8 values to the nearest of 255, 250, 245 and so on."""
    return (255 - np.minimum((255 - pixels.astype(np.int16) + LEVELS // 2) // LEVELS * LEVELS, 255)).astype(np.uint8)


def psnr(squared_error: float) -> float:
    """In dB, of a mean squared error of values of 0 to 255; infinite without an error."""
    return float("inf") if squared_error == 0 else 10 * float(np.log10(255**2 / squared_error))


def encode(picture: Pictures.Image, quality: int) -> tuple[bytes, Measured]:
    """An RGB picture as WebP: lossless and rounded if that is small enough, else lossy."""
    pixels = np.asarray(picture)
    lossy = as_webp(picture, quality=quality)
    rounded = Pictures.fromarray(round_levels(pixels))
    # a fast attempt first: the lossless form of what has smooth shades takes long
    quick = len(as_webp(rounded, lossless=True, quality=0, method=0))
    data, lossless = lossy, False
    if quick < 1.5 * LARGER * len(lossy):
        exact = as_webp(rounded, lossless=True, quality=60)
        if len(exact) <= LARGER * len(lossy):
            data, lossless = exact, True
    with Pictures.open(io.BytesIO(data)) as read:
        error = np.asarray(read.convert("RGB")).astype(np.float64) - pixels
    return data, Measured(len(data), lossless, float(np.mean(error**2)))


def as_webp(picture: Pictures.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "WEBP", **options)
    return file.getvalue()


def pack_features() -> Features:
    """The columns of the file, as `datasets` knows them."""
    columns = {name: Value("string") for name in COLUMNS}
    columns |= {name: List(Value("string")) for name in LISTS} | {name: Value("int64") for name in NUMBERS}
    return Features({"image": Image(), **columns})


def choose_rows(folder: Path, styles: list[str], most_each: int | None = None) -> list[dict[str, Any]]:
    """The rows of the image folder that are packed.

    Args:
        folder (`Path`): What `build_emoji_dataset.py` wrote.
        styles (`list[str]`): Values of the column `style`.
        most_each (`int`, *optional*): Rows of a split in a style, evenly spread over the file.

    Raises:
        ValueError: If there is no such folder, or a style that it lacks.
    """
    path = folder / "metadata.jsonl"
    if not path.is_file():
        raise ValueError(
            f"`data` is '{folder}', which has no metadata.jsonl: scripts/build_emoji_dataset.py writes it."
        )
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["style"] in styles:
            groups.setdefault((row["split"], row["style"]), []).append(row)
    missing = [style for style in styles if style not in {style for _, style in groups}]
    if missing:
        raise ValueError(f"`styles` has {missing[0]!r}, but '{folder}' has {sorted({row['style'] for row in rows})}.")
    if most_each is None:
        return [row for group in groups.values() for row in group]
    return [row for group in groups.values() for row in group[:: max(1, -(-len(group) // most_each))]]


def pack(
    folder: Path, target: Path, styles: list[str], quality: int = 88, most_each: int | None = None
) -> dict[str, StyleReport]:
    """Writes the file; says what became of the pictures of each style. Arguments as those of `choose_rows`.

    Args:
        target (`Path`): The Parquet file, which is whole or absent.
        quality (`int`): Of lossy pictures, 1 to 100.
    """
    rows = choose_rows(folder, styles, most_each)
    notices = {path.name: path.read_text(encoding="utf-8") for path in sorted((folder / "LICENSES").glob("*.txt"))}
    known = pack_features().arrow_schema
    schema = known.with_metadata({**known.metadata, NOTICES: json.dumps(notices).encode()})
    written: dict[str, list[Measured]] = {style: [] for style in styles}
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as partial:
        with parquet.ParquetWriter(partial, schema, compression="zstd", write_statistics=False) as writer:
            for start in range(0, len(rows), ROW_GROUP):
                part = [packed_row(row, folder, quality, written) for row in rows[start : start + ROW_GROUP]]
                writer.write_table(pa.Table.from_pylist(part, schema=schema))
    return {style: report_style(pictures) for style, pictures in written.items()}


def packed_row(row: dict[str, Any], folder: Path, quality: int, written: dict[str, list[Measured]]) -> dict[str, Any]:
    """A row of the file; what its picture took is noted in `written`."""
    data, measured = encode(read_image(str(folder / row["file_name"]), "white"), quality)
    written[row["style"]].append(measured)
    image = {"bytes": data, "path": Path(row["file_name"]).with_suffix(".webp").name}
    return {"image": image, **{name: row[name] for name in (*COLUMNS, *LISTS, *NUMBERS)}}


def report_style(pictures: list[Measured]) -> StyleReport:
    errors = [picture.squared_error for picture in pictures]
    return StyleReport(
        pictures=len(pictures),
        rounded=sum(picture.lossless for picture in pictures),
        bytes=sum(picture.bytes for picture in pictures),
        psnr=psnr(float(np.mean(errors))),
        lowest_psnr=psnr(max(errors)),
    )


def describe_pack(target: Path, report: dict[str, StyleReport]) -> Iterator[str]:
    """What became of the pictures, in lines."""
    for style, found in report.items():
        yield (
            f"{style}: {found.pictures} pictures, {found.rounded} of them lossless but for rounding, "
            f"{found.bytes / 2**20:.1f} MiB, PSNR {found.psnr:.1f} dB, at least {found.lowest_psnr:.1f} dB"
        )
    yield f"{target}: {target.stat().st_size / 2**20:.1f} MiB"


def read_notices(packed: Path) -> dict[str, str]:
    """The notices of the works in a packed file, by file name.

    Raises:
        ValueError: If it is no file that `pack` wrote.
    """
    try:
        metadata = parquet.read_schema(packed).metadata or {}
        return json.loads(metadata[NOTICES])
    except (OSError, KeyError, ValueError, pa.ArrowException):
        raise ValueError(f"`data` is '{packed}', which is no file that --pack wrote.") from None


def write_metadata(packed: Path, folder: Path) -> None:
    """metadata.jsonl and LICENSES/ of a packed file, as the image folder has them, without its pictures."""
    notices = read_notices(packed)
    (folder / "LICENSES").mkdir(parents=True, exist_ok=True)
    for name, text in notices.items():
        write_text(folder / "LICENSES" / Path(name).name, text)
    write_rows(folder, parquet.read_table(packed, columns=[*COLUMNS, *LISTS, *NUMBERS]).to_pylist())


def unpack(packed: Path, folder: Path, splits: dict[str, int]) -> int:
    """Writes some rows of a packed file as an image folder; returns how many.

    Args:
        packed (`Path`): The file.
        folder (`Path`): Which gets `images/` and metadata.jsonl.
        splits (`dict[str, int]`): Rows of each split, at most, evenly spread.
    """
    table = parquet.read_table(packed)
    found: dict[str, list[int]] = {}
    for number, split in enumerate(table["split"].to_pylist()):
        found.setdefault(split, []).append(number)
    chosen = [i for split, most in splits.items() for i in found[split][:: max(1, -(-len(found[split]) // most))]]
    rows = table.take(chosen).to_pylist()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for row in rows:
        image = row.pop("image")
        row["file_name"] = f"images/{Path(image['path']).name}"
        (folder / row["file_name"]).write_bytes(image["bytes"])
    write_rows(folder, rows)
    return len(rows)


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    write_text(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
