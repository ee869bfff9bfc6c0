"""Signals that ask a run to stop: it ends its step, saves, and says how to go on."""

import signal
import threading
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.utils import logging


logger = logging.get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TrainingInterrupted(Exception):
    """A run was asked to stop, and has saved its state.

    Attributes:
        signum (`int`): The signal that asked.
    """

    def __init__(self, signum: int, checkpoint: str):
        super().__init__(
            f"Stopped by {signal.Signals(signum).name}; everything is in {checkpoint}. "
            "Go on with --resume_from_checkpoint latest."
        )
        self.signum = signum


class Interruption:
    """Inside, SIGTERM and SIGINT are noted; a second one ends the process as usual."""

    def __init__(self):
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # others cannot handle signals
            self._previous = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        self._restore()

    def agreed(self, accelerator: Accelerator) -> int | None:
        """The signal that any process noted: the same answer in all of them, which must ask together."""
        if accelerator.num_processes > 1:
            noted = torch.tensor([self.signum or 0], device=accelerator.device)
            self.signum = int(accelerator.gather(noted).max()) or None
        return self.signum

    def _note(self, signum: int, frame) -> None:
        self.signum = signum
        self._restore()
        logger.warning(f"{signal.Signals(signum).name}: this step will be finished and saved.")

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}
