"""Evaluation reports: tables, JSON, plots and contact sheets."""

import html
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers.utils import make_image_grid
from PIL import Image

from ..utils.files import whole_file, write_json, write_text
from ..utils.grid import captioned_grid
from .figures import Figure, Row
from .picture_sets import PictureSet, fitted
from .plots import draw_plots


SHEET, COLUMNS, SIDE = 36, 6, 128  # images per contact sheet, images per row, and maximum size of an image in pixels
STYLE = (
    "body{font:15px/1.4 sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    "td,th{border:1px solid #bbb;padding:.2em .6em;text-align:left}img{max-width:100%}"
    ".warning{background:#fff3cd;padding:.3em .6em}"
)


@dataclass
class Report:
    """Content of a report.

    Attributes:
        folder (`Path`): Output folder.
        facts (`dict`): Settings of the evaluation.
        warnings (`list[str]`): Warnings about comparing the metrics with others.
        rows (`list[Row]`): Metrics.
        upscaling (`list[dict]`): Metrics of super-resolution.
        sheets (`list[tuple[str, str]]`): Titles and files of images.
    """

    folder: Path
    facts: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    upscaling: list[dict[str, Any]] = field(default_factory=list)
    sheets: list[tuple[str, str]] = field(default_factory=list)

    def add_upscaling(self, name: str, low: int, resolution: int, figures: dict[str, Figure]) -> None:
        """Add a row to the table of super-resolution."""
        self.upscaling.append({"name": name, "from": low, "to": resolution, "figures": figures})

    def add_contact_sheet(self, pictures: PictureSet, indices: list[int], resolution: int) -> None:
        """Add uncurated images, of evenly spaced captions."""
        some = spread(indices, SHEET)
        rows = -(-len(some) // COLUMNS)
        side = min(SIDE, resolution)
        small = [fitted(pictures.picture(index), side) for index in some]
        small += [Image.new("RGB", (side, side), "white")] * (rows * COLUMNS - len(small))
        captions = "; ".join(pictures.caption(index) for index in some)
        self.add_sheet(
            f"{pictures.name}: uncurated, by row: {captions}",
            f"contact_{slug(pictures.name)}.png",
            make_image_grid(small, rows, COLUMNS),
        )

    def add_nearest(self, drawn: PictureSet, real: PictureSet, pairs: list[tuple[int, int, float]]) -> None:
        """Add generated images, each next to its nearest real image."""
        rows = [[drawn.picture(one), real.picture(other)] for one, other, _ in pairs]
        captions = [f"{drawn.caption(one)}: cosine {cosine:.3f}" for one, _, cosine in pairs]
        resolution = rows[0][0].width
        self.add_sheet(
            f"{drawn.name} at {resolution} px: generated, and the nearest of the reference; the {len(pairs)} nearest",
            f"nearest_{resolution}_{drawn.name}.png",
            captioned_grid(rows, captions, resolution=min(SIDE, 2 * resolution)),
        )

    def add_sheet(self, title: str, name: str, sheet: Image.Image) -> None:
        """Add an image."""
        with whole_file(self.folder / name) as partial:
            sheet.save(partial, format="PNG")
        self.sheets.append((title, name))

    def write(self) -> None:
        """Write `report.html`, `results.json` and the plots."""
        plots = draw_plots(self.folder, self.rows)
        write_json(self.folder / "results.json", self.as_json())
        body = ["<h1>Evaluation</h1>", facts_table(self.facts)]
        body += [f'<p class="warning">{html.escape(warning)}</p>' for warning in self.warnings]
        for resolution in dict.fromkeys(row.resolution for row in self.rows):
            body += [
                f"<h2>{resolution} px</h2>",
                figures_table([row for row in self.rows if row.resolution == resolution]),
            ]
        if self.upscaling:
            body += ["<h2>Super-resolution</h2>", upscaling_table(self.upscaling)]
        body += ["<h2>Curves</h2>"] * bool(plots) + [picture(title, name) for title, name in plots]
        body += ["<h2>Images</h2>"] * bool(self.sheets) + [picture(title, name) for title, name in self.sheets]
        page = f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Evaluation</title><style>{STYLE}</style>'
        write_text(self.folder / "report.html", page + "\n".join(body) + "</html>\n")

    def as_json(self) -> dict[str, Any]:
        """Return all metrics."""
        upscaling = [
            {**row, "figures": {label: figure._asdict() for label, figure in row["figures"].items()}}
            for row in self.upscaling
        ]
        return {
            **{"facts": self.facts, "warnings": self.warnings},
            **{"figures": [row.as_json() for row in self.rows], "super-resolution": upscaling},
        }


def slug(name: str) -> str:
    """Convert a name to a part of a file name."""
    return re.sub(r"[^\w.-]+", "-", name)


def spread(indices: list[int], count: int) -> list[int]:
    """Return `count` evenly spaced indices."""
    return indices[:: max(1, len(indices) // count)][:count]


def facts_table(facts: dict[str, Any]) -> str:
    """Return the HTML table of names and values."""
    return table([], [[str(name), str(value)] for name, value in facts.items()])


def figures_table(rows: list[Row]) -> str:
    """Return the HTML table of metrics at one resolution."""
    labels = list(dict.fromkeys(label for row in rows for label in row.figures))
    cells = [
        [row.name, f"{row.count:,}", "" if row.calls is None else str(row.calls)]
        + [row.figures[label].text() if label in row.figures else "" for label in labels]
        for row in rows
    ]
    spreads = {label: row.figures[label].of for row in rows for label in labels if label in row.figures}
    notes = "; ".join(f"{label}: {of}" for label, of in spreads.items() if of)
    return table(["", "images", "evaluations", *labels], cells) + (f"<p>± {html.escape(notes)}.</p>" if notes else "")


def upscaling_table(rows: list[dict[str, Any]]) -> str:
    """Return the HTML table of super-resolution metrics."""
    labels = list(dict.fromkeys(label for row in rows for label in row["figures"]))
    cells = [
        [row["name"], f"{row['from']} to {row['to']}"]
        + [row["figures"][label].text() if label in row["figures"] else "" for label in labels]
        for row in rows
    ]
    note = "<p>Consistency: PSNR of the result, downsampled again, against the image that was upsampled.</p>"
    return table(["", "px", *labels], cells) + note


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return an HTML table."""
    top = "<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>" if head else ""
    lines = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<table>{top}{''.join(lines)}</table>"


def picture(title: str, name: str) -> str:
    """Return an HTML figure of an image with its title."""
    return f'<figure><img src="{html.escape(name)}" alt=""><figcaption>{html.escape(title)}</figcaption></figure>'
