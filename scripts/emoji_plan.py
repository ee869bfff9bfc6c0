"""Time plan and progress of the recipe for the emoji cascade; part of `train_emoji_cascade.py`."""

import time
from pathlib import Path
from typing import Any

from diffusers_imagen.utils.files import read_json_object, write_json


# shares of the total time, and estimated steps on the GPU, which `--scale` multiplies
SHARES = {
    "data": 0.02,
    "super_resolution": 0.20,
    "embeddings": 0.02,
    "base_32": 0.12,
    "base_64": 0.34,
    "pairs": 0.06,
    "refine": 0.10,
    "build": 0.03,
    "evaluate": 0.11,
}
SCALED_STEPS = {"super_resolution": 5000, "base_32": 6000, "base_64": 6000, "refine": 2000}
# files written by a phase, and phases that read them: they are written again if they were lost with the machine
PRODUCTS = {
    "data": ("data/emoji.parquet", tuple(SHARES)[1:]),
    "embeddings": ("embeddings", ("base_32", "base_64")),
    "pairs": ("pairs", ("refine",)),
    "build": ("imagen-emoji", ("evaluate",)),
}
SHARE_USED = 0.97  # of the time for steps, because their durations vary
FINISH_SECONDS = 20.0  # for validation, export and checkpoint at the end of a run


def phase_order(upscaler_reads_text: bool) -> list[str]:
    """Return all phases: super-resolution comes first if it needs no text encoder, which can then be copied later."""
    order = list(SHARES)
    if upscaler_reads_text:
        order.remove("super_resolution")
        order.insert(order.index("embeddings") + 1, "super_resolution")
    return order


def phase_seconds(phase: str, done: list[str], seconds: dict[str, float], total: float) -> float:
    """Return the total seconds of a phase, including those already spent: its share of the time that others left.

    Args:
        phase (`str`): A phase that is not completed.
        done (`list[str]`): The completed phases.
        seconds (`dict[str, float]`): Seconds spent by every phase.
        total (`float`): Total seconds of all phases.
    """
    left = total - sum(had for name, had in seconds.items() if name != phase)
    waiting = sum(share for name, share in SHARES.items() if name not in done)
    return max(0.0, left) * SHARES[phase] / waiting


def plan_steps(first: int, per_step: float, seconds: float, most: int | None = None) -> int:
    """Return the last step of a run.

    Args:
        first (`int`): Number of completed steps.
        per_step (`float`): Seconds per step.
        seconds (`float`): Seconds left for steps.
        most (`int`, *optional*): Maximum last step.

    Returns:
        At least `first` + 1, so that there is a step that ends the run.
    """
    last = first + int(max(0.0, seconds) * SHARE_USED / per_step)
    return max(first + 1, last if most is None else min(last, most))


def seconds_for_steps(budget: float, had: float, call_left: float, start: float) -> float:
    """Return the seconds that a run has for steps, in this call and later ones.

    Args:
        budget (`float`): Seconds of its phase.
        had (`float`): Seconds that the phase has already used.
        call_left (`float`): Seconds left of this call.
        start (`float`): Seconds of the run in this call before its first timed step, as expected for the next call.
    """
    left = budget - had - FINISH_SECONDS
    return left - start if left > call_left else left


def scaled(number: int, scale: float, least: int) -> int:
    """Return a share of a number, but at least `least`."""
    return number if scale >= 1 else max(least, round(number * scale))


def find_lost(folder: Path, done: list[str]) -> list[str]:
    """Return completed phases whose files are missing and needed by a phase that is not completed."""
    waiting = set(SHARES) - set(done)
    return [
        phase
        for phase, (product, readers) in PRODUCTS.items()
        if phase in done and waiting & set(readers) and not (folder / product).exists()
    ]


class Progress:
    """Progress of a recipe, stored in `progress.json` of its folder.

    Args:
        path (`Path`): The file.
        recipe (`dict`): Settings that must not change between calls.
        total (`float`): Seconds of all phases.
        call_end (`float`): End of this call, by `time.monotonic`.
    """

    def __init__(self, path: Path, recipe: dict[str, Any], total: float, call_end: float):
        self.path, self.recipe, self.total, self.call_end = path, recipe, total, call_end
        self.seconds: dict[str, float] = {}
        self.done: list[str] = []
        self.steps: dict[str, int] = {}  # the planned last step of each run
        self.phase, self.since, self.saved = "", 0.0, 0.0

    def open(self, resume: bool) -> None:
        """Read the file; raise ValueError if there is one without --resume, or one of another recipe."""
        if not self.path.exists():
            return
        if not resume:
            raise ValueError(
                f"`work_dir` is '{self.path.parent}', which has a recipe in progress: set --resume, or use another "
                "folder."
            )
        found = read_json_object(self.path)
        for name, value in self.recipe.items():
            if found["recipe"].get(name) != value:
                raise ValueError(f"`{name}` is {value!r}, but '{self.path}' has {found['recipe'].get(name)!r}.")
        self.seconds, self.steps = found["seconds"], found["steps"]
        lost = find_lost(self.path.parent, found["done"])
        self.done = [phase for phase in found["done"] if phase not in lost]

    @property
    def call_left(self) -> float:
        """Return the seconds left of this call."""
        return self.call_end - time.monotonic()

    @property
    def budget(self) -> float:
        """Return the total seconds of the current phase, including those already spent."""
        return phase_seconds(self.phase, self.done, self.seconds, self.total)

    def begin(self, phase: str) -> None:
        self.phase, self.since = phase, time.monotonic()

    def tick(self, least: float = 10.0) -> None:
        """Add the time since the last call to the phase; write the file every few seconds."""
        now = time.monotonic()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self.since
        self.since = now
        if now - self.saved >= least:
            self.saved = now
            parts = {"recipe": self.recipe, "seconds": self.seconds, "done": self.done, "steps": self.steps}
            write_json(self.path, parts)

    def finish(self) -> None:
        """Record that the phase is completed."""
        self.done.append(self.phase)
        self.tick(least=0)
