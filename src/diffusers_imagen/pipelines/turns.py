"""Turns of calls: calls that share a scheduler, which has the state of one run, wait for each other."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

from diffusers import SchedulerMixin


class Turn:
    """Lock of a scheduler that one thread has at a time, and once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.owner: int | None = None

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Context manager that waits for other threads.

        Raises:
            ValueError: If this thread has the lock: it would wait for itself.
        """
        if self.owner == threading.get_ident():
            raise ValueError(
                "The pipeline is called by its own `callback_on_step_end`: call one with other schedulers there, such "
                "as copies."
            )
        with self.lock:
            self.owner = threading.get_ident()
            try:
                yield
            finally:
                self.owner = None


_TURNS: WeakKeyDictionary[SchedulerMixin, Turn] = WeakKeyDictionary()
_TABLE = threading.Lock()


@contextmanager
def turn_of(schedulers: Iterable[SchedulerMixin | None]) -> Iterator[None]:
    """Context manager of a run: waits until no other run uses one of the schedulers.

    Raises:
        ValueError: If a run of this thread uses one.
    """
    with _TABLE:
        turns = {_TURNS.setdefault(one, Turn()) for one in schedulers if isinstance(one, SchedulerMixin)}
    with ExitStack() as stack:
        for turn in sorted(turns, key=id):  # in one order in all threads
            stack.enter_context(turn.taken())
        yield
