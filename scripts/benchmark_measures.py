"""Times, peak memory, FLOPs and rates of the benchmark, and the rows that it writes."""

import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from diffusers_imagen.utils.errors import one_line


MIN_ROUNDS = 3  # of a group for which there is time at all
ASSUMED_SHARE = 0.5  # of the matrix-product rate, for the least time that a group asks for; networks reach less


@dataclass
class Row:
    """Measurement of one system, or the reason why there is none.

    Times of a call are the median and the quartiles of `rounds` calls; the first call, `warm_up_s`, is apart and
    includes building and compiling. `gflop` counts matrix products, convolutions and attention of a call.
    """

    what: str
    preset: str
    batch_size: int
    system: str
    ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    rounds: int = 0
    images_per_s: float | None = None
    peak_mib: float | None = None
    gflop: float | None = None
    tflop_per_s: float | None = None
    share_of_matrix_rate: float | None = None
    warm_up_s: float | None = None
    note: str = ""
    error: str | None = None
    left_out: str | None = None


@dataclass
class Case:
    """Measurement of one system: `build` returns the function to time."""

    system: str
    build: Callable[[], Callable[[], Any]]
    flops: int | None = None
    note: str = ""


@dataclass
class Group:
    """Cases that alternate within a run, so that other load affects all of them equally."""

    what: str
    preset: str
    batch_size: int
    make_cases: Callable[[], list[Case]]
    flops: int = 0  # of all cases together, called once
    weights: int = 0  # bytes


class Budget:
    """Time limit of a run in seconds, shared equally by the remaining groups."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.clock, self.end = clock, clock() + seconds

    def left(self) -> float:
        return self.end - self.clock()

    def deadline(self, groups_left: int) -> float:
        """Return the time by which the next of `groups_left` groups should end."""
        return self.clock() + max(self.left(), 0.0) / groups_left

    def reason_against(self, group: Group, flop_per_s: float, free_bytes: int | None) -> str | None:
        """Return why a group is skipped, or None."""
        left = self.left()
        if left <= 0:
            return "no time was left"
        least = (1 + MIN_ROUNDS) * group.flops / (ASSUMED_SHARE * flop_per_s)
        if least > left:
            return f"it takes {least:.0f} s at least, and {left:.0f} s were left"
        if free_bytes is not None and group.weights > free_bytes:
            return f"its weights take {group.weights / 2**30:.1f} GiB, and {free_bytes / 2**30:.1f} GiB are free"
        return None


def free_memory(device: torch.device) -> int | None:
    """Return the free bytes of a device; None if the system does not report them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_flops(call: Callable[[], Any]) -> int:
    """Count the FLOPs of a call, 2 for a multiplication with an addition; of tensors on the device `meta` it is free."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def matrix_rate(
    device: torch.device,
    dtype: torch.dtype,
    size: int | None = None,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the FLOP/s of the product of two square matrices of random numbers: the median of several."""
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    seconds = []
    for _ in range(repeats + 2):
        start = clock()
        a @ b
        synchronize(device)
        seconds.append(clock() - start)
    return 2 * size**3 / torch.tensor(seconds[2:]).median().item()


def peak_memory(call: Callable, device: torch.device) -> float:
    """Return the peak memory of a call in addition to the memory allocated before, in MiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        synchronize(device)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 2**20


class Meter:
    """Measures groups on one device.

    Args:
        device (`torch.device`): The device.
        flop_per_s (`float`): Its rate of matrix products, which achieved rates are compared with.
        repeats (`int`): Rounds of a group at most.
        clock (`Callable`): Returns seconds, of the wall or of the processor.
    """

    def __init__(
        self,
        device: torch.device,
        flop_per_s: float,
        repeats: int,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.device, self.flop_per_s, self.repeats, self.clock = device, flop_per_s, repeats, clock

    def time(self, call: Callable[[], Any]) -> float:
        start = self.clock()
        call()
        synchronize(self.device)
        return self.clock() - start

    def run(self, groups: Sequence[Group], budget: Budget, tell: Callable[[Row], None]) -> list[Row]:
        """Measure groups in the order of their FLOPs, within the time limit."""
        rows = []
        groups = sorted(groups, key=lambda group: group.flops)
        for i, group in enumerate(groups):
            against = budget.reason_against(group, self.flop_per_s, free_memory(self.device))
            if against is not None:
                found = [Row(group.what, group.preset, group.batch_size, "all", left_out=against)]
            else:
                found = self.measure(group, budget, budget.deadline(len(groups) - i))
            for row in found:
                tell(row)
            rows += found
            gc.collect()  # networks that refer to themselves
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return rows

    def measure(self, group: Group, budget: Budget, deadline: float) -> list[Row]:
        """Return a row for each case of a group; one that fails has its error, one without time the reason."""
        try:
            cases = group.make_cases()
        except Exception as error:
            return [Row(group.what, group.preset, group.batch_size, "all", error=describe(error))]
        rows = {
            case.system: Row(group.what, group.preset, group.batch_size, case.system, note=case.note) for case in cases
        }
        calls = self._warm_up(cases, rows, budget, deadline)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for done in range(self.repeats):
            if done >= MIN_ROUNDS and budget.clock() > deadline or done and budget.left() <= 0:
                break
            self._take_turns(calls, times, rows)
        flops = {case.system: case.flops for case in cases}
        for name, call in calls.items():
            self._fill(rows[name], times[name], flops[name])
            if budget.left() > 0:
                rows[name].peak_mib = self._peak(call, rows[name])
        return list(rows.values())

    def _warm_up(
        self, cases: Iterable[Case], rows: dict[str, Row], budget: Budget, deadline: float
    ) -> dict[str, Callable[[], Any]]:
        calls = {}
        for case in cases:
            row = rows[case.system]
            if calls and budget.clock() > deadline or budget.left() <= 0:
                row.left_out = "no time was left"
                continue
            start = time.perf_counter()
            try:
                call = case.build()
                call()
                synchronize(self.device)
            except Exception as error:
                row.error = describe(error)
                continue
            row.warm_up_s = time.perf_counter() - start
            calls[case.system] = call
        return calls

    def _take_turns(self, calls: dict[str, Callable], times: dict[str, list[float]], rows: dict[str, Row]) -> None:
        for name, call in list(calls.items()):
            try:
                times[name].append(self.time(call))
            except Exception as error:
                rows[name].error = describe(error)
                del calls[name]

    def _peak(self, call: Callable[[], Any], row: Row) -> float | None:
        try:
            return peak_memory(call, self.device)
        except Exception as error:
            row.note = f"peak memory: {describe(error)}"
            return None

    def _fill(self, row: Row, seconds: list[float], flops: int | None) -> None:
        low, middle, high = (
            torch.tensor(seconds, dtype=torch.float64)
            .quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
            .tolist()
        )
        row.ms, row.low_ms, row.high_ms, row.rounds = 1000 * middle, 1000 * low, 1000 * high, len(seconds)
        row.images_per_s = row.batch_size / middle
        if flops:
            row.gflop, row.tflop_per_s = flops / 1e9, flops / middle / 1e12
            row.share_of_matrix_rate = flops / middle / self.flop_per_s


def describe(error: BaseException) -> str:
    """Return an error of any library as one line of at most 200 characters."""
    line = f"{type(error).__name__}: {one_line(error)}"
    return line if len(line) <= 200 else f"{line[:197]}..."


# ---- tables


COLUMNS = {
    "ms": "ms",
    "low_ms": "quartiles",
    "time / ours": "time / ours",
    "images_per_s": "images/s",
    "peak_mib": "peak MiB",
    "gflop": "GFLOP",
    "tflop_per_s": "TFLOP/s",
    "share_of_matrix_rate": "of the matrix rate",
    "warm_up_s": "first call, s",
}


def to_markdown(rows: Sequence[Row]) -> str:
    """Return a table of what was measured, and lists of what failed and of what was left out."""
    measured = [row for row in rows if row.ms is not None and row.error is None]
    heads = ["", "preset", "batch", "system", *COLUMNS.values(), "note"]
    lines = [_line(heads), "|---" * len(heads) + "|"] if measured else []
    reference = {(row.what, row.preset, row.batch_size): row.ms for row in measured if row.system == "ours"}
    for row in measured:
        lines.append(_line([row.what, row.preset, row.batch_size, row.system, *_cells(row, reference), row.note]))
    for title, name in (("Failed", "error"), ("Left out", "left_out")):
        missing = [row for row in rows if getattr(row, name) is not None]
        if missing:
            lines += ["", f"{title}:", ""]
            lines += [
                f"- {row.what}, {row.preset}, batch {row.batch_size}, {row.system}: {getattr(row, name)}"
                for row in missing
            ]
    return "\n".join(lines) + "\n"


def _cells(row: Row, reference: dict[tuple, float | None]) -> list[str]:
    ours = reference.get((row.what, row.preset, row.batch_size))
    values = {
        **asdict(row),
        "low_ms": f"{row.low_ms:.4g} to {row.high_ms:.4g}",
        "time / ours": f"{row.ms / ours:.2f}" if ours else None,
    }
    if row.share_of_matrix_rate is not None:
        values["share_of_matrix_rate"] = f"{row.share_of_matrix_rate:.0%}"
    return [_cell(values[name]) for name in COLUMNS]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _line(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"
