"""HTML of the page: the progress of a drawing, and its images, which can be enlarged by a click and saved."""

import base64
import html
import io
import os
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from PIL import Image


COLUMNS = {1: 1, 2: 2, 3: 2, 4: 2, 5: 3, 6: 3}  # by number of images; 4 for more
SMALL = 64  # images up to this size are shown with visible pixels
EMPTY = '<div class="im-grid" style="--columns:1;--rows:1"><div class="im-empty">The image appears here.</div></div>'


class Shown(NamedTuple):
    """The images of one stage, as files of the page."""

    title: str
    size: tuple[int, int]  # width, height
    paths: list[str]


def status(text: str, done: int | None = None, total: int = 1) -> str:
    """Return the status line of a drawing, with a progress bar while it runs."""
    bar = ""
    if done is not None:
        numbers = f'aria-valuemin="0" aria-valuemax="{total}" aria-valuenow="{done}"'
        bar = f'<div class="im-bar" role="progressbar" {numbers}><i style="width:{100 * done / total:.1f}%"></i></div>'
    return f'<div class="im-status" role="status"><span>{html.escape(text)}</span>{bar}</div>'


def pictures(stages: Sequence[Shown], caption: str, preview: np.ndarray | None = None) -> str:
    """Return the images of the last stage, large, and those of earlier stages, small.

    Args:
        stages (`list[Shown]`): The stages, in the order in which they ran.
        caption (`str`): Description of the images, for screen readers and below an enlarged image.
        preview (`np.ndarray` of shape `(B, H, W, 3)`, *optional*):
            Prediction of the running stage, in uint8: shown large, and all finished stages small.
    """
    if preview is None:
        *before, last = stages
        large = grid(len(last.paths), figures(last, caption, saves=True))
    else:
        before, (height, width) = list(stages), preview.shape[1:3]
        figure = f'<figure style="--ratio:{width / height:.4f}"><img class="{pixel_class(width, height)}" alt="" src="'
        images = (f'{figure}{data_address(image)}"></figure>' for image in preview)
        large = grid(len(preview), "".join(images))
    return large + "".join(
        f'<div class="im-row"><span>{html.escape(stage.title)}</span>{figures(stage, caption, saves=False)}</div>'
        for stage in reversed(before)
    )


def figures(stage: Shown, caption: str, saves: bool) -> str:
    """
    Return each image as a button that enlarges it; with a download link if `saves`, which the enlarged image always
    has.
    """
    return "".join(figure(stage, path, caption, saves) for path in stage.paths)


def figure(stage: Shown, path: str, caption: str, saves: bool) -> str:
    """
    Return an image, and its enlarged popover, which the browser opens by a click and closes by a click or Escape.
    """
    source, name, key = f"gradio_api/file={quote(path)}", os.path.basename(path), f"im-{secrets.token_hex(6)}"
    label = html.escape(caption)
    image = f'<img src="{source}" alt="{label}" class="{pixel_class(*stage.size)}">'
    save = f'<a href="{source}" download="{html.escape(name)}"'
    link = f'{save} class="im-save" title="{html.escape(name)}">Download</a>' if saves else ""
    width, height = stage.size
    return (
        f'<figure style="--ratio:{width / height:.4f}"><button type="button" popovertarget="{key}" title="Enlarge">{image}</button>{link}</figure>'
        f'<div popover class="im-zoom" id="{key}">{image}<p><span>{label} · {width} x {height} px</span>'
        f'{save}>Download</a><button type="button" popovertarget="{key}" popovertargetaction="hide">Close</button></p></div>'
    )


def pixel_class(width: int, height: int) -> str:
    """Return the CSS class of an image of this size: small images are shown with visible pixels."""
    return "im-small" if max(width, height) <= SMALL else ""


def data_address(pixels: np.ndarray) -> str:
    """Return an image `(H, W, 3)` in uint8 as a data URL."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def grid(count: int, content: Any) -> str:
    """Arrange this number of cells in a grid."""
    columns = COLUMNS.get(count, 4)
    return f'<div class="im-grid" style="--columns:{columns};--rows:{-(-count // columns)}">{content}</div>'
