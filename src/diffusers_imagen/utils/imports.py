"""Imports that wait: names of a package that load when they are used, and functions that run after a module's import."""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, Iterable[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the `__getattr__` and `__dir__` (PEP 562) of a package that imports a name's module when the name is used.

    Args:
        package (`str`): The package's name.
        modules (`Mapping[str, Iterable[str]]`): By module, the names that are taken from it. A module of the package
            begins with a dot and is an attribute of the package itself, with names or without.
    """
    homes = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if f".{name}" in modules:
            return importlib.import_module(f".{name}", package)
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(homes[name], package), name)
        setattr(sys.modules[package], name, value)  # once is enough
        return value

    def names() -> list[str]:
        submodules = (module[1:] for module in modules if module.startswith(".") and "." not in module[1:])
        return sorted({*vars(sys.modules[package]), *homes, *submodules})

    return get, names


def after_import(name: str, then: Callable[[ModuleType], None]) -> None:
    """Call a function with a module: now if it is imported, else when it has been; no module is imported for it."""
    if name in sys.modules:
        then(importlib.import_module(name))  # waits for a thread that is importing it
        return
    if FINDER not in sys.meta_path:
        sys.meta_path.insert(0, FINDER)
    FINDER.waiting[name] = then


class AwaitedModules(importlib.abc.MetaPathFinder):
    """Leaves it to the other finders where awaited modules are, and to their loaders to load them."""

    def __init__(self) -> None:
        self.waiting: dict[str, Callable[[ModuleType], None]] = {}

    def find_spec(self, fullname, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = AwaitedLoader(spec.loader, self.waiting[fullname])
        return spec


class AwaitedLoader(importlib.abc.Loader):
    """The loader of one module, which is followed by a call; a module that is loaded has its own loader."""

    def __init__(self, loader: Any, then: Callable[[ModuleType], None]) -> None:
        self.loader, self.then = loader, then

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.then(sys.modules[module.__spec__.name])  # diffusers' packages put another module in their place

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


FINDER = AwaitedModules()
