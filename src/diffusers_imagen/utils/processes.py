"""Helpers for multiple processes: work of the main process for all."""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list


Result = TypeVar("Result")


def on_main_process(state: Accelerator | PartialState, do: Callable[[], Result]) -> Result:
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
