"""A lock that lets only one process at a time use a folder, with a message for the others."""

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from striped_hf.cli import UserError

# Trainer does not upload names that begin with an underscore to the hub
_LOCK, _HOLDER = "_lock", "_lock_holder.json"


@contextlib.contextmanager
def lock_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Locks a folder for as long as the context lasts; other processes cannot lock it meanwhile.

    The operating system releases the lock if the process ends in any way. The folder has two more
    files while it is locked.

    Args:
        folder: The folder; created if it does not exist.

    Raises:
        UserError: Another process has locked the folder.
        OSError: The folder is not writable.
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
            # before the release: afterwards the file may be the next process's lock
            (folder / _LOCK).unlink()
        lock.release()


def _describe(holder: Path) -> str:
    try:
        found = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']} ({found['command']:.120})"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"
