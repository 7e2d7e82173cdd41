"""Starts several processes, and ends all of them."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
from fork_server import ForkServer, Job

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = REPOSITORY / "recipes" / "train_shakespeare_char.py"
# one thread per process, and no GPU, which would add up sums in another order
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def tree(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Returns the process and all its descendants, itself first."""
    try:
        root = psutil.Process(process.pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


class Launch:
    """``accelerate launch`` of a script with one of the recipes' configurations."""

    def __init__(
        self, config: str, script: Path, *arguments: object, cwd: Path, log: str, flags: tuple = ()
    ) -> None:
        file = REPOSITORY / "recipes" / "accelerate" / config
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file]
        command += [*flags, script, *arguments]
        self.out, self.err = cwd / f"{log}.out", cwd / f"{log}.err"
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                list(map(str, command)),
                cwd=cwd,
                env=os.environ | ENVIRONMENT,
                stdout=out,
                stderr=err,
                text=True,
                start_new_session=True,
            )

    def workers(self) -> dict[int, psutil.Process]:
        """Returns the processes that run the script, by rank."""
        found = {}
        for process in tree(self.process)[1:]:
            with contextlib.suppress(psutil.Error):
                if "RANK" in (environment := process.environ()):
                    found.setdefault(int(environment["RANK"]), process)
        return found

    def end(self) -> None:
        kill(tree(self.process))
        self.process.wait()

    def wait(self, status: int | None = 0, timeout: float = 1200) -> tuple[str, str]:
        """Waits for the end; returns the output on stdout and on stderr."""
        seen = tree(self.process)
        try:
            self.process.wait(timeout)
        finally:
            kill(seen + tree(self.process))
            self.process.wait()
        out, err = self.out.read_text(), self.err.read_text()
        assert status is None or self.process.returncode == status, out + err
        return out, err


def start_pair(
    server: ForkServer, logs: Path, script: Path, *arguments: object
) -> list[psutil.Process]:
    """Starts a script in two processes of one process group, as torchrun would.

    Args:
        server: The server that starts it.
        logs: The folder for both processes' output.
        script: The script.
        *arguments: Its arguments.
    """
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    job = Job(
        program=[str(script), *map(str, arguments)],
        cwd=str(logs),
        environments=[group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)],
        outputs=[(str(logs / f"{rank}.out"), str(logs / f"{rank}.err")) for rank in range(2)],
    )
    return [psutil.Process(pid) for pid in server.start(job)]


def logs_of_pair(logs: Path) -> str:
    """Returns the output of the pair that was started last."""
    return "\n".join(file.read_text() for file in sorted(logs.iterdir()))


def gone(processes: list[psutil.Process], timeout: float = 120) -> bool:
    """Waits until none of the processes runs any more."""
    deadline = time.monotonic() + timeout
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
