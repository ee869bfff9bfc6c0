"""Plot of the benchmark: the time and the peak memory of each system."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from benchmark_measures import Row

from diffusers_imagen.utils.files import whole_file


ROW_HEIGHT, PANEL_HEIGHT, WIDTH = 0.26, 0.75, 9  # inches


def draw_plot(path: Path, rows: Sequence[Row]) -> bool:
    """Write one panel for each measurement, with a bar for each system; return False if there is nothing to plot.

    Bars are medians, with quartiles. Without matplotlib there is no plot.
    """
    panels: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        if row.ms is not None and row.error is None:
            panels.setdefault((row.what, row.preset, row.batch_size), []).append(row)
    if not panels or importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    heights = [PANEL_HEIGHT + ROW_HEIGHT * len(panel) for panel in panels.values()]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    all_axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axes, ((what, preset, batch_size), panel) in zip(all_axes, panels.items()):
        times = [row.ms or 0.0 for row in panel]
        below = [time - (row.low_ms or time) for time, row in zip(times, panel)]
        above = [(row.high_ms or time) - time for time, row in zip(times, panel)]
        bars = axes.barh([row.system for row in panel], times, xerr=[below, above], color="#4c72b0", ecolor="#444444")
        axes.bar_label(bars, [label(row) for row in panel], padding=6, fontsize="small")
        axes.set(title=f"{what}, {preset}, batch {batch_size}", xlabel="ms", xlim=(0, 1.35 * max(times)))
        axes.invert_yaxis()
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=100)
    return True


def label(row: Row) -> str:
    """Return the time of a row, and its peak memory if it was measured."""
    memory = "" if row.peak_mib is None else f", {row.peak_mib:.4g} MiB"
    return f"{row.ms:.4g} ms{memory}"
