"""A package of which every name resolves, to any depth, to something that raises when it is called."""

import sys
import types
import warnings
from importlib.machinery import ModuleSpec
from typing import Any, NoReturn


class Name:
    """What any attribute of a stand-in is."""

    def __init__(self, path: str):
        self._path = path

    def __getattr__(self, name: str) -> "Name":
        if name.startswith("__"):
            raise AttributeError(name)
        return Name(f"{self._path}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{self._path} was called, of which there is only a stand-in")


class Module(types.ModuleType):
    def __getattr__(self, name: str) -> Name:
        if name.startswith("__"):
            raise AttributeError(name)
        return Name(f"{self.__name__}.{name}")


class Finder:
    """Finds every submodule of the package `name`."""

    def __init__(self, name: str):
        self._prefix = f"{name}."

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.startswith(self._prefix) else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def install(name: str) -> None:
    """Makes the package `name`, which is being imported, a stand-in."""
    warnings.warn(f"{name} is a stand-in that computes nothing: for tests on machines without CUDA", stacklevel=3)
    sys.modules[name].__class__ = Module
    sys.meta_path.append(Finder(name))  # type: ignore[arg-type]
