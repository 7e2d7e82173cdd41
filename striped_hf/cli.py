"""What the scripts share: a failure that the user can fix ends a script with one line.

Importing this module is enough for one such failure: a package of an extra that is not installed,
also where a script's own imports need it.
"""

import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

# setup.cfg's extras, by the packages that the scripts import of them
_EXTRAS = {
    "recipes": ("datasets", "evaluate", "matplotlib", "pyarrow", "tiktoken", "tqdm", "wandb"),
    "eval": ("lm_eval",),
}


class UserError(Exception):
    """A failure that the user can fix; its message is one line that says how."""


def run(main: Callable[[], None]) -> None:
    """Runs a script's main; a ``UserError`` or ``OSError`` ends it with one line and status 1."""
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"{_script()}: error: {error}")


def _script() -> str:
    return Path(sys.argv[0]).name


def _explain_missing_extra(
    kind: type[BaseException],
    error: BaseException,
    traceback: TracebackType | None,
    hook: Callable[..., Any] = sys.excepthook,
) -> None:
    """The ``sys.excepthook`` of scripts: one line where an extra is missing, else as before."""
    package = str(error.name).split(".")[0] if isinstance(error, ModuleNotFoundError) else None
    for extra, packages in _EXTRAS.items():
        if package in packages:
            message = f"{package} is not installed: pip install 'striped_hf[{extra}]'"
            print(f"{_script()}: error: {message}", file=sys.stderr)
            return
    hook(kind, error, traceback)


sys.excepthook = _explain_missing_extra


def is_main_process() -> bool:
    """Tells whether this process is to print and write: the only one, or a launch's first."""
    return os.environ.get("RANK", "0") == "0"


def load_pretrained(auto_class: Any, name_or_path: str) -> Any:
    """Calls ``auto_class.from_pretrained``.

    Args:
        auto_class: Such as ``AutoModelForCausalLM`` or ``AutoTokenizer``.
        name_or_path: A local folder, or a name on the hub.

    Raises:
        UserError: It is no such folder and the hub does not give it.
    """
    try:
        return auto_class.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load {name_or_path}: pass a local folder that holds the model and its "
            f"tokenizer, or a hub's name where there is a network ({one_line(error)})"
        ) from error


def model_names(paths: Sequence[str]) -> dict[str, str]:
    """Maps what results call the models, hub names or names of folders, to where they are.

    Raises:
        UserError: Two folders have one name.
    """
    names = {Path(path).resolve().name if Path(path).is_dir() else path: path for path in paths}
    if len(names) < len(set(paths)):
        raise UserError(
            f"models {' '.join(paths)}: the results call a folder by its name, so no two may have "
            "the same one; rename one, or evaluate them apart"
        )
    return names


def one_line(error: Exception) -> str:
    """Returns an error's message, cut to fit into a line."""
    return textwrap.shorten(str(error), 160)
