"""Commands whose work several processes share, on one host or on several, as `accelerate launch` and torchrun start them."""

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

LONGEST_WAIT = timedelta(days=7)  # of a process for the others


@contextmanager
def processes(args: argparse.Namespace) -> Iterator["PartialState"]:
    """Inside, the processes that share a command; `args.device`, which was checked, becomes the one of this process."""
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
    """Inside, other runs are kept out of a folder that all processes see; all of them call this.

    Raises:
        ValueError: In all processes, if another run has the folder, or a process does not see it.
    """
    from ..utils.processes import check_shared, on_main_process

    with ExitStack() as stack:

        def hold() -> None:
            stack.enter_context(FolderHold(folder, name))

        on_main_process(state, hold)
        check_shared(state, folder, name)
        yield


def refuse_several(work: str) -> None:
    """Raise ValueError if several processes were started for what one process does."""
    count = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and count != "1":
        raise ValueError(f"{work} is the work of one process, but {count} were started.")
