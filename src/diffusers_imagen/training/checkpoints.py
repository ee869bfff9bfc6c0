"""Checkpoints of a run, from which training is resumed exactly.

A checkpoint is written next to its final path and moved there when it is complete. Its `checkpoint.json` contains the
list of files with their sizes and SHA-256, and a description of the run. All files are safetensors, which cannot
contain code.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from accelerate import Accelerator
from diffusers.utils import logging

from ..utils.errors import one_line
from ..utils.files import read_json_object, remove, sha256, sync, write_json
from .config import TrainingConfig
from .run_identity import changeable_settings, describe_changes, find_difference
from .states import SavedStates, check_deepspeed_files, load_state, save_state


logger = logging.get_logger(__name__)

MANIFEST = "checkpoint.json"
FORMAT = 3  # format 1 used pickles, and format 2 other names of settings
OWN_DIGEST = "sha256"  # digest of the manifest, stored in the manifest
NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})")
DEEPSPEED = "deepspeed"  # the folder of files that DeepSpeed writes
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError)


class Stateful(Protocol):
    """Object with a state of dictionaries, lists, numbers, strings and tensors, which can be saved."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class StatefulTogether(Protocol):
    """Object whose state is loaded from those of all processes, of which there may have been other numbers."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None: ...


class Found(NamedTuple):
    """The checkpoint that a run resumes from, and newer ones that are damaged."""

    folder: Path | None
    step: int = 0
    damaged: tuple[Path, ...] = ()


class Checkpoints:
    """Saves and loads the checkpoints of a run.

    Args:
        accelerator (`Accelerator`): The processes of the run.
        config (`TrainingConfig`): Configuration with the folder and the number of checkpoints.
        run (`dict`): Description of the run, as returned by `describe_run`, which a checkpoint must match.

    Attributes:
        shared (`dict[str, Stateful]`): States that are the same in all processes, written by the main process.
        own (`dict[str, Stateful]`): States that differ between processes; one that has `load_state_dicts` is loaded
            from those of all processes.
        engine: DeepSpeed's engine, which writes weights and moments itself; else None.
    """

    def __init__(self, accelerator: Accelerator, config: TrainingConfig, run: dict[str, Any]):
        self.accelerator, self.config, self.run = accelerator, config, run
        self.output_dir = Path(config.output_dir)
        self.limit = config.checkpoints_total_limit
        self.saved: Path | None = None  # the checkpoint that was last saved or loaded
        self.shared: dict[str, Stateful] = {}
        self.own: dict[str, Stateful | StatefulTogether] = {}
        self.engine: Any | None = None

    def save(self, step: int) -> Path:
        """Write a checkpoint, and remove the oldest ones; checkpoints of this or a later step are kept."""
        folder = self.output_dir / f"checkpoint-{step}"
        partial = folder.with_name(f".{folder.name}.partial")
        main = self.accelerator.is_main_process
        try:
            if main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self._write(partial)
            self.accelerator.wait_for_everyone()
            if main:
                record = {"format": FORMAT, "step": step, "run": self.run}
                seal(partial, {**record, "settings": changeable_settings(self.config)})
                remove(folder)
                os.replace(partial, folder)
                older = [path for path in list_checkpoints(self.output_dir) if number_of(path) < step]
                for path in older[: max(0, len(older) + 1 - self.limit)]:
                    remove(path)
        except BaseException:
            if main:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()
        self.saved = folder
        return folder

    def _write(self, folder: Path) -> None:
        if self.engine is not None:
            self.engine.save_checkpoint(str(folder / DEEPSPEED), "state")
        if self.accelerator.is_main_process:
            for name, state in self.shared.items():
                save_state(folder / f"{name}.safetensors", state.state_dict())
        own = {name: state.state_dict() for name, state in self.own.items()}
        save_state(folder / process_file(self.accelerator.process_index), own)

    def find(self, thoroughly: bool = False) -> Found:
        """
        Find and check the checkpoint that the configuration selects; none if it selects none, or there is no latest
        one.

        Args:
            thoroughly (`bool`): Whether to check the content of files too, which reads them.

        Raises:
            ValueError: If it is not a checkpoint, damaged, of another run, or later than this run's last step.
        """
        name = self.config.resume_from_checkpoint
        if name is None:
            return Found(None)
        if name != "latest":
            folder = Path(name)
            if Path(name).name == name and not folder.exists():  # by its name, as in diffusers' training scripts
                folder = Path(self.output_dir) / name
            if not folder.is_dir() or not (NAME.fullmatch(folder.name) or (folder / MANIFEST).exists()):
                raise ValueError(
                    f"`resume_from_checkpoint` is {name!r}, but should be 'latest' or the folder of a checkpoint, such "
                    f"as '{self.output_dir}/checkpoint-500'."
                )
            problem = find_damage(folder, thoroughly)
            if problem is not None:
                raise ValueError(f"`resume_from_checkpoint` is {name!r}, which is damaged: {problem}.")
            return self._found(folder, partly=not thoroughly)
        damaged: list[Path] = []
        for folder in reversed(list_checkpoints(self.output_dir)):
            problem = find_damage(folder, thoroughly)
            if problem is None:
                return self._found(folder, partly=not thoroughly)._replace(damaged=tuple(damaged))
            if thoroughly:
                logger.warning(f"{folder} is damaged ({problem}): resuming from the previous checkpoint.")
            damaged.append(folder)
        if thoroughly:
            logger.info(f"No checkpoint in {self.output_dir}: starting from the beginning.")
        return Found(None, damaged=tuple(damaged))

    def load(self, folder: Path) -> None:
        """Load a complete checkpoint.

        Raises:
            ValueError: If its files do not contain the state of such a run.
        """
        files = read_json_object(folder / MANIFEST)["files"]
        processes = [folder / file for file in takewhile(files.__contains__, map(process_file, count()))]
        own = process_file(self.accelerator.process_index)
        if own not in files:  # a process that the saved run did not have starts with the state of the first one
            own = process_file(0)
        try:
            for name in (own, *(f"{name}.safetensors" for name in self.shared)):
                if name not in files:
                    raise ValueError(f"{MANIFEST} has no {name}")
            if self.engine is not None:
                check_deepspeed_files(folder / DEEPSPEED)
                self.engine.load_checkpoint(str(folder / DEEPSPEED), "state")
            for name, state in self.shared.items():
                state.load_state_dict(load_state(folder / f"{name}.safetensors"))
            saved = load_state(folder / own)
            for name, part in self.own.items():
                if isinstance(part, StatefulTogether):
                    part.load_state_dicts(SavedStates(processes, name))
                else:
                    part.load_state_dict(saved[name])
        except MALFORMED as error:
            raise ValueError(
                f"`resume_from_checkpoint`: {folder} does not contain the state of this run: {one_line(error)}"
            ) from error
        self.saved = folder

    def _found(self, folder: Path, partly: bool) -> Found:
        manifest = read_json_object(folder / MANIFEST)
        if is_of_another_version(manifest):
            raise ValueError(
                f"`resume_from_checkpoint`: {folder} was written by another version of diffusers-imagen. To continue "
                "training from its weights, pass the stage as `pretrained_model_name_or_path`."
            )
        difference = find_difference(manifest["run"], self.run, partly)
        if difference is not None:
            raise ValueError(
                f"`resume_from_checkpoint`: {folder} {difference}. To continue training from its weights in another "
                "run, pass the stage as `pretrained_model_name_or_path`."
            )
        step, last = manifest["step"], self.config.max_train_steps
        if step > last:
            raise ValueError(
                f"`max_train_steps` is {last}, but {folder} is of step {step}: set a later last step, or choose an "
                "earlier checkpoint."
            )
        if not partly:
            changes = describe_changes(manifest["settings"], changeable_settings(self.config))
            logger.info(f"Resuming from {folder}" + (f", with {changes}" if changes else ""))
        return Found(folder, step)


def process_file(index: int) -> str:
    return f"process-{index}.safetensors"


def number_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def list_checkpoints(output_dir: Path | str) -> list[Path]:
    """Return the checkpoints of a run, oldest first, whether complete or not."""
    return sorted((path for path in Path(output_dir).glob("checkpoint-*") if NAME.fullmatch(path.name)), key=number_of)


def seal(folder: Path, record: dict[str, Any]) -> None:
    """Write the manifest of a checkpoint's files, after all of them are on the disk."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sync(path)
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    manifest = {**record, "files": files}
    write_json(folder / MANIFEST, {**manifest, OWN_DIGEST: digest_of(manifest)})


def digest_of(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of the content of a checkpoint.json, excluding the digest itself."""
    content = {key: value for key, value in manifest.items() if key != OWN_DIGEST}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_of_another_version(manifest: dict[str, Any]) -> bool:
    """Return whether a checkpoint.json is complete but has another format; format 1 contains only sizes."""
    files = manifest.get("files")
    if OWN_DIGEST not in manifest:
        return "run" in manifest and isinstance(files, dict) and all(isinstance(size, int) for size in files.values())
    return manifest[OWN_DIGEST] == digest_of(manifest) and manifest.get("format") != FORMAT


def find_damage(folder: Path, thoroughly: bool = True) -> str | None:
    """Return a description of what is wrong with a checkpoint's files; None if they are valid.

    Args:
        folder (`Path`): The checkpoint.
        thoroughly (`bool`): Whether to check the content of files, not only their sizes.
    """
    if not (folder / MANIFEST).is_file():
        return f"it has no {MANIFEST}"
    try:
        manifest = read_json_object(folder / MANIFEST)
    except ValueError as error:
        return str(error).rstrip(".")
    if is_of_another_version(manifest):
        return None
    problem = find_malformed(manifest, folder)
    if problem is not None:
        return f"{MANIFEST} is malformed: {problem}"
    for name, expected in manifest["files"].items():
        path = folder / name
        actual = path.stat().st_size if path.is_file() else None
        if actual != expected["bytes"]:
            return f"{name} is missing" if actual is None else f"{name} has {actual} bytes, not {expected['bytes']}"
        if thoroughly and sha256(path) != expected["sha256"]:
            return f"{name} has another SHA-256 than in {MANIFEST}"
    return None


def find_malformed(manifest: dict[str, Any], folder: Path) -> str | None:
    """Return a description of what is malformed in a checkpoint.json; None if it is valid."""
    if manifest.get(OWN_DIGEST) != digest_of(manifest):
        return "its SHA-256 does not match its content"
    step = manifest.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        return f"`step` is {step!r}"
    if NAME.fullmatch(folder.name) and number_of(folder) != step:
        return f"`step` is {step}"
    for key in ("run", "settings", "files"):
        if not isinstance(manifest.get(key), dict):
            return f"`{key}` is not an object"
    for name, expected in manifest["files"].items():
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            return f"`files` has {name!r}, which is not in the folder"
        if not isinstance(expected, dict) or not isinstance(expected.get("bytes"), int):
            return f"`files` has no size of {name!r}"
    return None
