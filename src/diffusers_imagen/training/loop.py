"""The training loop of one stage: draw a batch, take the loss, step, average the weights, save.

Every draw of a step comes from a generator seeded by (seed, process, step), so that a resumed run continues with the
draws of a run that was never stopped, without storing any random state.
"""

import json
import math
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, Optional

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import logging
from tqdm.auto import tqdm

from ..models.unet_base import ConditionalUNet
from .checks import check_network, check_width
from .config import TrainingConfig
from .data import Batch, BatchStream, ValidationBatches, make_train_batches, make_validation_batches
from .export import save_stage
from .losses import edm_loss


logger = logging.get_logger(__name__)

VALIDATION_STEP = 2**32 - 1  # no training step has this number: validation draws are never those of a step


def train(
    config: TrainingConfig, unet: ConditionalUNet, encode: Optional[Callable[[list[str]], tuple]] = None
) -> dict[str, float]:
    """Trains a network and writes the stage to `config.output_dir`; returns the last losses.

    Args:
        config: The settings.
        unet: The network, trained in place.
        encode: Maps a list of captions to text states `(B, L, E)` and mask `(B, L)`; None trains without text.
    """
    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        log_with=config.report_to,
        project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=f"{config.output_dir}/logs"),
    )
    check_network(config, unet, encode is not None or config.embedding_cache is not None)
    place = (accelerator.process_index, accelerator.num_processes)
    batches = make_train_batches(config, encode, *place)
    validation = make_validation_batches(config, encode, *place) if config.validation_split else None
    check_width(unet, batches.text_width)
    release_encoder(encode, batches, validation)

    unet.train().to(memory_format=torch.channels_last)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    ema = EMAModel(unet.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    optimizer = make_optimizer(config, unet)
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=config.max_train_steps * accelerator.num_processes,
    )
    unet, optimizer, lr_scheduler = accelerator.prepare(unet, optimizer, lr_scheduler)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema, batches)
    if config.report_to:
        accelerator.init_trackers("diffusers-imagen", {k: str(v) for k, v in vars(config).items()})

    first_step = resume(accelerator, config)
    losses = {"loss": math.nan}
    progress = tqdm(
        range(first_step, config.max_train_steps),
        initial=first_step,
        total=config.max_train_steps,
        desc="Training",
        disable=not accelerator.is_local_main_process,
        mininterval=10,
    )
    for step in progress:
        loss = train_step(accelerator, config, unet, batches, optimizer, lr_scheduler, step)
        ema.step(unet.parameters())
        # the average over about 100 steps; a single batch says little
        losses["loss"] = loss if math.isnan(losses["loss"]) else losses["loss"] + 0.01 * (loss - losses["loss"])
        progress.set_postfix(loss=f"{losses['loss']:.4f}", refresh=False)
        accelerator.log({"loss": loss, "lr": lr_scheduler.get_last_lr()[0]}, step=step)

        done = step + 1
        if done % config.checkpointing_steps == 0 or done == config.max_train_steps:
            if validation is not None:
                losses["validation_loss"] = validation_loss(accelerator, config, unet, ema, validation)
                accelerator.log({"validation_loss": losses["validation_loss"]}, step=step)
            save_checkpoint(accelerator, config, done, losses)
            export(accelerator, config, unet, ema, done, losses)
    accelerator.end_training()
    return losses


def release_encoder(encode, *streams: Optional[BatchStream | ValidationBatches]) -> None:
    """Takes the text encoder out of memory where no stream needs it while batches are drawn."""
    if hasattr(encode, "release") and not any(stream is not None and stream.needs_encoder for stream in streams):
        encode.release()


def make_optimizer(config: TrainingConfig, unet: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW in its fused form."""
    return torch.optim.AdamW(
        unet.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )


def step_generator(accelerator: Accelerator, config: TrainingConfig, step: int) -> torch.Generator:
    """The generator of one step on one process."""
    seed = np.random.SeedSequence((config.seed, accelerator.process_index, step)).generate_state(1, np.uint64).item()
    return torch.Generator("cpu").manual_seed(seed)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Moves the tensors of a batch; images in channels_last."""
    batch = Batch(*(None if x is None else x.to(device, non_blocking=True) for x in batch))
    return batch._replace(images=batch.images.contiguous(memory_format=torch.channels_last))


def train_step(accelerator, config, unet, batches, optimizer, lr_scheduler, step: int) -> float:
    """One optimizer step over all accumulated batches; returns their mean loss."""
    generator = step_generator(accelerator, config, step)
    total = 0.0
    for _ in range(config.gradient_accumulation_steps):
        with accelerator.accumulate(unet):
            batch = to_device(next(batches), accelerator.device)
            with accelerator.autocast():
                loss = edm_loss(unet, batch, config, generator).mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            total += loss.detach()
    return (total / config.gradient_accumulation_steps).item()


@contextmanager
def averaged_weights(unet: torch.nn.Module, ema: EMAModel) -> Iterator[None]:
    """The network has the averaged weights inside, and its own again after."""
    ema.store(unet.parameters())
    ema.copy_to(unet.parameters())
    try:
        yield
    finally:
        ema.restore(unet.parameters())


@torch.no_grad()
def validation_loss(accelerator, config, unet, ema: EMAModel, batches: ValidationBatches) -> float:
    """Loss of the averaged weights on held-out rows, with the same rows and noise at every call."""
    generator = step_generator(accelerator, config, VALIDATION_STEP)
    unet.eval()
    losses = []
    with averaged_weights(unet, ema):
        for batch in batches:
            batch = to_device(batch, accelerator.device)
            with accelerator.autocast():
                losses.append(edm_loss(unet, batch, config, generator))
    unet.train()
    return accelerator.gather(torch.cat(losses)).mean().item()


def save_checkpoint(accelerator: Accelerator, config: TrainingConfig, step: int, losses: dict[str, float]) -> None:
    """Writes all that a resumed run needs, beside its place and then into it; removes the oldest ones."""
    folder = Path(config.output_dir) / f"checkpoint-{step}"
    partial = folder.with_name(folder.name + ".partial")
    accelerator.save_state(str(partial))
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        for old in checkpoints(config.output_dir)[: -config.checkpoints_total_limit]:
            shutil.rmtree(old)
        with open(Path(config.output_dir) / "losses.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **losses}) + "\n")
    accelerator.wait_for_everyone()


def checkpoints(output_dir: str) -> list[Path]:
    """Complete checkpoints, oldest first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.suffix != ".partial"]
    return sorted(folders, key=lambda path: int(path.name.split("-")[1]))


def resume(accelerator: Accelerator, config: TrainingConfig) -> int:
    """Loads the checkpoint that the configuration asks for; returns the step to go on with."""
    if config.resume_from_checkpoint is None:
        return 0
    folder = Path(config.resume_from_checkpoint)
    if config.resume_from_checkpoint == "latest":
        found = checkpoints(config.output_dir)
        if not found:
            logger.info(f"No checkpoint in {config.output_dir}: starting from the beginning.")
            return 0
        folder = found[-1]
    elif not folder.is_dir():
        raise ValueError(f"`resume_from_checkpoint` is {config.resume_from_checkpoint!r}, which is no folder.")
    accelerator.load_state(str(folder))
    return int(folder.name.split("-")[1])


def export(accelerator, config, unet, ema: EMAModel, step: int, losses: dict[str, float]) -> None:
    """Writes the averaged weights as a stage folder."""
    if accelerator.is_main_process:
        with averaged_weights(unet, ema):
            save_stage(accelerator.unwrap_model(unet), config, step, losses)
    accelerator.wait_for_everyone()
