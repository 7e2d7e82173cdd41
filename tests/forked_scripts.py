"""Runs scripts in processes that have torch and transformers imported already.

Importing both takes seconds, most of the time of a short script. A fork server imports them once.
The process of a script is its fork: only what is imported when it begins differs from a process of
``python script.py``.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
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


def run_forked(
    words: list[str], cwd: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Runs ``python WORDS...`` and returns its output.

    A script gets an ordinary process if a variable that is read at import differs.

    Args:
        words: A script, or ``-m`` and a module; then the arguments.
        cwd: The working folder.
        environment: All environment variables.
    """
    if _at_import(environment) != _at_import(_environment):
        return subprocess.run(
            [sys.executable, *words],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    with tempfile.TemporaryDirectory() as folder:
        outputs = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        process = start_fork_server().Process(
            target=_become, args=(words, cwd, environment, outputs)
        )
        process.start()
        process.join(TIMEOUT)
        process.kill()
        process.join()
        assert process.exitcode is not None
        stdout, stderr = (Path(path).read_text(encoding="utf-8") for path in outputs)
    return subprocess.CompletedProcess(words, process.exitcode, stdout, stderr)


def _at_import(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}


def _become(words: list[str], cwd: Path, environment: dict[str, str], outputs: list[str]) -> None:
    """Makes this process the script's."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    added = [each for each in environment.get("PYTHONPATH", "").split(os.pathsep) if each]
    sys.path[:] = [*added, *(path for path in sys.path if not _is_of_tests(path))]
    try:
        if words[0] == "-m":
            sys.path.insert(0, str(cwd))
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            script = Path(words[0]).absolute()
            sys.path.insert(0, str(script.parent))
            sys.argv = words
            runpy.run_path(str(script), run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing's own processes end without them


def _is_of_tests(path: str) -> bool:
    """Whether pytest has added a folder to ``sys.path``."""
    folder = Path(path).resolve()
    return folder.is_relative_to(REPOSITORY) and not folder.is_relative_to(sys.prefix)
