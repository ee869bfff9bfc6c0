"""Packing of the emoji set into one Parquet file for training; part of `train_emoji_cascade.py`.

Images are WebP of 256 px on white. For most drawings the lossless format is no larger than the lossy one, if each
channel is rounded to a multiple of 5 counted from white, which changes values by at most 2 of 255; lossy WebP halves
the resolution of colors, which is visible at the edges of drawings. Renders with smooth shades are lossy.

Captions and the other entries of metadata.jsonl are columns; the notices of the works are in the file's metadata.
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
LEVELS = 5  # distance of a channel's values in rounded images
LARGER = 2.0  # maximum ratio of the size of a lossless image to that of the lossy one
ROW_GROUP = 256


class Measured(NamedTuple):
    """Format and error of a packed image."""

    bytes: int
    lossless: bool  # except for rounding
    squared_error: float  # mean over values of 0 to 255


class StyleReport(NamedTuple):
    """Summary of the packed images of a style."""

    pictures: int
    rounded: int  # number of images that are lossless except for rounding
    bytes: int
    psnr: float  # of all pixels, in dB
    lowest_psnr: float  # of a single image


def round_levels(pixels: np.ndarray) -> np.ndarray:
    """Round uint8 values to the nearest of 255, 250, 245 and so on."""
    return (255 - np.minimum((255 - pixels.astype(np.int16) + LEVELS // 2) // LEVELS * LEVELS, 255)).astype(np.uint8)


def psnr(squared_error: float) -> float:
    """Return the PSNR in dB of a mean squared error of values from 0 to 255; infinite without an error."""
    return float("inf") if squared_error == 0 else 10 * float(np.log10(255**2 / squared_error))


def encode(picture: Pictures.Image, quality: int) -> tuple[bytes, Measured]:
    """Encode an RGB image as WebP: lossless and rounded if that is small enough, else lossy."""
    pixels = np.asarray(picture)
    lossy = as_webp(picture, quality=quality)
    rounded = Pictures.fromarray(round_levels(pixels))
    # a fast attempt first: lossless encoding of smooth shades is slow
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
    """Return the columns of the file, as features of `datasets`."""
    columns = {name: Value("string") for name in COLUMNS}
    columns |= {name: List(Value("string")) for name in LISTS} | {name: Value("int64") for name in NUMBERS}
    return Features({"image": Image(), **columns})


def choose_rows(folder: Path, styles: list[str], most_each: int | None = None) -> list[dict[str, Any]]:
    """Return the rows of the image folder to pack.

    Args:
        folder (`Path`): Folder written by `build_emoji_dataset.py`.
        styles (`list[str]`): Values of the column `style`.
        most_each (`int`, *optional*): Maximum rows per split and style, evenly spaced.

    Raises:
        ValueError: If there is no such folder, or it lacks a style.
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
    """Write the file; print a summary of each style. Other arguments are those of `choose_rows`.

    Args:
        target (`Path`): The Parquet file, which is written completely or not at all.
        quality (`int`): Quality of lossy images, 1 to 100.
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
    """Return a row of the file; add its image to the summary in `written`."""
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
    """Return the summary as lines of text."""
    for style, found in report.items():
        yield (
            f"{style}: {found.pictures} images, {found.rounded} of them lossless except for rounding, "
            f"{found.bytes / 2**20:.1f} MiB, PSNR {found.psnr:.1f} dB, at least {found.lowest_psnr:.1f} dB"
        )
    yield f"{target}: {target.stat().st_size / 2**20:.1f} MiB"


def read_notices(packed: Path) -> dict[str, str]:
    """Return the notices of the works in a packed file, by file name.

    Raises:
        ValueError: If the file was not written by `pack`.
    """
    try:
        metadata = parquet.read_schema(packed).metadata or {}
        return json.loads(metadata[NOTICES])
    except (OSError, KeyError, ValueError, pa.ArrowException):
        raise ValueError(f"`data` is '{packed}', which is not a file written by --pack.") from None


def write_metadata(packed: Path, folder: Path) -> None:
    """Write metadata.jsonl and LICENSES/ of a packed file, as in the image folder, without its images."""
    notices = read_notices(packed)
    (folder / "LICENSES").mkdir(parents=True, exist_ok=True)
    for name, text in notices.items():
        write_text(folder / "LICENSES" / Path(name).name, text)
    write_rows(folder, parquet.read_table(packed, columns=[*COLUMNS, *LISTS, *NUMBERS]).to_pylist())


def unpack(packed: Path, folder: Path, splits: dict[str, int]) -> int:
    """Write some rows of a packed file as an image folder; return their number.

    Args:
        packed (`Path`): The file.
        folder (`Path`): Folder for `images/` and metadata.jsonl.
        splits (`dict[str, int]`): Maximum rows per split, evenly spaced.
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
