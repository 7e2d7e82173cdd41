"""Time several training programs in turns: each program is paused outside its turn."""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from striped_hf.cli import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
WARMUP_LINES = 2
DEADLINE_S = 600  # seconds until the next line; compilation takes minutes


@dataclass
class Variant:
    """One process to time.

    Args:
        name: What the table calls it.
        command: The program; every few steps it prints a line that ``line`` matches.
        line: A regular expression for these lines.
        cwd: The folder to run in: the repository, or a checkout of nanoGPT.
        settings: The settings of training_step_worker.py; None for nanoGPT.
        ms: The milliseconds of a step, one number for each turn.
        printed: The JSON of the lines that the program printed in its turns.
    """

    name: str
    command: list[str]
    line: str = r"\{.*\}"
    cwd: Path = REPOSITORY
    settings: dict[str, Any] | None = None
    ms: list[float] = field(default_factory=list)
    printed: list[dict[str, Any]] = field(default_factory=list)


class VariantProcess:
    """A variant's process, which is paused outside its turn."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self._lines: queue.Queue[tuple[float, str | None]] = queue.Queue()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, open as long as the process runs
        self._process = subprocess.Popen(
            variant.command,
            cwd=variant.cwd,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={"CUDA_VISIBLE_DEVICES": "0", **os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # killpg then also reaches its children
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put((time.perf_counter(), line))
        self._lines.put((0.0, None))

    def wait(self, lines: int) -> float:
        """Waits for ``lines`` lines, and returns the time of the last one, in seconds."""
        deadline = time.monotonic() + DEADLINE_S
        while lines:
            try:
                when, line = self._lines.get(timeout=deadline - time.monotonic())
            except (queue.Empty, ValueError):
                raise UserError(
                    f"{self.variant.name}: no step in {DEADLINE_S} s; its output ends with: "
                    f"{self._last_words()}"
                ) from None
            if line is None:
                raise UserError(f"{self.variant.name} ended: {self._last_words()}")
            if re.match(self.variant.line, line):
                lines -= 1
                if line.startswith("{"):
                    self.variant.printed.append(json.loads(line))
        return when

    def turn(self, lines: int) -> float:
        """Resumes the process for a first line and ``lines`` more; returns the seconds per line."""
        while not self._lines.empty():  # lines that it printed before it was paused
            self._lines.get()
        self.signal(signal.SIGCONT)
        begin = self.wait(1)
        self.variant.printed = self.variant.printed[:-1]  # this line includes the time of the pause
        seconds = (self.wait(lines) - begin) / lines
        self.signal(signal.SIGSTOP)
        return seconds

    def signal(self, which: signal.Signals) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, which)

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        self._process.wait()

    def _last_words(self) -> str:
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace").strip().splitlines()
        return " / ".join(text[-2:])[-300:] or "it said nothing"


def time_in_turns(group: list[Variant], rounds: int, steps: int, steps_per_line: int) -> None:
    """Gives each variant a turn in every round, and notes the milliseconds of a step.

    Args:
        group: The variants; the function fills their ``ms`` and ``printed``.
        rounds: The number of turns of each variant.
        steps: The number of steps in a turn, a multiple of ``steps_per_line``.
        steps_per_line: The number of steps between two printed lines.
    """
    processes: list[VariantProcess] = []
    # sys.exit runs the finally below: paused processes would outlive this one
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        for variant in group:
            print(f"== starting: {variant.name}", flush=True)
            processes.append(VariantProcess(variant))
            processes[-1].wait(WARMUP_LINES)
            processes[-1].signal(signal.SIGSTOP)
            del variant.printed[1:]
        lines = steps // steps_per_line
        for round_ in range(rounds):
            print(f"== round {round_ + 1} of {rounds}", flush=True)
            for process in processes:
                process.variant.ms.append(1e3 * process.turn(lines) / steps_per_line)
    finally:
        for process in processes:
            process.end()
