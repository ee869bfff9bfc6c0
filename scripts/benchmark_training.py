#!/usr/bin/env python
"""Benchmark the overhead of the training loop over forward, backward and optimizer, and the speed of cached data.

    python scripts/benchmark_training.py --preset emoji_base_64 --resolution 64 --train_batch_size 16

Steps of the loop and of a bare one (same network, one fixed batch, no averages, no clipping, no random numbers)
alternate in one process, so that other load affects both. Images and captions are noise.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from diffusers_imagen.commands.parser import Parser, check_numbers
from diffusers_imagen.models.presets import create_unet
from diffusers_imagen.text.cache import CacheWriter, EmbeddingCache
from diffusers_imagen.training import Trainer, TrainingConfig
from diffusers_imagen.training.data import make_train_batches
from diffusers_imagen.training.objective.losses import to_device
from diffusers_imagen.utils.errors import run_to_exit_code


NUM_IMAGES = 256


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="emoji_base_64")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--low_resolution", type=int)
    parser.add_argument("--crop_size", type=int)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="bf16")
    parser.add_number("--tokens", int, 3, 4096, default=32, help="tokens per caption; default: %(default)s")
    parser.add_number("--steps", int, 1, 10**6, default=20, help="timed steps of each loop; default: %(default)s")
    args = parser.parse_args()
    check_numbers(args)
    return args


def write_data(folder: Path, resolution: int, tokens: int, width: int) -> None:
    """Write noise as images, and as text embeddings in an embedding cache."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    (folder / "data").mkdir()
    rows = []
    with CacheWriter(folder / "cache", {"width": width, "max_length": tokens}, "bfloat16", 2**27) as writer:
        for i in range(NUM_IMAGES):
            Image.fromarray(rng.integers(0, 256, (resolution, resolution, 3), dtype=np.uint8)).save(
                folder / "data" / f"{i}.png"
            )
            rows.append({"file_name": f"{i}.png", "text": f"caption {i}"})
            length = 2 + i % (tokens - 1)
            writer.add([f"caption {i}"], [torch.randn(length, width, generator=generator)])
        writer.flush()
    (folder / "data" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_bare_step(trainer: Trainer, preset: str) -> Callable[[], None]:
    """Return a step of forward, backward and optimizer on one fixed batch."""
    device = trainer.accelerator.device
    unet = create_unet(preset).at_resolution(trainer.config.resolution).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(unet.train().parameters(), lr=1e-4, fused=True)
    stream = make_train_batches(trainer.config, EmbeddingCache(trainer.config.embedding_cache))
    batch = to_device(next(stream), device)
    low_res_timestep = torch.zeros(len(batch.images), device=device) if batch.low_res is not None else None
    timestep = torch.zeros(len(batch.images), device=device)

    def step() -> None:
        with trainer.accelerator.autocast():
            output = unet(
                batch.images, timestep, batch.text, batch.text_mask, batch.low_res, low_res_timestep, return_dict=False
            )[0]
        (output.float() - batch.images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(function: Callable[[], None]) -> tuple[float, float]:
    """Return wall-clock seconds and this process's CPU seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter(), time.process_time()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def data_rate(config: TrainingConfig, in_memory: bool, batches: int = 20) -> float:
    """Return images per second with the embedding cache and images from memory or from files."""
    config.in_memory = in_memory
    stream = make_train_batches(config, EmbeddingCache(config.embedding_cache))
    next(stream)
    seconds, _ = timed(lambda: [next(stream) for _ in range(batches)])
    stream.close()
    return batches * config.train_batch_size / seconds


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unet = create_unet(args.preset).at_resolution(args.resolution)
        write_data(folder, args.resolution, args.tokens, unet.config.encoder_hid_dim)
        settings = {key: value for key, value in vars(args).items() if key not in ("steps", "tokens", "ranges")}
        config = TrainingConfig(
            **settings,
            train_data_dir=str(folder / "data"),
            cache_dir=str(folder / "datasets"),
            embedding_cache=str(folder / "cache"),
            output_dir=str(folder / "run"),
            max_train_steps=10**6,
        )
        trainer = Trainer(config, unet)
        trainer.prepare()
        trainer.start()
        progress = trainer.progress_bar(0)
        bare_step = make_bare_step(trainer, args.preset)

        def step() -> None:
            trainer.train_step(step.done)
            step.done += 1
            if step.done % config.logging_steps == 0:
                trainer.log(step.done, progress)

        step.done = 0
        pairs = [(timed(step), timed(bare_step)) for _ in range(args.steps + 2)][2:]
        progress.close()
        for i, clock in enumerate(("clock", "CPU time")):
            ours, bare = (median(pair[j][i] for pair in pairs) for j in (0, 1))
            print(
                f"{clock}: a step takes {1000 * ours:.1f} ms, a bare one {1000 * bare:.1f} ms: {ours / bare - 1:+.1%}; "
                f"{args.train_batch_size / ours:.1f} images/s"
            )
        for in_memory, source in ((True, "memory"), (False, "files")):
            print(f"data from {source} and cached embeddings: {data_rate(config, in_memory):.0f} images/s")


if __name__ == "__main__":
    sys.exit(run_to_exit_code(main, "benchmark_training.py"))
