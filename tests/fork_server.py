"""Starts Python programs in processes that have torch and transformers already.

The imports take a program 4 seconds, a fork takes almost no time. A ``ForkServer`` is a process
that runs this file: it imports the packages once, and forks for each program. A line of its
standard input is a job, the fields of ``Job`` as JSON. Its answers are lines of JSON, too: null
after the imports, then for each job the process ids and, when all have ended, their exit statuses.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple


class Job(NamedTuple):
    """A program, started once or as several processes that work together.

    Attributes:
        program: What follows "python" in the command line: "-m" and a module, or a file; then the
            arguments.
        cwd: The working directory.
        environments: For each process, variables in addition to the server's.
        outputs: For each process, the files for standard output and standard error.
    """

    program: list[str]
    cwd: str
    environments: list[dict[str, str]]
    outputs: list[tuple[str, str]]


class ForkServer:
    """A process that starts programs.

    Attributes:
        environment: Its environment, which the programs inherit.
    """

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self.environment = environment
        self._log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                text=True,
                start_new_session=True,
            )
        self._read()  # its answer after the imports

    def start(self, job: Job) -> list[int]:
        """Starts a program; returns its process ids."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self._read()

    def statuses(self) -> list[int]:
        """Waits for the end of the program; returns its exit statuses, -9 for a SIGKILL."""
        return self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self._log.read_text()
        return json.loads(line)

    def end(self) -> None:
        """Kills the server, and programs that still run."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def prepare(job: Job, number: int) -> None:
    """Makes a fork a new process of the job."""
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    for descriptor, path in enumerate(job.outputs[number], 1):
        with open(path, "w") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ |= job.environments[number]
    os.chdir(job.cwd)


def run(program: list[str]) -> None:
    """Runs a program as Python does."""
    if program[0] == "-m":
        sys.argv = program[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        sys.path[0] = str(Path(program[0]).parent)
        runpy.run_path(program[0], run_name="__main__")


def serve() -> list[str]:
    """Starts the jobs; returns the program to run, in a fork.

    The fork returns in order to end as any program does: with Python's own message of an error, and
    with its exit handlers.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    print("null", file=answers)
    for line in iter(sys.stdin.readline, ""):
        job = Job(*json.loads(line))
        pids = []
        for number in range(len(job.environments)):
            pid = os.fork()
            if pid == 0:
                answers.close()
                prepare(job, number)
                return job.program
            pids.append(pid)
        print(json.dumps(pids), file=answers)
        ended = dict(os.wait() for _ in pids)
        print(json.dumps([os.waitstatus_to_exitcode(ended[pid]) for pid in pids]), file=answers)
    sys.exit()


if __name__ == "__main__":
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    from transformers import GPT2LMHeadModel, Trainer  # noqa: F401

    import striped_hf.trainer.run_folder  # noqa: F401

    run(serve())
