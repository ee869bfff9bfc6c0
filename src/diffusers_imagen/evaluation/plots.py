"""Plots of an evaluation: distance against CLIP score over guidance, and against network evaluations."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..utils.files import whole_file
from .figures import CLIP_SCORE, Row


class Curve(NamedTuple):
    """Definition of a plot: settings that differ only in the sorting value form one line."""

    name: str  # name of the file
    title: str  # label of the x axis
    line: Callable[[Row], str]
    sort: Callable[[Row], Any]
    value: Callable[[Row], float | None]


def over_guidance(row: Row) -> str:
    assert row.setting is not None
    return f"{row.setting.scheduler}, steps {numbers(row.setting.steps)}"


def over_steps(row: Row) -> str:
    assert row.setting is not None
    return f"{row.setting.scheduler}, guidance {numbers(row.setting.guidance)}"


def guidance_of(row: Row) -> tuple[float, ...]:
    assert row.setting is not None
    return row.setting.guidance


def clip_of(row: Row) -> float | None:
    return row.figures[CLIP_SCORE].value if CLIP_SCORE in row.figures else None


CURVES = (
    Curve("guidance", "guidance of the first stage", over_guidance, guidance_of, lambda row: guidance_of(row)[0]),
    Curve("clip", "CLIP score", over_guidance, guidance_of, clip_of),
    Curve("evaluations", "evaluations of the networks", over_steps, lambda row: row.calls, lambda row: row.calls),
)


def numbers(values: tuple) -> str:
    """Format the values of the stages."""
    return ", ".join(f"{value:g}" for value in values)


def draw_plots(folder: Path, rows: list[Row]) -> list[tuple[str, str]]:
    """Plot the curves that have points, if matplotlib is installed; return titles and files."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    made = []
    for resolution in dict.fromkeys(row.resolution for row in rows):
        drawn = [row for row in rows if row.resolution == resolution and row.setting is not None]
        labels = dict.fromkeys(label for row in drawn for label in row.figures)
        for label in labels:
            if label.startswith(("FID", "FD-", "KID", "KD-")):
                made += [
                    draw_plot(folder, curve, lines, label, resolution)
                    for curve in CURVES
                    if (lines := lines_of(curve, drawn))
                ]
    return made


def lines_of(curve: Curve, rows: list[Row]) -> dict[str, list[Row]]:
    """Return the rows of each line, in order; lines with a single point are dropped."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if curve.value(row) is not None:
            lines.setdefault(curve.line(row), []).append(row)
    return {
        name: sorted(line, key=curve.sort) for name, line in lines.items() if len({curve.sort(r) for r in line}) > 1
    }


def draw_plot(folder: Path, curve: Curve, lines: dict[str, list[Row]], label: str, resolution: int) -> tuple[str, str]:
    """Write one plot; return its title and file."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(6, 4), layout="constrained")
    axes = canvas.add_subplot()
    for name, line in lines.items():
        figures = [row.figures[label] for row in line]
        spread = [figure.spread or 0.0 for figure in figures]
        xs = [value for value in map(curve.value, line) if value is not None]  # lines consist of other rows
        axes.errorbar(xs, [figure.value for figure in figures], spread, marker="o", capsize=3, label=name)
    axes.set(xlabel=curve.title, ylabel=label, title=f"{label} at {resolution} px")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    file = f"plot_{label}_{curve.name}_{resolution}.png"
    with whole_file(folder / file) as partial:
        canvas.savefig(partial, format="png", dpi=100)
    return f"{label} against {curve.title}, {resolution} px", file
