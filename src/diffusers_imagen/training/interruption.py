"""Handling of signals that stop a run: the current step is finished, and a checkpoint is saved."""

import signal
import threading
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.utils import logging


logger = logging.get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TrainingInterrupted(Exception):
    """Raised when a run was stopped by a signal, after its state was saved.

    Attributes:
        signum (`int`): Number of the signal.
    """

    def __init__(self, signum: int, checkpoint: str):
        super().__init__(
            f"Stopped by {signal.Signals(signum).name}; the state is saved in {checkpoint}. "
            "Continue with --resume_from_checkpoint latest."
        )
        self.signum = signum


class Interruption:
    """Context manager that records SIGTERM and SIGINT; a second signal ends the process as usual."""

    def __init__(self):
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # other threads cannot handle signals
            self._previous = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        self._restore()

    def agreed(self, accelerator: Accelerator) -> int | None:
        """Return the signal that any process recorded, the same in all processes; called by all of them."""
        if accelerator.num_processes > 1:
            noted = torch.tensor([self.signum or 0], device=accelerator.device)
            self.signum = int(accelerator.gather(noted).max()) or None
        return self.signum

    def _note(self, signum: int, frame) -> None:
        self.signum = signum
        self._restore()
        logger.warning(f"{signal.Signals(signum).name}: stopping after this step, with a checkpoint.")

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}
