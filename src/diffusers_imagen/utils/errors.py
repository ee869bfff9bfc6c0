"""Command line errors: one line on stderr, and an exit code."""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from huggingface_hub import errors as hub_errors
from huggingface_hub.errors import HfHubHTTPError
from PIL.Image import DecompressionBombError
from safetensors import SafetensorError


USAGE = 2  # exit code for invalid arguments, as in argparse
INTERRUPTED = 130
# errors of requests to the Hub: the base error of the installed HTTP client, and broken or timed-out connections
NETWORK = (HfHubHTTPError, getattr(hub_errors, "HTTPError", HfHubHTTPError), ConnectionError, TimeoutError)
# errors from arguments, files, disks, networks and devices; others are bugs of this package and keep their traceback
EXPECTED = (ValueError, OSError, FloatingPointError, MemoryError, DecompressionBombError, SafetensorError)


def run_to_exit_code(run: Callable[[], int | None], program: str) -> int:
    """Run a command; an expected error gives one line on stderr and exit code 2, an interruption exit code 130."""
    open_missing_streams()
    try:
        code = run() or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        line = describe(error)
        if line is None:
            raise
        print(f"{program}: error: {line}", file=sys.stderr)
        return USAGE
    finally:
        give_up_broken_stdout()


def run_program(run: Callable[[], int | None]) -> NoReturn:
    """Call what a file with a command line of its own does, and end the process with the exit code, as above."""
    sys.exit(run_to_exit_code(run, Path(sys.argv[0]).name))


def open_missing_streams() -> None:
    """Discard what is written to standard streams that were closed before the start, which Python sets to None."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))


def give_up_broken_stdout() -> None:
    """Prevent a second error when the interpreter closes a broken or full standard output."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def describe(error: BaseException) -> str | None:
    """Return an expected error as one line; None for an unexpected error."""
    if isinstance(error, BrokenPipeError):
        return "the output was closed before everything was written to it."
    if isinstance(error, HfHubHTTPError):
        return f"the Hub rejected the request: {one_line(error)}"
    if isinstance(error, NETWORK) and not isinstance(error, OSError):
        return f"the network failed: {one_line(error)}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the device{of_file(error)}: free some, and run this again."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{of_file(error)}."
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        return f"out of memory: {one_line(error) or 'ask for less at once'}"
    if isinstance(error, EXPECTED):
        return one_line(error)
    return None


def of_file(error: OSError) -> str:
    """Return the file named by an OSError, for messages."""
    return f": '{error.filename}'" if error.filename else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is torch's out-of-memory error, on a GPU or a CPU."""
    # avoids importing torch, which takes seconds
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate" in str(error)


def one_line(error: BaseException) -> str:
    """Return the text of an error in one line, without the traceback of a DataLoader worker."""
    text = str(error).strip()
    if text.startswith("Caught ") and "\nOriginal Traceback (most recent call last):\n" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split()) or type(error).__name__


def describe_fault(error: Exception) -> str:
    """Return the first line of a library's error about a file, with its type if the text is uninformative."""
    lines = str(error).strip().splitlines()
    kind = "" if isinstance(error, (OSError, ValueError)) and lines else f"{type(error).__name__}: "
    return kind + (lines[0][:300] if lines else "")
