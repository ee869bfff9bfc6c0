"""A trained network as a stage folder: `unet/`, `scheduler/`, and what it was trained with."""

import json
from dataclasses import asdict
from pathlib import Path

from ..models.unet_base import ConditionalUNet
from ..schedulers import EDMHeunScheduler
from .config import TrainingConfig


def save_stage(unet: ConditionalUNet, config: TrainingConfig, step: int, losses: dict[str, float]) -> None:
    """Writes the network and the scheduler it was trained for to `config.output_dir`."""
    folder = Path(config.output_dir)
    unet.save_pretrained(folder / "unet")
    EDMHeunScheduler(sigma_data=config.sigma_data).save_pretrained(folder / "scheduler")
    record = {"step": step, **losses, "config": asdict(config)}
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
