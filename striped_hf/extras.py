"""The extras of setup.cfg, and one line for a script that runs without the one it needs."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

# the packages that the scripts import, by the extra that installs them
EXTRAS = {
    "recipes": ("datasets", "evaluate", "matplotlib", "pyarrow", "tiktoken", "tqdm", "wandb"),
    "eval": ("lm_eval",),
}

ExceptHook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]


def explain_missing(hook: ExceptHook) -> ExceptHook:
    """Returns a ``sys.excepthook`` that says what to install where an extra is missing.

    Args:
        hook: It gets every other error.
    """

    def excepthook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        name = error.name if isinstance(error, ModuleNotFoundError) else None
        package = (name or "").split(".")[0]
        for extra, packages in EXTRAS.items():
            if package in packages:
                script = Path(sys.argv[0]).name
                message = f"{package} is not installed: pip install 'striped_hf[{extra}]'"
                print(f"{script}: error: {message}", file=sys.stderr)
                return
        hook(kind, error, traceback)

    return excepthook
