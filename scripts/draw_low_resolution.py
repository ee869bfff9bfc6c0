#!/usr/bin/env python
"""Writes pairs of images and low-resolution images, of which a part is drawn by a base stage, to train super-resolution.

    python scripts/draw_low_resolution.py --pretrained_model_name_or_path checkpoints/imagen-emoji \
        --train_data_dir data/emoji --styles 3d flat noto --num_drawn 3000 --output_dir data/emoji-pairs

A super-resolution stage that saw clean reductions alone takes every flaw of the stage below for detail. Here the base
stage draws an image's reduction anew from some noise on (image to image): what is shown stays where it is, and its edges
and colours become those of the base stage. The Parquet files are read with `--low_resolution_column low_res`; they have
every row of the data set with its reduction, and after those the drawn ones.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tqdm.auto import tqdm

from diffusers_imagen import ImagenCascadePipeline
from diffusers_imagen.training.data.pixels import fit_image, read_image
from diffusers_imagen.utils.errors import run_to_exit_code
from diffusers_imagen.utils.files import check_writable, whole_folder


ROWS_IN_A_GROUP = 256
STRENGTHS = (0.2, 0.3, 0.4)  # of image to image: from noise of 0.2, 0.6 and 1.5 on, with 10 steps


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--pretrained_model_name_or_path", type=Path, required=True, help="a cascade")
    parser.add_argument("--train_data_dir", type=Path, required=True, help="folder with a metadata.jsonl")
    parser.add_argument("--styles", nargs="+", help="keep rows of these styles only")
    parser.add_argument("--train_split", default="train", help="split whose rows are drawn anew")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--num_drawn", type=int, default=3000, help="pictures that are drawn, with captions by turns")
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    check_writable(args.output_dir, "output_dir")
    if args.output_dir.exists():
        raise ValueError(f"`output_dir` is '{args.output_dir}', which exists already.")
    if not (args.train_data_dir / "metadata.jsonl").is_file():
        raise ValueError(f"`train_data_dir` is '{args.train_data_dir}', which has no metadata.jsonl.")
    return args


def read_rows(args: argparse.Namespace) -> list[dict]:
    with open(args.train_data_dir / "metadata.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [row for row in rows if args.styles is None or row["style"] in args.styles]


def png(pixels: np.ndarray) -> dict:
    """Return an image as a cell of a data set."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def pair(args: argparse.Namespace, row: dict, low_resolution: int, drawn: np.ndarray | None = None) -> dict:
    """Return a row with its image and what is upsampled: `drawn` `(h, w, 3)` uint8, or the image's reduction."""
    image = read_image(row["file_name"], str(args.train_data_dir), "white")
    pixels = fit_image(image, args.resolution, args.resolution)
    if drawn is None:
        drawn = fit_image(Image.fromarray(pixels), low_resolution, low_resolution)
    given = {name: row[name] for name in ("text", "label", "tags", "style", "concept", "split")}
    return {**given, "image": png(pixels), "low_res": png(drawn)}


def draw(args: argparse.Namespace, rows: list[dict], pipe: ImagenCascadePipeline) -> Iterator[dict]:
    """Rows whose reductions the base stage draws anew, in random order."""
    side = pipe.base_unet.resolution
    order = np.random.default_rng(args.seed).permutation(len(rows))
    chosen = [rows[order[i % len(rows)]] for i in range(args.num_drawn)]
    pipe.set_progress_bar_config(disable=True)
    for number, start in enumerate(tqdm(range(0, len(chosen), args.batch_size), desc="Drawing")):
        some = chosen[start : start + args.batch_size]
        images = [read_image(row["file_name"], str(args.train_data_dir), "white") for row in some]
        drawn = pipe(
            [row["text"] for row in some],
            image=[Image.fromarray(fit_image(image, side, side)) for image in images],
            strength=STRENGTHS[number % len(STRENGTHS)],
            num_inference_steps=args.num_inference_steps,
            output_resolution=side,
            output_type="pil",
            generator=[torch.Generator().manual_seed(args.seed + start + i) for i in range(len(some))],
        ).images
        yield from (pair(args, row, side, np.asarray(image)) for row, image in zip(some, drawn))


def write(path: Path, rows: Iterator[dict]) -> int:
    """Write rows as a Parquet file, a group at a time; returns how many."""
    writer, group, count = None, [], 0
    for row in rows:
        group.append(row)
        if len(group) == ROWS_IN_A_GROUP:
            writer, group, count = append(path, writer, group), [], count + len(group)
    if group:
        writer, count = append(path, writer, group), count + len(group)
    if writer is not None:
        writer.close()
    return count


def append(path: Path, writer: pq.ParquetWriter | None, rows: list[dict]) -> pq.ParquetWriter:
    table = pa.Table.from_pylist(rows)
    writer = pq.ParquetWriter(path, table.schema) if writer is None else writer
    writer.write_table(table.cast(writer.schema))
    return writer


def main() -> None:
    args = parse_args()
    rows = read_rows(args)
    pipe = ImagenCascadePipeline.from_pretrained(args.pretrained_model_name_or_path)
    side = pipe.base_unet.resolution
    with whole_folder(args.output_dir) as folder:
        given = (pair(args, row, side) for row in tqdm(rows, desc="Reducing"))
        count = write(folder / "given.parquet", given)
        drawn = write(folder / "drawn.parquet", draw(args, [r for r in rows if r["split"] == args.train_split], pipe))
    print(f"{args.output_dir}: {count:,} rows with their reductions, {drawn:,} with drawn low-resolution images")


if __name__ == "__main__":
    sys.exit(run_to_exit_code(main, "draw_low_resolution.py"))
