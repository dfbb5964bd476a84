"""Stand in for the package torchmetrics until somebody asks for more of it than Lightning does.

Lightning needs two base classes of torchmetrics, and importing it imports a hundred metrics, matplotlib and parts of
transformers: a quarter of the CPU time that the imports of a rank take. The stand-in is the package's own module
object, not yet filled: the two classes are the real ones, and whatever else is asked for fills it by running the
package's `__init__`. A metric function of a user that imports torchmetrics gets all of it.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import logging
import sys
import types

_PACKAGE = "torchmetrics"

_ASKED_FOR = {"Metric": f"{_PACKAGE}.metric", "MetricCollection": f"{_PACKAGE}.collections"}
"""What Lightning imports from the package, and the modules that define it."""

_FLAGS = f"{_PACKAGE}.utilities.imports"
_PLOTS = f"{_PACKAGE}.utilities.plot"
_HAS_MATPLOTLIB = "_MATPLOTLIB_AVAILABLE"


def install() -> None:
    """Put the stand-in where `import torchmetrics` finds it. Does nothing where torchmetrics is loaded or missing."""
    spec = None if _PACKAGE in sys.modules else importlib.util.find_spec(_PACKAGE)
    if spec is None:
        return
    module = importlib.util.module_from_spec(spec)
    module.__class__ = _OnDemand
    setattr(module, "_logger", logging.getLogger(_PACKAGE))  # noqa: B010  (the submodules take it from here)
    sys.modules[_PACKAGE] = module


class _OnDemand(types.ModuleType):
    """The package before its `__init__` has run."""

    def __getattr__(self, name: str) -> object:
        """Return an attribute that is not there yet, with as much of the package as it takes."""
        if name in _ASKED_FOR:
            return getattr(_without_matplotlib(_ASKED_FOR[name], self.__path__[0]), name)
        if name.startswith("__") and name != "__all__":  # asked of any module; the version is among them
            return getattr(importlib.import_module(f"{_PACKAGE}.__about__"), name)
        _fill(self)
        return getattr(self, name)


def _without_matplotlib(name: str, package: str) -> types.ModuleType:
    """Import a module of the package as where matplotlib is not installed."""
    flags = sys.modules.get(_FLAGS) or _load_alone(_FLAGS, f"{package}/utilities")
    found = getattr(flags, _HAS_MATPLOTLIB, False)
    setattr(flags, _HAS_MATPLOTLIB, False)
    try:
        importlib.import_module(f"{_PACKAGE}.utilities")  # first, because it and the base classes import each other
        return importlib.import_module(name)
    finally:
        setattr(flags, _HAS_MATPLOTLIB, found)


def _load_alone(name: str, folder: str) -> types.ModuleType:
    """Import a module before the package it is in: importing that one reads what is to be set in this one."""
    spec = importlib.machinery.PathFinder.find_spec(name, [folder])
    assert spec is not None and spec.loader is not None, f"{folder} has no {name}"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _fill(module: types.ModuleType) -> None:
    """Run the package's `__init__` in its module, which is an ordinary one from here on."""
    module.__class__ = types.ModuleType
    if _PLOTS in sys.modules:
        importlib.reload(sys.modules[_PLOTS])  # with matplotlib; its functions that others hold see what it has now
    assert module.__spec__ is not None and module.__spec__.loader is not None, "it was made from its spec"
    module.__spec__.loader.exec_module(module)
