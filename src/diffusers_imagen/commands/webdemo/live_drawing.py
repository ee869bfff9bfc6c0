"""A call of a pipeline in another thread, which tells how far it is after every call of a network."""

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
    """How far a drawing is."""

    calls: int  # of networks, done
    total: int
    stage: Stage | None  # that runs; None at the end
    stage_images: dict[int, list[Image.Image]]  # of the stages that have finished, by resolution
    preview: np.ndarray | None = (
        None  # (B, H, W, 3) in uint8: what the running stage predicts, if it is time to show it
    )


class Drawing:
    """One call: its pipeline, the stages that run, and what they have made so far."""

    def __init__(self, pipe: DiffusionPipeline, stages: list[Stage]):
        self.pipe, self.stages = pipe, stages
        self.events: queue.Queue = queue.Queue()
        self.stopped = threading.Event()
        self.made: dict[int, torch.Tensor] = {}  # by the stages that have finished, in [-1, 1]
        self.finished: dict[int, Any] = {}
        self.last: torch.Tensor | None = None
        self.place = 0  # of the running stage
        self.shown = 0.0  # when the last preview was made
        # a preview would pass by what looks at finished pictures
        self.previews = pipe.safety_checker is None and pipe.watermarker is None

    def on_step_end(self, pipe: DiffusionPipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict:
        """The callback of the pipeline."""
        latents = tensors["latents"]  # (B, C, H, W) of the stage that runs
        if self.last is not None and self.last.shape != latents.shape:
            self.made[self.stages[self.place].resolution] = self.last.clamp(-1, 1)
            # all of them again: an image that is flagged at one stage is black at the others too
            self.finished.update(finish_images(pipe, self.made, "pil").images)
            self.place += 1
        self.last = latents
        if self.stopped.is_set():
            pipe._interrupt = True
        stage, preview = self.stages[self.place], self.preview_of(tensors[PREDICTED])
        self.events.put(Progress(step + 1, pipe.num_timesteps, stage, dict(self.finished), preview))
        return {}

    def preview_of(self, predicted: torch.Tensor | None) -> np.ndarray | None:
        """The predicted clean images `(B, 3, H, W)` as pixels `(B, H, W, 3)`, if there are any and the last are old."""
        if not self.previews or predicted is None or time.monotonic() - self.shown < PREVIEW_SECONDS:
            return None
        every = -(-max(predicted.shape[-2:]) // PREVIEW_PIXELS)
        pixels = predicted[:, :, ::every, ::every].clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
        self.shown = time.monotonic()
        return pixels.movedim(1, -1).cpu().numpy()

    def run(self, turn: threading.Lock, arguments: dict[str, Any]) -> None:
        """Calls the pipeline, which `turn` is held for; the last event is None."""
        try:
            with turn:
                if not self.stopped.is_set():
                    self.call(arguments)
        except Exception as error:  # raised again where the caller waits
            self.events.put(error)
        self.events.put(None)

    def call(self, arguments: dict[str, Any]) -> None:
        """Calls the pipeline; the event after those of its steps has what it returns."""
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
    """Runs a pipeline in another thread, and yields after every network call.

    A stage's images come with the first call of the stage after it. Closing the iterator stops the pipeline,
    whose errors it raises.

    Args:
        pipe ([`DiffusionPipeline`]): What draws.
        stages (`list[Stage]`): Those of its stages that run, in order.
        turn (`threading.Lock`): Of the pipeline, which does one call at a time: one that was stopped ends its step first.
        arguments: Of the pipeline's call.
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
