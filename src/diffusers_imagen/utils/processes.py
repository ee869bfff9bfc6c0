"""Helpers for multiple processes: work of the main process for all, gathering, and checks of shared folders."""

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from .files import OWNER, FolderHold


Result = TypeVar("Result")
LONGEST_WAIT = timedelta(days=7)  # of a process for the others
SIGHT = 5.0  # seconds in which a network file system shows a new file to other hosts


class Processes(Protocol):
    """What accelerate's `Accelerator` and `PartialState` know of the processes that were started together."""

    process_index: int
    num_processes: int
    is_main_process: bool

    def wait_for_everyone(self) -> None:
        """Wait until all processes have called this."""


class OneProcess:
    """Replacement of `PartialState` for work in a single process."""

    process_index, num_processes, is_main_process = 0, 1, True

    def wait_for_everyone(self) -> None:
        """Return immediately, because there are no other processes."""


@contextmanager
def shared_work(device: str) -> Iterator[tuple[PartialState, str]]:
    """Context of work that the processes of `accelerate launch` or torchrun share: the processes, and the device of this
    one, which is `device` if there is only one process."""
    state = PartialState(cpu=torch.device(device).type == "cpu", timeout=LONGEST_WAIT)
    yield state, device if state.num_processes == 1 else str(state.device)
    if state.num_processes > 1:
        leave_group(state)


def leave_group(state: PartialState) -> None:
    """Leave the process group when all processes call this.

    In torch 2.6, a thread of gloo frees the tensors of the last communication, for which it needs the interpreter's
    lock, while the destructor of the group has this lock and waits for the thread. The barrier, which has no tensors
    of Python, gives it the time.
    """
    state.wait_for_everyone()
    state.destroy_process_group()


def refuse_several(work: str) -> None:
    """Raise ValueError if several processes were started for work that one process does."""
    count = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and count != "1":
        raise ValueError(f"{work} runs in one process, but {count} were started.")


def on_main_process(state: Processes, do: Callable[[], Result]) -> Result:
    """Call a function in the main process; all processes return its result or raise its error, so that all continue
    or all end. All processes must call this."""
    result: Any = None
    failure = None
    if state.is_main_process:
        try:
            result = do()
        except (ValueError, OSError) as error:
            failure = error
    if state.num_processes > 1:
        outcome = broadcast_object_list([result, None if failure is None else str(failure)])
        result, reason = outcome
        if failure is None and reason is not None:
            failure = ValueError(reason)
    if failure is not None:
        raise failure
    return result


def in_turn(state: Processes, do: Callable[[], Result]) -> Result:
    """Call a function in every process, in the main process first, which downloads; all processes must call this.

    Raises:
        ValueError: In all processes, if it fails in the main process.
    """
    found: list[Result] = []
    on_main_process(state, lambda: found.append(do()))
    return found[0] if found else do()


def gather(state: Processes, value: Result) -> list[Result]:
    """Return the values of all processes, by process index; all processes must call this."""
    return [value] if state.num_processes == 1 else gather_object([value])


def check_shared(state: Processes, folder: Path, name: str) -> None:
    """Check that all processes see the same folder, those on other hosts too; all processes must call this.

    Args:
        state ([`~accelerate.PartialState`]): The processes.
        folder (`Path`): The folder, which the main process has created.
        name (`str`): The argument's name, for the message.

    Raises:
        ValueError: In all processes, if one of them does not see a file that the main process writes.
    """
    if state.num_processes == 1:
        return
    # named like an unfinished file, which the next run removes if this one is killed
    token = folder / on_main_process(state, lambda: f".{OWNER}.{secrets.randbits(60)}.partial")
    on_main_process(state, token.touch)
    end = time.monotonic() + SIGHT
    while not (is_seen := token.is_file()) and time.monotonic() < end:
        time.sleep(0.1)
    hosts = [host for host in gather(state, None if is_seen else socket.gethostname()) if host is not None]
    if state.is_main_process:
        token.unlink()
    if hosts:
        raise ValueError(
            f"`{name}` is '{folder}', which {hosts[0]} does not see as the main process does: all hosts need it on a "
            "file system that they share."
        )


@contextmanager
def shared_folder(state: Processes, folder: Path, name: str) -> Iterator[None]:
    """Context in which the main process locks a folder for all processes, which must all call this.

    A folder that does not exist is created, and removed at the end if nothing was written to it.

    Raises:
        ValueError: In all processes, if another run uses the folder, or a process does not see it.
    """
    with ExitStack() as stack:

        def hold() -> None:
            stack.enter_context(FolderHold(folder, name))

        on_main_process(state, hold)
        check_shared(state, folder, name)
        yield
