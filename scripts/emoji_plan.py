"""How the minutes of a recipe are divided, and what is done of it: a part of `train_emoji_cascade.py`."""

import time
from pathlib import Path
from typing import Any

from diffusers_imagen.utils.files import read_json_object, write_json


# shares of all minutes, and steps that the GPU is thought to have time for: `--scale` takes a part of them
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
# what a phase leaves, and who reads it: it is made again where it was lost with its machine
PRODUCTS = {
    "data": ("data/emoji.parquet", tuple(SHARES)[1:]),
    "embeddings": ("embeddings", ("base_32", "base_64")),
    "pairs": ("pairs", ("refine",)),
    "build": ("imagen-emoji", ("evaluate",)),
}
SHARE_USED = 0.97  # of the time for steps: they do not all take the same
FINISH_SECONDS = 20.0  # of validation, export and checkpoint at the end of a run


def phase_order(upscaler_reads_text: bool) -> list[str]:
    """All phases: super-resolution comes first where it needs no text encoder, which is carried later then."""
    order = list(SHARES)
    if upscaler_reads_text:
        order.remove("super_resolution")
        order.insert(order.index("embeddings") + 1, "super_resolution")
    return order


def phase_seconds(phase: str, done: list[str], seconds: dict[str, float], total: float) -> float:
    """The seconds of a phase, what it has had included: its share of what the others have left.

    Args:
        phase (`str`): One that is not done.
        done (`list[str]`): Those that are.
        seconds (`dict[str, float]`): What every phase has had.
        total (`float`): The seconds of all phases.
    """
    left = total - sum(had for name, had in seconds.items() if name != phase)
    waiting = sum(share for name, share in SHARES.items() if name not in done)
    return max(0.0, left) * SHARES[phase] / waiting


def plan_steps(first: int, per_step: float, seconds: float, most: int | None = None) -> int:
    """The last step of a run.

    Args:
        first (`int`): Steps that are done.
        per_step (`float`): Seconds that a step takes.
        seconds (`float`): Those that are left for steps.
        most (`int`, *optional*): The last step that it may be.

    Returns:
        At least `first` + 1, so that there is a step that ends the run.
    """
    last = first + int(max(0.0, seconds) * SHARE_USED / per_step)
    return max(first + 1, last if most is None else min(last, most))


def seconds_for_steps(budget: float, had: float, call_left: float, start: float) -> float:
    """Seconds that a run has for steps, in this call and later ones.

    Args:
        budget (`float`): Of its phase.
        had (`float`): What the phase has had, up to now.
        call_left (`float`): What is left of this call.
        start (`float`): What the run took in this call before its first timed step; it will again in the next.
    """
    left = budget - had - FINISH_SECONDS
    return left - start if left > call_left else left


def scaled(number: int, scale: float, least: int) -> int:
    """A share of a number, but not less than so many."""
    return number if scale >= 1 else max(least, round(number * scale))


def find_lost(folder: Path, done: list[str]) -> list[str]:
    """Phases that are done, but whose files are not there and are still read by one that is not."""
    waiting = set(SHARES) - set(done)
    return [
        phase
        for phase, (product, readers) in PRODUCTS.items()
        if phase in done and waiting & set(readers) and not (folder / product).exists()
    ]


class Progress:
    """What is done of a recipe, in `progress.json` of its folder.

    Args:
        path (`Path`): That file.
        recipe (`dict`): What must not change while the recipe is made.
        total (`float`): Seconds of all phases.
        call_end (`float`): When this call ends, by `time.monotonic`.
    """

    def __init__(self, path: Path, recipe: dict[str, Any], total: float, call_end: float):
        self.path, self.recipe, self.total, self.call_end = path, recipe, total, call_end
        self.seconds: dict[str, float] = {}
        self.done: list[str] = []
        self.steps: dict[str, int] = {}  # the last one of each run, as planned
        self.phase, self.since, self.saved = "", 0.0, 0.0

    def open(self, resume: bool) -> None:
        """Reads the file; ValueError if there is one and should not, or one of another recipe."""
        if not self.path.exists():
            return
        if not resume:
            raise ValueError(
                f"`work_dir` is '{self.path.parent}', where a recipe was begun: give --resume, or another."
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
        """Seconds left of this call."""
        return self.call_end - time.monotonic()

    @property
    def budget(self) -> float:
        """Seconds of the phase that runs, what it has had included."""
        return phase_seconds(self.phase, self.done, self.seconds, self.total)

    def begin(self, phase: str) -> None:
        self.phase, self.since = phase, time.monotonic()

    def tick(self, least: float = 10.0) -> None:
        """Adds the time since the last call to the phase; writes the file if that is some seconds old."""
        now = time.monotonic()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self.since
        self.since = now
        if now - self.saved >= least:
            self.saved = now
            parts = {"recipe": self.recipe, "seconds": self.seconds, "done": self.done, "steps": self.steps}
            write_json(self.path, parts)

    def finish(self) -> None:
        """Notes that the phase is done."""
        self.done.append(self.phase)
        self.tick(least=0)
