"""The training loop that the benchmark compares with a bare forward, backward and optimizer step, and its data.

Steps of the loop and of a bare one (same network, one fixed batch, no averages, no clipping, no random numbers) take
turns, so that other load affects both. Images and captions are noise.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_measures import Case, Group
from PIL import Image

from diffusers_imagen.models.presets import create_unet
from diffusers_imagen.models.unet_base import ConditionalUNet
from diffusers_imagen.text.cache import EmbeddingCache
from diffusers_imagen.text.cache_writer import CacheWriter
from diffusers_imagen.training import Trainer, TrainingConfig
from diffusers_imagen.training.data import make_train_batches
from diffusers_imagen.training.objective.losses import to_device


NUM_IMAGES = 256
PRECISIONS = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}


def loop_group(preset: str, settings: Any, batch_size: int) -> Group:
    """Return the group of a preset's training loop."""
    return Group("loop", preset, batch_size, lambda: loop_cases(preset, settings, batch_size))


def loop_cases(preset: str, settings: Any, batch_size: int) -> list[Case]:
    unet = create_unet(preset, **settings.overrides)
    folder = tempfile.TemporaryDirectory()  # removed with the last case that refers to it
    trainer = make_trainer(preset, unet, settings, batch_size, Path(folder.name))

    def loop() -> Callable[[], None]:
        trainer.prepare()
        if trainer.accelerator.device.type != settings.device.type:
            raise ValueError(f"training runs on {trainer.accelerator.device}, not on {settings.device}")
        trainer.start()
        progress, done = trainer.progress_bar(0), iter(range(10**9))

        def step() -> None:
            i = next(done)
            trainer.train_step(i)
            if (i + 1) % trainer.config.logging_steps == 0:
                trainer.log(i + 1, progress)

        step.folder = folder
        return step

    return [
        Case("ours", loop, note="the training loop"),
        Case("bare", lambda: make_bare_step(trainer, create_unet(preset, **settings.overrides)), note="a bare step"),
        *(
            Case(f"data from {name}", lambda name=name: data(trainer.config, name == "memory"))
            for name in ("memory", "files")
        ),
    ]


def make_trainer(preset: str, unet: ConditionalUNet, settings: Any, batch_size: int, folder: Path) -> Trainer:
    """Write data for a network, and return a trainer of it."""
    side = unet.config.sample_size
    write_data(folder, side, settings.tokens, unet.config.encoder_hid_dim or 8)
    config = TrainingConfig(
        preset=preset,
        resolution=side,
        low_resolution=side // 4 if unet.config.low_res_conditioning else None,
        train_batch_size=batch_size,
        mixed_precision=PRECISIONS[settings.dtype],
        train_data_dir=str(folder / "data"),
        cache_dir=str(folder / "datasets"),
        embedding_cache=str(folder / "cache"),
        output_dir=str(folder / "run"),
        max_train_steps=10**6,
    )
    return Trainer(config, unet)


def data(config: TrainingConfig, in_memory: bool) -> Callable[[], Any]:
    """Return a function that reads a batch of cached text and of images, from memory or from files."""
    config.in_memory = in_memory
    stream: Iterator = make_train_batches(config, EmbeddingCache(config.embedding_cache))
    return lambda: next(stream)


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


def make_bare_step(trainer: Trainer, unet: ConditionalUNet) -> Callable[[], None]:
    """Return a step of forward, backward and optimizer on one fixed batch."""
    device = trainer.accelerator.device
    unet.to(device, memory_format=torch.channels_last)
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
