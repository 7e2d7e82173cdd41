"""Fixtures and hooks of all tests."""

import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# Without a GPU, Triton's interpreter runs the kernels. Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell starts background jobs with interrupts ignored. The programs of the tests would inherit
# this, also the programs that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from accelerate.state import AcceleratorState
from fork_server import ForkServer, Job
from tiny import QUIET, STEPS, TINY

REPOSITORY = Path(__file__).resolve().parent.parent

Script = Callable[..., subprocess.CompletedProcess[str]]

_TIMEOUT = 1200  # seconds; only a hang reaches it: a busy machine takes minutes for seconds of work


# the longest files, and the folders with long files; the other files come after them
LONGEST = (
    *("test_docs.py", "test_wheel.py", "distributed", "recipes", "benchmarks", "trainer", "optim"),
    *("test_hub.py", "test_evaluation.py"),
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Orders files, and skips the tests that install packages unless ``-m compat`` is given.

    A worker runs one file after another. Long files at the end would leave other workers idle.
    """
    items.sort(key=lambda item: [n not in (item.path.name, item.path.parent.name) for n in LONGEST])
    if "compat" in config.getoption("markexpr"):
        return
    skip = pytest.mark.skip(reason="installs packages: run it with pytest -m compat")
    for item in items:
        if item.get_closest_marker("compat"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data; tests that need it are skipped without it."""
    folder = os.environ.get("STRIPED_HF_TEST_DATA")
    if not folder:
        pytest.skip("STRIPED_HF_TEST_DATA is not set to the folder of real data")
    return Path(folder)


def environment_of_scripts() -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"}
    return inherited | {"PYTHONPATH": str(REPOSITORY)}


@pytest.fixture(scope="session")
def run_script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Script]:
    """Runs a script of the repository in a separate process and returns its output.

    ``run_script("recipes/sample.py", "out/run", cwd=folder, status=0, FLAG="1")``: keywords other
    than ``cwd`` and ``status``, the exit status to expect, are environment variables. A name that
    does not end in ``.py``, such as ``benchmarks.optimizers``, is a module.

    The process is a fork of one that has the imports, unless a test changes the environment, on
    which imports may depend.
    """
    folder = tmp_path_factory.mktemp("fork_server")
    server = ForkServer(environment_of_scripts(), folder / "log")

    def fork(program: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        out, err = folder / "out", folder / "err"
        (pid,) = server.start(Job(program, str(cwd), [{}], [(str(out), str(err))]))
        timer = threading.Timer(_TIMEOUT, os.kill, (pid, signal.SIGKILL))
        timer.start()
        (status,) = server.statuses()
        timer.cancel()
        return subprocess.CompletedProcess(program, status, out.read_text(), err.read_text())

    def run(
        script: str, *arguments: object, cwd: Path, status: int = 0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        started = [str(REPOSITORY / script)] if script.endswith(".py") else ["-m", script]
        program = [*started, *map(str, arguments)]
        variables = environment_of_scripts() | environment
        if variables == server.environment:
            finished = fork(program, cwd)
        else:
            finished = subprocess.run(
                [sys.executable, *program],
                cwd=cwd,
                env=variables,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT,
            )
        assert finished.returncode == status, finished.stdout + finished.stderr
        return finished

    yield run
    server.end()


@pytest.fixture(scope="session")
def docs_data(tmp_path_factory: pytest.TempPathFactory, run_script: Script) -> Path:
    """The documentation topics of this Python as a character data set."""
    folder = tmp_path_factory.mktemp("python_docs")
    run_script("data_scripts/python_docs.py", "--output_dir", folder, cwd=folder)
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, run_script, docs_data) -> Path:
    """The folder of a finished run of the character recipe."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    run_script(
        "recipes/train_shakespeare_char.py",
        *(*TINY, *STEPS, *QUIET, "--data_dir", docs_data, "--output_dir", folder),
        cwd=folder.parent,
    )
    return folder


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with a configuration only: GPT-2 with three narrow layers."""
    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    folder.mkdir()
    config = {
        "model_type": "gpt2",
        "vocab_size": 512,
        "n_positions": 64,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 2,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture
def run_here(monkeypatch, capsys, tmp_path) -> Callable[..., str]:
    """Runs a script in this process, in ``tmp_path``; returns its output.

    The script has a name as for ``run_script``. If ``fails`` is given, the script must end with
    this error message. This fixture is for many calls, because starting a process takes seconds.
    """

    def run(script: str, *arguments: object, fails: str | None = None) -> str:
        AcceleratorState._reset_state(reset_partial_state=True)  # as in a new process
        is_file = script.endswith(".py")
        script = str(REPOSITORY / script) if is_file else script
        start = runpy.run_path if is_file else runpy.run_module
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        if fails is None:
            start(script, run_name="__main__")
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as caught:
            start(script, run_name="__main__")
        # argparse's own errors are printed
        message = capsys.readouterr().err if caught.value.code == 2 else str(caught.value)
        assert fails in message
        assert "Traceback" not in message
        return message

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)
