"""Runs unchanged programs, which do not import striped_hf, with its optimizer names known.

    striped-hf-run trl sft --optim striped_adamw_8bit ...
    python -m striped_hf train.py --optim striped_adamw_8bit ...
    accelerate launch -m striped_hf train.py --optim striped_adamw_8bit ...

``striped-hf-run`` runs any command, also one that trains in child processes. It adds a folder to
PYTHONPATH. The folder's ``sitecustomize`` imports striped_hf in each Python process of the command.
``python -m striped_hf`` runs a script or a module in this process, like ``python SCRIPT`` or
``python -m MODULE``. Child processes of the program know the names, too.
"""

import io
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import TracebackType

STARTUP = str(Path(__file__).parent / "startup")
USAGE = """\
usage: striped-hf-run COMMAND [ARGUMENT ...]

Runs COMMAND and its child processes. In all of them transformers knows the optimizers
striped_adamw, striped_adamw_8bit and striped_adamw_4bit:

    striped-hf-run trl sft --optim striped_adamw_8bit ...
    striped-hf-run accelerate launch train.py --optim striped_adamw_8bit ...
"""
PROGRAM_USAGE = """\
usage: python -m striped_hf SCRIPT [ARGUMENT ...]
       python -m striped_hf -m MODULE [ARGUMENT ...]

Runs the script or the module as python would. transformers knows the optimizers striped_adamw,
striped_adamw_8bit and striped_adamw_4bit in it.
"""


def main() -> None:
    """The console command ``striped-hf-run``: replaces its process by the given command."""
    command = sys.argv[1:]
    _print_usage(USAGE, command)
    _reach_children()
    try:
        os.execvp(command[0], command)
    except OSError as error:
        # the exit statuses of a shell
        status = 127 if isinstance(error, FileNotFoundError) else 126
        print(f"striped-hf-run: {command[0]}: {error.strerror}", file=sys.stderr)
        raise SystemExit(status) from None


def run_program(arguments: Sequence[str]) -> None:
    """Runs a script or a module in this process, in place of the current ``__main__``.

    Args:
        arguments: SCRIPT ARGUMENT ..., or -m MODULE ARGUMENT ...
    """
    _print_usage(PROGRAM_USAGE, arguments[1:] if arguments[:1] == ["-m"] else arguments)
    _reach_children()
    if arguments[0] == "-m":
        # as with `python -m`: runpy replaces "-m" by the module's file when it has found it
        sys.argv[:] = ["-m", *arguments[2:]]
        _without_our_frames(lambda: _run_module(arguments[1]))
    else:
        sys.argv[:] = arguments
        _without_our_frames(lambda: _run_script(arguments[0]))


def _print_usage(usage: str, command: Sequence[str]) -> None:
    if command[:1] in (["-h"], ["--help"]):
        print(usage, end="")
        raise SystemExit(0)
    if not command or command[0].startswith("-"):
        print(usage, end="", file=sys.stderr)
        raise SystemExit(2)


def _reach_children() -> None:
    """Sets the environment so that every process started from here knows the names."""
    paths = os.environ.get("PYTHONPATH", "")  # an empty entry would be the current folder
    if STARTUP not in paths.split(os.pathsep):
        os.environ["PYTHONPATH"] = STARTUP + os.pathsep + paths if paths else STARTUP


def _new_main() -> dict[str, object]:
    """Empties the namespace of ``__main__``, which pickle and multiprocessing look at."""
    namespace = sys.modules["__main__"].__dict__
    # the names in a new __main__; __annotations__ only up to Python 3.13
    kept = ("__builtins__", "__annotations__")
    new = {key: value for key, value in namespace.items() if key in kept}
    namespace.clear()
    namespace.update(new, __name__="__main__")
    return namespace


def _run_module(name: str) -> None:
    _new_main()
    # The interpreter calls this function for -m. runpy.run_module would restore sys.argv and
    # __main__ at its end, while the program's threads and exit handlers still run.
    runpy._run_module_as_main(name)  # type: ignore[attr-defined]


def _run_script(path: str) -> None:
    # the interpreter joins a relative path to the current folder and keeps its dots
    file = os.path.join(os.getcwd(), path)
    try:
        with io.open_code(file) as opened:
            source = opened.read()
    except OSError as error:
        message = f"can't open file {file!r}: [Errno {error.errno}] {error.strerror}"
        print(f"{sys.executable}: {message}", file=sys.stderr)
        raise SystemExit(2) from None
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        sys.path[0] = str(Path(file).resolve().parent)
    namespace = _new_main()
    namespace.update(
        __doc__=None,
        __package__=None,
        __loader__=SourceFileLoader("__main__", file),
        __spec__=None,
        __file__=file,
        __cached__=None,
    )
    exec(compile(source, file, "exec", dont_inherit=True), namespace)


def _without_our_frames(program: Callable[[], None]) -> None:
    """Calls ``program``; the traceback of an uncaught error has no frames of this package."""
    try:
        program()
    except (Exception, KeyboardInterrupt) as error:
        _hide_our_frames(error)
        raise


def _hide_our_frames(error: BaseException) -> None:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_code.co_filename == __file__:
        traceback = traceback.tb_next
    hook = sys.excepthook

    def excepthook(
        kind: type[BaseException], error: BaseException, whole: TracebackType | None
    ) -> None:
        hook(kind, error.with_traceback(traceback), traceback)

    sys.excepthook = excepthook
