"""The extras of setup.cfg, and the error of a script whose extra is not installed."""

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
    """Returns a ``sys.excepthook`` that says how to install a missing extra.

    Args:
        hook: The hook for every other error.
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
