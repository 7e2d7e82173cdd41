"""Runs scripts, and starts the fork server of tests/distributed."""

import multiprocessing
import os
import subprocess
import sys
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

TIMEOUT = (
    1200  # seconds; only a hang reaches this: a busy machine takes minutes for seconds of work
)
IMPORTED = ("transformers.trainer", "transformers.models.gpt2.modeling_gpt2", "datasets", "peft")
IMPORTED_BY_PROCESS_GROUPS = (
    "process_group",
    "training_cases",
    "layerwise_cases",
    "checkpoint_cases",
    "convolution_cases",
    "agreement_cases",
    "fsdp2_trainer",
)
# libraries read these variables when they are imported
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "TRITON_", "OMP_")

REPOSITORY = Path(__file__).resolve().parent.parent

_environment = dict(os.environ)


@cache
def start_fork_server() -> multiprocessing.context.ForkServerContext:
    """Starts the process that is forked: an import takes seconds, a fork almost no time.

    A process has one fork server. So it has the imports of tests/distributed, too. It finds them
    by PYTHONPATH alone, and does not report missing ones.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED, *IMPORTED_BY_PROCESS_GROUPS])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()
    return context


def run_script(
    words: list[str], cwd: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Runs ``python WORDS...`` in ``cwd``, with these variables, and captures its output."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
