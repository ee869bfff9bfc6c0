"""Pipeline calls in another thread, with progress after every network call."""

import queue
import threading
import time
from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ...pipelines.callbacks import PREDICTED
from ...pipelines.content_filter import finish_images
from ...pipelines.stages import Stage


PREVIEW_SECONDS = 0.5  # between previews
PREVIEW_PIXELS = 256  # height or width at most


class Progress(NamedTuple):
    """Progress of a drawing."""

    calls: int  # completed network calls
    total: int
    stage: Stage | None  # the running stage; None at the end
    stage_images: dict[int, list[Image.Image]]  # of the finished stages, by resolution
    preview: np.ndarray | None = None  # (B, H, W, 3) in uint8: prediction of the running stage, at intervals


class Drawing:
    """State of one call: its pipeline, the stages that run, and their images so far."""

    def __init__(self, pipe: DiffusionPipeline, stages: list[Stage]):
        self.pipe, self.stages = pipe, stages
        self.events: queue.Queue = queue.Queue()
        self.stopped = threading.Event()
        self.made: dict[int, torch.Tensor] = {}  # images of the finished stages, in [-1, 1]
        self.finished: dict[int, Any] = {}
        self.last: torch.Tensor | None = None
        self.place = 0  # index of the running stage
        self.shown = 0.0  # time of the last preview
        # previews would bypass the safety checker and the watermarker
        self.previews = pipe.safety_checker is None and pipe.watermarker is None

    def on_step_end(self, pipe: DiffusionPipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict:
        """Callback of the pipeline."""
        latents = tensors["latents"]  # (B, C, H, W) of the running stage
        if self.last is not None and self.last.shape != latents.shape:
            self.made[self.stages[self.place].resolution] = self.last.clamp(-1, 1)
            # all of them again: an image that is flagged at one stage is black at the other stages too
            self.finished.update(finish_images(pipe, self.made, "pil").images)
            self.place += 1
        self.last = latents
        if self.stopped.is_set():
            pipe._interrupt = True
        stage, preview = self.stages[self.place], self.preview_of(tensors[PREDICTED])
        self.events.put(Progress(step + 1, pipe.num_timesteps, stage, dict(self.finished), preview))
        return {}

    def preview_of(self, predicted: torch.Tensor | None) -> np.ndarray | None:
        """Return the predicted clean images `(B, 3, H, W)` as pixels `(B, H, W, 3)`, if any, at intervals."""
        if not self.previews or predicted is None or time.monotonic() - self.shown < PREVIEW_SECONDS:
            return None
        every = -(-max(predicted.shape[-2:]) // PREVIEW_PIXELS)
        pixels = predicted[:, :, ::every, ::every].clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
        self.shown = time.monotonic()
        return pixels.movedim(1, -1).cpu().numpy()

    def run(self, turn: threading.Lock, arguments: dict[str, Any]) -> None:
        """Call the pipeline while holding `turn`; the last event is None."""
        try:
            with turn:
                if not self.stopped.is_set():
                    self.call(arguments)
        except Exception as error:  # raised again in the caller's thread
            self.events.put(error)
        self.events.put(None)

    def call(self, arguments: dict[str, Any]) -> None:
        """Call the pipeline; the event after those of its steps has the results."""
        out = self.pipe(
            callback_on_step_end=self.on_step_end,
            callback_on_step_end_tensor_inputs=["latents", PREDICTED],
            **arguments,
        )
        total = self.pipe.num_timesteps
        self.events.put(Progress(total, total, None, out.stage_images))


def draw(
    pipe: DiffusionPipeline, stages: list[Stage], turn: threading.Lock, **arguments: Any
) -> Generator[Progress, None, None]:
    """Run a pipeline in another thread, and yield after every network call.

    A stage's images are included from the first call of the next stage. Closing the iterator stops the pipeline;
    errors of the pipeline are raised by the iterator.

    Args:
        pipe ([`DiffusionPipeline`]): The pipeline.
        stages (`list[Stage]`): The stages that run, in order.
        turn (`threading.Lock`): Lock of the pipeline, for one call at a time: a stopped call first ends its step.
        arguments: Arguments of the call.
    """
    drawing = Drawing(pipe, stages)
    thread = threading.Thread(target=drawing.run, args=(turn, arguments), daemon=True)
    thread.start()
    try:
        while (event := drawing.events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event
    finally:
        drawing.stopped.set()
        thread.join()
