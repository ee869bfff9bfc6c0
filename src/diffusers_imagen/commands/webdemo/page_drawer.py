"""Actions of the page's buttons: a drawing with progress, whose images are saved to temporary files."""

import logging
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from diffusers import DiffusionPipeline
from gradio.utils import get_upload_folder
from PIL import Image

from ..common import save_image, slug_of
from ..picture_settings import describe_call
from . import page_html
from .live_drawing import Progress, draw
from .page_requests import DrawingRequest, generator_of, read_request, refusal
from .page_tasks import Task, stage_title


SECONDS_BETWEEN_REPORTS = 0.1  # of the status, so that a fast network does not wait

logger = logging.getLogger(__name__)


class Shared(NamedTuple):
    """Objects that the tabs of a page share."""

    turn: threading.Lock  # lock of the pipeline
    pictures: set[str]  # the paths of files that are deleted after a while


class Drawer:
    """Action of a tab's button.

    Args:
        pipe ([`DiffusionPipeline`]): The pipeline.
        task ([`Task`]): Task of the tab.
        sources (`dict[str, str]`): Folders and Hub ids of the model, for the settings in the files.
        page ([`Shared`]): Objects that the tabs share.
    """

    def __init__(self, pipe: DiffusionPipeline, task: Task, sources: Mapping[str, str], page: Shared):
        self.pipe, self.task, self.sources, self.page = pipe, task, sources, page
        self.names: list[str] = []  # of the tab's fields, in the order of the values of a request

    def run(self, *values: Any) -> Iterator[list[Any]]:
        """Generate images, and yield the values of `Outputs`; raises gr.Error."""
        if len(values) != len(self.names):
            raise refusal(f"There should be {len(self.names)} values, not {len(values)}.")
        request = read_request(self.task, dict(zip(self.names, values)))
        skip = gr.skip()
        yield [page_html.status("Encoding the prompt ...", 0), page_html.EMPTY, request.seed, skip]
        progress = draw(
            self.pipe, self.task.stages, self.page.turn, generator=generator_of(request), **request.arguments
        )
        try:
            yield from self.reports(request, progress)
        except (ValueError, FloatingPointError) as error:
            raise refusal(str(error)) from error
        except gr.Error:
            raise
        except Exception as error:  # its text could contain details of the server
            logger.exception("A drawing failed")
            raise refusal("The request failed; see the log of the server for the reason.") from error
        finally:
            progress.close()

    def reports(self, request: DrawingRequest, progress: Iterator[Progress]) -> Iterator[list[Any]]:
        """Yield what the page shows during the drawing, and at its end."""
        began = reported = time.monotonic()
        shown: dict[int, page_html.Shown] = {}
        caption, skip = f"{request.arguments.get('prompt') or self.task.title}, seed {request.seed}", gr.skip()
        for calls, total, stage, images, preview in progress:
            is_new = images.keys() != shown.keys()
            if not (is_new or preview is not None) and time.monotonic() - reported < SECONDS_BETWEEN_REPORTS:
                continue
            reported = time.monotonic()
            if stage is None:  # the last event: all images as returned by the pipeline
                shown = {resolution: self.keep(request, resolution, images) for resolution in sorted(images)}
                text = f"Done in {reported - began:.1f} s, seed {request.seed}."
                files = shown[self.task.resolution].paths
                yield [page_html.status(text), page_html.pictures(list(shown.values()), caption), request.seed, files]
                return
            for resolution in images.keys() - shown.keys():
                shown[resolution] = self.keep(request, resolution, images)
            view = (
                page_html.pictures(list(shown.values()), caption, preview) if is_new or preview is not None else skip
            )
            text = f"{stage_title(stage)}: network call {calls} of {total}, seed {request.seed}"
            yield [page_html.status(text, calls, total), view, skip, skip]

    def keep(
        self, request: DrawingRequest, resolution: int, images: Mapping[int, list[Image.Image]]
    ) -> page_html.Shown:
        """Write the images of one stage to temporary files, named by prompt and seed."""
        done = [ran for ran in self.task.stages if ran.resolution <= resolution]
        resolutions = [ran.resolution for ran in done]
        arguments = dict(request.arguments)
        for name in ("num_inference_steps", "guidance_scale"):
            arguments[name] = arguments[name][: len(done)]
        settings = describe_call(self.task.name, self.pipe, resolutions, self.sources, arguments)
        title, last = stage_title(done[-1]), resolution == self.task.resolution
        stem = f"{slug_of(arguments.get('prompt') or self.task.name) or self.task.name}-seed{request.seed}"
        folder, paths = Path(get_upload_folder(), secrets.token_hex(16)), []
        for i, image in enumerate(images[resolution]):
            name = stem + f"-{i}" * (len(images[resolution]) > 1) + ("" if last else f"-{resolution}px")
            paths.append(str(folder / f"{name}.png"))
            self.page.pictures.add(paths[-1])
            save_image(image, folder / f"{name}.png", settings | {"seed": request.seed, "image": i})
        return page_html.Shown(title, images[resolution][0].size, paths)
