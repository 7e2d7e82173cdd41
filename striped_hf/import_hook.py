"""Acts on a module when its import has finished, without importing it.

It needs only the standard library, and imports none of torch, transformers and this package:
every Python process that ``striped-hf-run`` starts loads it.
"""

import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Action = Callable[[ModuleType], None]

_actions: dict[str, Action] = {}


def after_import(name: str, action: Action) -> None:
    """Calls ``action`` with the module ``name``, now or whenever an import of it has finished.

    If the module is imported already, the action runs at once. If its import is in progress, the
    action runs at the end of the import. ``importlib.reload`` of the module runs the action again,
    so the action must be idempotent. If the import fails, the importer gets its error unchanged.

    Args:
        name: The module's full name.
        action: It runs in the thread that imports the module. An error in it makes the import fail.
    """
    _actions[name] = action
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    module = sys.modules.get(name)
    if module is None:
        return
    spec: Any = getattr(module, "__spec__", None)
    if type(spec) in (ModuleSpec, _UnfinishedSpec) and spec._initializing:
        spec.__class__ = _UnfinishedSpec
        if spec._initializing:
            return
        spec.__class__ = ModuleSpec  # another thread has finished the import in between
    action(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the finders after it find a module, and watches the module's loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _actions:
            return None
        finders = iter(list(sys.meta_path))
        if self not in finders:  # the search also moves the iterator behind self
            return None
        for finder in finders:
            find_spec = getattr(finder, "find_spec", None)  # legacy finders have none
            spec = None if find_spec is None else find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Wraps a module's loader to run the action after it.

    While the module runs, ``__loader__`` is the module's own loader: modules and tools read it.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec: Any = module.__spec__
        spec.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        # a module may replace itself in sys.modules; importers then get the replacement
        _actions[spec.name](sys.modules.get(spec.name, module))

    def __getattr__(self, name: str) -> Any:  # get_source, get_code, ... for runpy and inspect
        return getattr(self._loader, name)


class _UnfinishedSpec(ModuleSpec):
    """The spec of a module whose import began before ``after_import`` was called.

    It is too late to wrap the module's loader. But in every Python from 3.10 to 3.13, importlib
    marks the end of each import, failed or not, by ``spec._initializing = False``.
    """

    @property
    def _initializing(self) -> bool:
        return self.__dict__["_initializing"]

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        module = sys.modules.get(self.name)
        try:
            if not value and module is not None:  # a failed import has removed its module
                _actions[self.name](module)
        finally:  # last: other threads wait for the action, too
            self.__class__ = ModuleSpec  # type: ignore[assignment]
            self._initializing = value
