"""Scripts as modules, with their neighbours importable, as Python has them when they are run."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest


SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@contextmanager
def script_module(name: str) -> Iterator[ModuleType]:
    """Import a script of scripts/ by its name; at the end its modules and its neighbours' are as they were."""
    names = [path.stem for path in SCRIPTS.glob("*.py")]
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(SCRIPTS))
            yield importlib.import_module(name)
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)
