"""Errors of a command as one line and an exit code."""

import errno
import sys
from typing import Callable, Optional

from huggingface_hub.errors import HfHubHTTPError
from PIL.Image import DecompressionBombError
from safetensors import SafetensorError


USAGE = 2  # exit code after a bad argument, as argparse's
INTERRUPTED = 130
# what arguments, files, disks, networks and devices cause; anything else is a fault of this package and keeps its traceback
EXPECTED = (ValueError, OSError, FloatingPointError, MemoryError, DecompressionBombError, SafetensorError)


def run_to_exit_code(run: Callable[[], Optional[int]], program: str) -> int:
    """Calls a command; an expected error is one line on stderr and exit code 2, an interruption exit code 130."""
    try:
        return run() or 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        line = describe(error)
        if line is None:
            raise
        print(f"{program}: error: {line}", file=sys.stderr)
        return USAGE


def describe(error: BaseException) -> Optional[str]:
    """An error as one line; None for an error that nobody expects."""
    if isinstance(error, BrokenPipeError):
        return "the output was closed before everything was written to it."
    if isinstance(error, HfHubHTTPError):
        return f"the Hub refused: {one_line(error)}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the device{of_file(error)}: free some, and run this again."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{of_file(error)}."
    if isinstance(error, MemoryError) or is_out_of_gpu_memory(error):
        return f"out of memory: {one_line(error) or 'ask for less at once'}"
    if isinstance(error, EXPECTED):
        return one_line(error)
    return None


def of_file(error: OSError) -> str:
    """The file that an error of the operating system is about."""
    return f": '{error.filename}'" if error.filename else ""


def is_out_of_gpu_memory(error: BaseException) -> bool:
    """Whether it is torch's error for a full GPU."""
    return type(error).__name__ == "OutOfMemoryError"  # torch takes seconds to import, and need not be


def one_line(error: BaseException) -> str:
    """The text of an error in one line; of one that a DataLoader's worker met, without its traceback."""
    text = str(error).strip()
    if text.startswith("Caught ") and "\nOriginal Traceback (most recent call last):\n" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split()) or type(error).__name__
