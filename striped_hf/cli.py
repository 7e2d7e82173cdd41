"""Helpers of the scripts. A failure that the user can fix ends a script with one line."""

import gc
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from striped_hf.extras import explain_missing

# set here: the scripts' other imports come after this one and before run()
sys.excepthook = explain_missing(sys.excepthook)


class UserError(Exception):
    """A failure that the user can fix; its message is one line and names the fix."""


def run(main: Callable[[], None]) -> None:
    """Runs a script's main. ``UserError`` and ``OSError`` end it with one line and status 1.

    A process group that main() began is destroyed after it, when its models are gone.
    """
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    destroy_process_group()


def destroy_process_group() -> None:
    """Destroys the process group, if there is one, after the function that holds the model.

    A thread of gloo that still holds a tensor when the interpreter ends aborts the process
    (pytorch/pytorch#190489). The group's destructor waits for the threads.
    """
    torch = sys.modules.get("torch")  # some scripts work without it
    if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # a DDP model keeps the group alive, and may be part of a cycle
        torch.distributed.destroy_process_group()


def is_main_process() -> bool:
    """Returns whether this process prints and writes: the only process, or rank 0 of a launch."""
    return os.environ.get("RANK", "0") == "0"


def load_pretrained(auto_class: Any, name_or_path: str, **options: Any) -> Any:
    """Calls ``auto_class.from_pretrained``.

    Args:
        auto_class: A class such as ``AutoModelForCausalLM`` or ``AutoTokenizer``.
        name_or_path: A local folder, or a name on the hub.
        options: Further arguments of ``from_pretrained``.

    Raises:
        UserError: Neither the folder nor the hub has it.
    """
    try:
        return auto_class.from_pretrained(name_or_path, **options)
    except (OSError, ValueError) as error:
        found = Path(name_or_path).glob("checkpoint-*")
        checkpoints = sorted(found, key=lambda path: path.stat().st_mtime)
        if checkpoints:
            raise UserError(
                f"cannot load {name_or_path}: it is the folder of a run that did not end; pass its "
                f"last checkpoint, {checkpoints[-1]}"
            ) from error
        raise UserError(
            f"cannot load {name_or_path}: pass a local folder that holds the model and its "
            f"tokenizer, or a hub's name where there is a network ({one_line(error)})"
        ) from error


def model_names(paths: Sequence[str]) -> dict[str, str]:
    """Maps the names of models in results to their paths: hub names, or names of folders.

    Raises:
        UserError: Two folders have the same name.
    """
    names = {Path(path).resolve().name if Path(path).is_dir() else path: path for path in paths}
    if len(names) < len(set(paths)):
        raise UserError(
            f"models {' '.join(paths)}: results name a folder without its path, and two of these "
            "have the same name; rename one, or evaluate them separately"
        )
    return names


def one_line(error: BaseException) -> str:
    """Returns an error's message and the message of its first cause, shortened to one line."""
    text = textwrap.shorten(str(error) or type(error).__name__, 160)
    cause = error
    while (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
    first = textwrap.shorten(str(cause) or type(cause).__name__, 160)
    return text if first in text else f"{text}: {first}"
