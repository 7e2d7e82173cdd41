"""Actions after the import of a module, for every way to import it."""

import importlib
import inspect
import sys
import textwrap
import threading
from collections.abc import Callable
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

from striped_hf.import_hook import after_import

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request) -> Write:
    """Writes a module that can be imported, and returns its name, which is new in each test."""
    monkeypatch.syspath_prepend(tmp_path)
    name = "_".join(
        ["hooked", *"".join(c if c.isalnum() else " " for c in request.node.name).split()]
    )

    def write(source: str) -> str:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        importlib.invalidate_caches()
        return name

    yield write
    sys.modules.pop(name, None)


def mark(module: ModuleType) -> None:
    """The hook's action: counts its calls, and keeps observations."""
    module.ran = getattr(module, "ran", 0) + 1
    module.seen = getattr(module, "last_line", None)


def test_an_import_after_the_call(write: Write) -> None:
    name = write(
        """
        loader = type(__loader__), type(__spec__.loader)
        def function(): pass
        last_line = 1
        """
    )
    after_import(name, mark)
    assert name not in sys.modules
    module = importlib.import_module(name)
    assert (module.ran, module.seen) == (1, 1)
    # the module has no trace of the hook, neither now nor while it ran
    assert module.loader == (SourceFileLoader, SourceFileLoader)
    assert (type(module.__loader__), type(module.__spec__)) == (SourceFileLoader, ModuleSpec)
    assert module.__spec__.loader is module.__loader__
    assert "def function" in inspect.getsource(module.function)
    assert importlib.util.find_spec(name) is module.__spec__


def test_an_import_before_the_call(write: Write) -> None:
    module = importlib.import_module(write("last_line = 1"))
    after_import(module.__name__, mark)
    assert (module.ran, module.seen) == (1, 1)


def test_an_import_in_progress(write: Write) -> None:
    name = write(
        """
        from striped_hf.import_hook import after_import
        from test_import_hook import mark
        for _ in range(2):
            after_import(__name__, mark)
        during = "ran" in globals()
        last_line = 1
        """
    )
    module = importlib.import_module(name)
    assert not module.during
    assert (module.ran, module.seen) == (1, 1)
    assert type(module.__spec__) is ModuleSpec
    assert importlib.import_module(name) is module
    assert module.ran == 1


def test_reloading_runs_the_action_again(write: Write) -> None:
    module = importlib.import_module(write("last_line = 1"))
    after_import(module.__name__, mark)
    write("last_line = 'another'\n")
    assert importlib.reload(module) is module
    assert (module.ran, module.seen) == (2, "another")
    assert type(module.__loader__) is SourceFileLoader


@pytest.mark.parametrize("begun", [False, True], ids=["later", "unfinished"])
def test_a_failing_import_fails_as_before(write: Write, begun: bool) -> None:
    begin = """
        from striped_hf.import_hook import after_import
        after_import(__name__, print)
        """
    name = write((begin if begun else "") + "import no_such_module")
    ran: list[ModuleType] = []
    if not begun:
        after_import(name, ran.append)
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_module'") as caught:
        importlib.import_module(name)
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert caught.traceback[-1].path.name == f"{name}.py"
    assert name not in sys.modules
    after_import(name, ran.append)
    assert ran == []
    # and after a repair
    write("last_line = 'repaired'\n")
    assert ran == [importlib.import_module(name)]


def test_a_module_that_replaces_itself(write: Write) -> None:
    """transformers/__init__.py does this."""
    name = write(
        """
        import sys
        from types import ModuleType
        sys.modules[__name__] = ModuleType("another")
        """
    )
    ran: list[ModuleType] = []
    after_import(name, ran.append)
    assert ran == [importlib.import_module(name)] == [sys.modules[name]]
    assert ran[0].__name__ == "another"


@pytest.mark.parametrize("begun", [False, True], ids=["later", "unfinished"])
def test_threads_that_import_together_wait_for_the_action(write: Write, begun: bool) -> None:
    name = write(
        """
        import test_import_hook
        test_import_hook.running.set()
        test_import_hook.go_on.wait(60)
        last_line = 1
        """
    )
    sys.modules["test_import_hook"] = sys.modules[__name__]  # the same events
    running.clear()
    go_on.clear()
    if not begun:
        after_import(name, mark)
    seen: list[int] = []
    threads = [
        threading.Thread(target=lambda: seen.append(importlib.import_module(name).ran))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    assert running.wait(60)
    if begun:
        after_import(name, mark)
    assert not hasattr(sys.modules[name], "ran")
    go_on.set()
    for thread in threads:
        thread.join(60)
    # each thread got the module after the action
    assert seen == [1] * 4


running, go_on = threading.Event(), threading.Event()


def test_other_imports_are_unchanged(write: Write) -> None:
    after_import("some_other_module", mark)
    module = importlib.import_module(write("last_line = 1"))
    assert not hasattr(module, "ran")
    assert sum(type(finder).__module__ == "striped_hf.import_hook" for finder in sys.meta_path) == 1
