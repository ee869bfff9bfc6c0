"""Output folder of a run: locked by one process, and without files of other runs.

Files of steps after the one that a run starts from were written either by the run itself, between its last checkpoint
and an interruption, and are written again; or by another run, and raise an error, or are moved to `set-aside-1` and so
on. Files of other runs are never deleted.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from diffusers.utils import logging

from ..utils.files import FolderHold, check_folder, read_json_object, write_json
from .checkpoints import Found, list_checkpoints, number_of
from .config import TrainingConfig
from .ema.averages import SNAPSHOTS
from .export import RECORD, STAGE_PARTS, finish_move
from .monitor import RECORDS, Records
from .run_identity import find_difference
from .sampling import SAMPLES
from .validation.picture_metrics import PICTURES, STEP


logger = logging.get_logger(__name__)

RUN = "run.json"  # description of the run, so that a run interrupted before its first checkpoint can be resumed
SET_ASIDE = "set-aside"
NUMBERED = (
    (SAMPLES, re.compile(r"step-(\d+)\.png")),
    (SNAPSHOTS, re.compile(r"(\d+)-.*\.safetensors")),
    (PICTURES, STEP),
)


class Plan(NamedTuple):
    """Plan for files of steps after the one that a run starts from."""

    kept_step: int  # the last step whose files belong to this run
    set_aside: tuple[Path, ...] = ()
    again: bool = False  # whether this run wrote the other files, and writes them again


class OutputFolder:
    """Checks the folder of a run, and prepares it.

    Args:
        config (`TrainingConfig`): Configuration with the folder, and whether to move files of other runs.
    """

    def __init__(self, config: TrainingConfig):
        self.config, self.folder = config, Path(config.output_dir)
        self._hold: FolderHold | None = None

    def check_free(self) -> None:
        """Check that no other process uses the folder, and that it can be written to.

        Raises:
            ValueError: If not.
        """
        check_folder(self.config.output_dir, "output_dir")
        self._check_outside_data()
        if self.folder.is_dir() and self._hold is None:
            FolderHold(self.folder, "output_dir").release()

    def _check_outside_data(self) -> None:
        """Raise ValueError for a folder inside one of images: a resumed run would count its samples as data."""
        folder = self.folder.resolve()
        for name in ("instance_data_dir", "class_data_dir", "train_data_dir"):
            data = getattr(self.config, name, None)
            if data is not None and Path(data).resolve() in (folder, *folder.parents):
                raise ValueError(
                    f"`output_dir` is '{self.folder}', which is inside `{name}`, but should be outside, because the "
                    "images of the run would be taken for training data."
                )

    def hold(self) -> None:
        """Lock the folder until `release`, and finish a move that was interrupted.

        Raises:
            ValueError: If another process uses the folder.
        """
        self._hold = FolderHold(self.folder, "output_dir")
        finish_move(self.folder)

    def release(self) -> None:
        """Unlock the folder."""
        if self._hold is not None:
            self._hold.release()
            self._hold = None

    def plan(self, found: Found, run: dict[str, Any], partly: bool = False) -> Plan:
        """Determine which files to move.

        Args:
            found (`Found`): The checkpoint that the run resumes from.
            run (`dict`): Description of the run, which must match between two starts.
            partly (`bool`): Whether `run` is still incomplete.

        Raises:
            ValueError: If there are files of another run and `overwrite_output_dir` is False.
        """
        config = self.config
        is_own = found.folder is not None and found.folder.resolve().parent == self.folder.resolve()
        kept = found.step if is_own else 0
        above = tuple(self._above(found.step if is_own else None))
        if config.resume_from_checkpoint == "latest" and found.damaged:
            return Plan(kept, found.damaged if is_own else above, again=is_own)
        if is_own and all(number_of(path) <= found.step for path in list_checkpoints(self.folder)):
            return Plan(kept, again=True)
        if not above:
            return Plan(kept)
        if is_own:
            which = f"that continued after step {found.step}"
        elif config.resume_from_checkpoint is None:
            which = "that started earlier"
        elif (other := self._other_run(found.step, run, partly)) is None:
            return Plan(kept, again=True)
        else:
            which = other
        if not config.overwrite_output_dir:
            names = ", ".join(path.relative_to(self.folder).as_posix() for path in above[:3])
            more = f" and {len(above) - 3} more" if len(above) > 3 else ""
            raise ValueError(
                f"`output_dir` is '{self.folder}', which has {names}{more} of a run {which}. Use another folder, "
                "resume that run with --resume_from_checkpoint latest, or move its files aside with "
                "--overwrite_output_dir True."
            )
        return Plan(kept, above)

    def carry_out(self, plan: Plan, found: Found, run: dict[str, Any]) -> None:
        """Move files of other runs, remove files that the run writes again, and record the run."""
        self._set_aside(plan)
        for name, _ in NUMBERED:
            for leftover in (self.folder / name).glob(".*.partial"):  # of a killed process
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        for name in RECORDS:
            Records(self.folder / f"{name}.jsonl").cut(plan.kept_step)
        if plan.again:
            for path in self._numbered_above(plan.kept_step):
                if not path.is_dir():  # validation images are reused, because the run computes the same weights again
                    path.unlink()
        if not list_checkpoints(self.folder):
            write_json(self.folder / RUN, {"run": run, "from_step": found.step, "has_checkpoint": False})

    def note(self, **facts: Any) -> None:
        """Write facts about the run to run.json, if it exists: `has_checkpoint`, so that a run whose checkpoints were
        deleted does not restart in its own results; `completed`, the results of the last step."""
        record = read_run(self.folder)
        if record is not None and {**record, **facts} != record:
            write_json(self.folder / RUN, {**record, **facts})

    def noted(self, fact: str) -> Any:
        """Return a fact written by `note`; None if there is none."""
        return (read_run(self.folder) or {}).get(fact)

    def _other_run(self, step: int, run: dict[str, Any], partly: bool) -> str | None:
        """Describe how the recorded run differs from this one before its first checkpoint; None if it does not."""
        record = read_run(self.folder)
        if record is None:
            return "without a checkpoint"
        if record["has_checkpoint"]:
            return "whose checkpoints are missing"
        if record["from_step"] != step:
            return f"that started after step {record['from_step']}, not after {step}"
        difference = find_difference(record["run"], run, partly)
        return None if difference is None else f"that {difference}"

    def _above(self, step: int | None) -> Iterator[Path]:
        """Iterate over files of steps after `step`; with None, over all files of a run."""
        if not self.folder.is_dir():
            return
        yield from (path for path in list_checkpoints(self.folder) if step is None or number_of(path) > step)
        yield from self._numbered_above(-1 if step is None else step)
        for name in RECORDS:
            path = self.folder / f"{name}.jsonl"
            if path.exists() and (step is None or Records(path).last_step() > step):
                yield path
        yield from self._stage_above(step)
        logs = self.folder / self.config.logging_dir
        if step is None and logs.is_dir() and any(logs.iterdir()) and self.folder.resolve() in logs.resolve().parents:
            yield logs

    def _numbered_above(self, step: int) -> Iterator[Path]:
        for name, pattern in NUMBERED:
            for path in sorted((self.folder / name).glob("*")) if (self.folder / name).is_dir() else ():
                match = pattern.fullmatch(path.name)
                if match is not None and int(match[1]) > step:
                    yield path

    def _stage_above(self, step: int | None) -> Iterator[Path]:
        parts = [self.folder / name for name in STAGE_PARTS if (self.folder / name).exists()]
        if parts and step is not None:
            try:
                if read_json_object(self.folder / RECORD)["step"] <= step:
                    return
            except (ValueError, KeyError, TypeError):  # the step is unknown
                pass
        yield from parts

    def _set_aside(self, plan: Plan) -> None:
        if not plan.set_aside:
            return
        numbers = (path.name.removeprefix(f"{SET_ASIDE}-") for path in self.folder.glob(f"{SET_ASIDE}-*"))
        place = self.folder / f"{SET_ASIDE}-{max((int(n) for n in numbers if n.isdecimal()), default=0) + 1}"
        for path in plan.set_aside:
            target = place / path.relative_to(self.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".jsonl" and plan.kept_step:  # its first lines belong to this run
                shutil.copyfile(path, target)
            else:
                os.replace(path, target)
        logger.warning(f"Files in {self.folder} that are damaged or of another run were moved to {place}.")


def read_run(folder: Path) -> dict[str, Any] | None:
    """Read a folder's run.json; None if it does not exist or is invalid."""
    try:
        record = read_json_object(folder / RUN)
    except ValueError:
        return None
    kinds = {"run": dict, "from_step": int, "has_checkpoint": bool}
    return record if all(isinstance(record.get(name), kind) for name, kind in kinds.items()) else None
