"""Packages of the extras of setup.cfg, which are asked for before they are imported."""

import importlib.util


class MissingPackages(ImportError, ValueError):
    """Packages that are not installed: an ImportError for Python, and one line of a command."""


def require_packages(what: str, extra: str, *names: str) -> None:
    """Check that packages are installed, without importing them.

    Args:
        what (`str`): What needs them, for the message.
        extra (`str`): The extra of diffusers-imagen that installs them.
        names (`str`): As they are imported.

    Raises:
        MissingPackages: If some are not; names them and the extra.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackages(f"{what} needs {' and '.join(missing)}: pip install 'diffusers-imagen[{extra}]'")
