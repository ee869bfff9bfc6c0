"""Checkpoints: all that a run needs to go on as if it had never stopped.

A checkpoint is written beside its place and moved there when it is whole. `checkpoint.json` in it says which files
there are and how long they are, and what kind of run they belong to.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Optional, Protocol

import torch
from accelerate import Accelerator
from diffusers.utils import logging

from ..models.unet_base import ConditionalUNet
from .config import TrainingConfig


logger = logging.get_logger(__name__)

MANIFEST = "checkpoint.json"
# what a run cannot change and go on; everything else, such as the learning rate, it can
FIXED = ("preconditioning", "sigma_data", "prediction_type", "beta_schedule", "uncertainty_weighting")
FIXED_STATE = ("use_ema", "ema_type", "ema_stds", "use_8bit_adam", "low_resolution")


class Stateful(Protocol):
    """What has a state of its own in every process."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def describe_run(config: TrainingConfig, unet: ConditionalUNet, mixed_precision: str) -> dict[str, Any]:
    """What must agree between a checkpoint and the run that goes on with it."""
    network = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    settings = {name: getattr(config, name) for name in FIXED + FIXED_STATE}
    settings["fp16"] = mixed_precision == "fp16"  # which alone has a gradient scaler
    description = {"network": type(unet).__name__, **{f"unet {key}": value for key, value in network.items()}}
    return json.loads(json.dumps({**description, **settings}))


class Checkpoints:
    """Saves and loads the checkpoints of a run.

    Args:
        accelerator (`Accelerator`): Whose prepared and registered objects are saved.
        config (`TrainingConfig`): Where, and how many.
        run (`dict`): As `describe_run` says.
    """

    def __init__(self, accelerator: Accelerator, config: TrainingConfig, run: dict[str, Any]):
        self.accelerator, self.run = accelerator, run
        self.output_dir = Path(config.output_dir)
        self.limit = config.checkpoints_total_limit
        self.saved: Optional[int] = None  # the last step saved or loaded

    def save(self, step: int, states: dict[str, Stateful]) -> Path:
        """Writes a checkpoint and removes the oldest ones; `states` are those that each process has for itself."""
        folder = self.output_dir / f"checkpoint-{step}"
        partial = folder.with_name(folder.name + ".partial")
        if self.accelerator.is_main_process:
            for leftover in self.output_dir.glob("checkpoint-*.partial"):
                shutil.rmtree(leftover)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        own = {name: state.state_dict() for name, state in states.items()}
        torch.save(own, partial / process_file(self.accelerator.process_index))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            seal(partial, {"step": step, "run": self.run})
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
            for old in list_checkpoints(self.output_dir)[: -self.limit]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
        self.saved = step
        return folder

    def find(self, name: Optional[str]) -> Optional[Path]:
        """The checkpoint that a configuration asks for, checked; None if it asks for none, or the latest of none.

        Raises:
            ValueError: If it is none, incomplete, or of another run.
        """
        if name is None:
            return None
        if name != "latest":
            folder = Path(name)
            if not folder.is_dir():
                raise ValueError(f"`resume_from_checkpoint` is {name!r}, which is no folder.")
            problem = find_damage(folder)
            if problem is not None:
                raise ValueError(f"`resume_from_checkpoint` is {name!r}, which is damaged: {problem}.")
            self._check_run(folder)
            return folder
        for folder in reversed(list_checkpoints(self.output_dir)):
            problem = find_damage(folder)
            if problem is None:
                self._check_run(folder)
                return folder
            logger.warning(f"{folder} is damaged ({problem}): going on with the one before.")
        logger.info(f"No checkpoint in {self.output_dir}: starting from the beginning.")
        return None

    def load(self, folder: Path, states: dict[str, Stateful]) -> int:
        """Loads a checkpoint; returns the step to go on with."""
        self.accelerator.load_state(str(folder))
        own = folder / process_file(self.accelerator.process_index)
        # a process that the saved run did not have begins with what the first one knew
        saved = torch.load(own if own.is_file() else folder / process_file(0), weights_only=True, map_location="cpu")
        for name, state in states.items():
            state.load_state_dict(saved[name])
        self.saved = json.loads((folder / MANIFEST).read_text())["step"]
        return self.saved

    def _check_run(self, folder: Path) -> None:
        saved = json.loads((folder / MANIFEST).read_text())["run"]
        for key in self.run | saved:
            if saved.get(key) != self.run.get(key):
                raise ValueError(
                    f"`resume_from_checkpoint`: {folder} was trained with {key} {saved.get(key)!r}, but this run has "
                    f"{self.run.get(key)!r}. To train its weights on in another run, give the stage as "
                    "`pretrained_model_name_or_path`."
                )


def process_file(index: int) -> str:
    return f"process-{index}.pt"


def list_checkpoints(output_dir: Path | str) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(folders, key=lambda path: int(path.name.split("-")[1]))


def seal(folder: Path, record: dict[str, Any]) -> None:
    """Writes down which files a checkpoint has, when all of them are on the disk."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            files[str(path.relative_to(folder))] = path.stat().st_size
    with open(folder / MANIFEST, "w") as file:
        json.dump({**record, "files": files}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def find_damage(folder: Path) -> Optional[str]:
    """What is wrong with a checkpoint's files; None if nothing is."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"it has no {MANIFEST}"
    for name, size in files.items():
        path = folder / name
        actual = path.stat().st_size if path.is_file() else None
        if actual != size:
            return f"{name} is missing" if actual is None else f"{name} has {actual} bytes, not {size}"
    return None
