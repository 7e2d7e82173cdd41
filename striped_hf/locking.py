"""One process at a time in a folder: a second one is told who is there."""

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from striped_hf.cli import UserError

# Trainer's uploads to the hub leave out what begins with an underscore
_LOCK, _HOLDER = "_lock", "_lock_holder.json"


@contextlib.contextmanager
def lock_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Locks a folder against other processes that lock it, for as long as the context lasts.

    The system holds the lock, so that it ends with the process, however that ends. Two files in the
    folder are there meanwhile.

    Args:
        folder: It is made where it does not exist.

    Raises:
        UserError: Another process has locked it.
        OSError: The folder cannot be written to.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / _LOCK), folder / _HOLDER
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"{folder} is in use by {_describe(holder)}: wait for its end, or pass another folder "
            "with --output_dir"
        ) from error
    try:
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        found = {"pid": os.getpid(), "host": socket.gethostname(), "command": command}
        holder.write_text(json.dumps(found), encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink()
            (folder / _LOCK).unlink()  # before the release: who waits for it then makes a new one
        lock.release()


def _describe(holder: Path) -> str:
    try:
        found = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']} ({found['command']:.120})"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"
