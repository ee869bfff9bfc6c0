"""Monitoring of a run: losses by noise level, norms, rates, skipped steps, and time.

Sums are kept on the device and fetched together at intervals, to avoid other synchronizations.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..utils.files import sync, write_text
from .states import copy_into


SIGMA_EDGES = (0.1, 0.3, 1.0, 3.0)
BUCKETS = tuple(f"sigma_{low:g}_to_{high:g}" for low, high in zip((0.0, *SIGMA_EDGES), (*SIGMA_EDGES, float("inf"))))
AVERAGED_STEPS = 100  # approximate number of steps in the running loss, because single batches are noisy
MAX_SKIPPED_IN_ROW = 50
VALIDATION = "validation"  # prefix of the names of validation results
RECORDS = ("metrics", "losses", "validation")  # names of a run's files with one line per step


class NoiseLevelMeans:
    """Means of losses, by noise level."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.edges = torch.tensor(SIGMA_EDGES, device=device)
        self.sums = torch.zeros(2, len(BUCKETS), device=device)  # of losses, and of ones

    def add(self, losses: torch.Tensor, sigma: torch.Tensor) -> None:
        """Add losses `(B,)` at noise levels `(B,)`; those that are not finite are ignored."""
        finite = losses.isfinite()
        values = torch.stack([losses.where(finite, 0), finite.to(losses.dtype)])
        self.sums.index_add_(1, torch.bucketize(sigma, self.edges), values)

    @staticmethod
    def means(sums: torch.Tensor) -> dict[str, float]:
        """Return the means of noise levels with losses, from `sums` `(2, len(BUCKETS))` on the CPU."""
        return {name: total / count for name, total, count in zip(BUCKETS, *sums.tolist()) if count}


class Losses(dict[str, float]):
    """The last losses of a run, and metrics of its images, by their names."""

    def take_validation(self, found: dict[str, float]) -> None:
        """Replace the results of the previous validation."""
        for name in [name for name in self if name.startswith(VALIDATION)]:
            del self[name]
        self.update(found)

    def state_dict(self) -> dict[str, float]:
        return dict(self)

    def load_state_dict(self, state: dict[str, float]) -> None:
        if not all(isinstance(name, str) and isinstance(value, float) for name, value in state.items()):
            raise ValueError("its losses are not numbers")
        self.update(state)


class Monitor:
    """Losses and norms of the steps since the last fetch, and a running average of the loss."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.noise_levels = NoiseLevelMeans(device)
        self.step_loss = torch.zeros((), device=device)  # of the current step
        # sum of losses, steps, gradient norm, running loss, skipped steps, consecutive skipped steps
        self.values = torch.tensor([0, 0, 0, torch.nan, 0, 0], device=device)

    def add(self, losses: torch.Tensor, sigma: torch.Tensor, share: float) -> None:
        """Add a micro-batch, which is a share of its step."""
        self.noise_levels.add(losses, sigma)
        self.step_loss += share * losses.mean()

    def end_step(self, grad_norm: torch.Tensor) -> None:
        """Add a step; steps with a gradient that is not finite were skipped."""
        finite = grad_norm.isfinite()
        total, steps, norm, running, skipped, in_row = self.values.unbind()
        average = running + (self.step_loss - running) / AVERAGED_STEPS
        average = torch.where(running.isnan(), self.step_loss, average)
        self.values = torch.stack(
            [
                torch.where(finite, total + self.step_loss, total),
                steps + finite,
                torch.where(finite, grad_norm, norm),
                torch.where(finite, average, running),
                skipped + ~finite,
                torch.where(finite, 0, in_row + 1),
            ]
        )
        self.step_loss = torch.zeros_like(self.step_loss)

    def fetch(self, accelerator: Accelerator) -> dict[str, float]:
        """Return means over processes and over the steps since the last fetch.

        Raises:
            FloatingPointError: After many consecutive skipped steps.
        """
        numbers = torch.cat([self.values, self.noise_levels.sums.flatten()])
        numbers = accelerator.reduce(numbers, "mean").cpu()
        total, steps, norm, running, skipped, in_row = numbers[:6].tolist()
        self.values[:2] = 0
        means = NoiseLevelMeans.means(numbers[6:].view(2, -1))
        self.noise_levels.sums.zero_()
        if in_row >= MAX_SKIPPED_IN_ROW:
            raise FloatingPointError(
                f"The gradient was not finite in {in_row:.0f} consecutive steps: lower `learning_rate`, or check the "
                "data with `diffusers-imagen doctor`. The last checkpoint is from before these steps."
            )
        record = {"loss": total / steps} if steps else {}
        return {
            **record,
            "loss_average": running,
            **{f"loss/{name}": mean for name, mean in means.items()},
            "grad_norm": norm,
            "skipped_steps": skipped,
        }

    def running_loss(self, accelerator: Accelerator) -> float:
        """Return the average over about a hundred steps and all processes; synchronizes the device."""
        return accelerator.reduce(self.values[3], "mean").item()

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values.cpu(), "levels": self.noise_levels.sums.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        copy_into(self.values, state["values"], "values of the monitor")
        copy_into(self.noise_levels.sums, state["levels"], "noise levels of the monitor")


class ComputeClock:
    """Context manager that measures seconds: by the clock on a CPU, by events, evaluated on request, on a GPU."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.total = 0.0
        self._events: list[tuple] = []

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *exception) -> None:
        end = self._now()
        if self.on_gpu:
            self._events.append((self._start, end))
        else:
            self.total += end - self._start

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        """Return the seconds so far; synchronizes a GPU."""
        for start, end in self._events:
            end.synchronize()
            self.total += start.elapsed_time(end) / 1000
        self._events.clear()
        return self.total


class Stopwatch:
    """Time of a run, excluding work between steps: checkpoints, validation, samples."""

    def __init__(self):
        self.start, self.between = time.perf_counter(), 0.0

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *exception) -> None:
        self.between += time.perf_counter() - self._since

    def seconds(self) -> float:
        """Return the seconds of steps so far."""
        return time.perf_counter() - self.start - self.between


def describe_time(steps: int, images: int, seconds: float, compute: float, between: float) -> str:
    """Return a summary of the time of a run."""
    if steps == 0:
        return "no steps were left"
    return (
        f"{steps} steps in {seconds:.1f} s ({images / seconds:.1f} images/s), {1 - compute / seconds:.1%} of it "
        f"outside forward, backward and optimizer; {between:.1f} s more for checkpoints, validation and samples"
    )


def memory_used(device: torch.device) -> float:
    """Return the peak memory so far, in GiB: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Records:
    """File with one JSON object per line, each for a step."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, step: int, record: dict[str, Any]) -> None:
        """Append a line; if the disk is full, the file is not changed."""
        if self.path.exists() and not self.path.is_file():  # opening a FIFO would wait for a reader
            raise ValueError(f"'{self.path}' is not a file, but should be a file of a run, or not exist: move it.")
        size = self.path.stat().st_size if self.path.is_file() else 0
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **record}) + "\n")
        except OSError:
            if self.path.is_file():
                os.truncate(self.path, size)
            raise

    def cut(self, step: int) -> None:
        """Remove lines after a step, which a resumed run repeats, and incomplete lines."""
        if self.path.is_file():
            kept = "".join(line + "\n" for line, of_step in self._lines() if of_step <= step)
            if kept.encode() != self.path.read_bytes():
                write_text(self.path, kept)

    def last_step(self) -> int:
        """Return the last step with a line; -1 if there is none."""
        return max((step for _, step in self._lines()), default=-1)

    def sync(self) -> None:
        """Flush the lines to the disk."""
        if self.path.is_file():
            sync(self.path)

    def _lines(self) -> Iterator[tuple[str, int]]:
        """Iterate over the complete lines, with their steps."""
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.is_file() else ""
        for line in text.splitlines():
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
            if isinstance(step, int):
                yield line, step


def not_finite(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the number of tensors with values that are not finite, without synchronizing the device."""
    found = [(~tensor.isfinite()).any() for tensor in tensors if tensor.is_floating_point()]
    return torch.stack(found).sum() if found else torch.zeros((), dtype=torch.int64)
