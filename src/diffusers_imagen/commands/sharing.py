"""Sharing of a command's work by several processes on one or more hosts, started by `accelerate launch` or torchrun."""

import argparse
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.files import FolderHold


if TYPE_CHECKING:
    from accelerate import PartialState

LONGEST_WAIT = timedelta(days=7)  # of a process for the other processes


@contextmanager
def processes(args: argparse.Namespace) -> Iterator["PartialState"]:
    """
    Context manager for the processes of a command; sets `args.device`, after its checks, to the process's device.
    """
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=torch.device(args.device).type == "cpu", timeout=LONGEST_WAIT)
    if state.num_processes > 1:
        args.device = str(state.device)
    yield state
    if state.num_processes > 1:
        state.destroy_process_group()


@contextmanager
def shared_folder(state: "PartialState", folder: Path, name: str) -> Iterator[None]:
    """Context manager that locks a folder shared by all processes; called by all of them.

    Raises:
        ValueError: In all processes, if another run uses the folder, or a process cannot access it.
    """
    from ..utils.processes import check_shared, on_main_process

    with ExitStack() as stack:

        def hold() -> None:
            stack.enter_context(FolderHold(folder, name))

        on_main_process(state, hold)
        check_shared(state, folder, name)
        yield


def refuse_several(work: str) -> None:
    """Raise ValueError if several processes were started for work that does not support it."""
    count = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and count != "1":
        raise ValueError(f"{work} is the work of one process, but {count} were started.")
