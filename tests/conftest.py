"""What the tests of every room share."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter: it must know before anything imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tiny import QUIET, STEPS, TINY

REPOSITORY = Path(__file__).resolve().parent.parent

Script = Callable[..., subprocess.CompletedProcess[str]]


# with the longest files; the other files come after them
LONGEST = ("distributed", "recipes", "trainer")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Orders files, and skips the tests that install packages, unless they are asked for.

    A worker takes file after file: long ones at the end would leave the others without work.
    """
    items.sort(key=lambda item: [item.path.parent.name != name for name in LONGEST])
    if "compat" in config.getoption("markexpr"):
        return
    skip = pytest.mark.skip(reason="installs another transformers: ask for it by pytest -m compat")
    for item in items:
        if item.get_closest_marker("compat"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data; a test that needs it is skipped where there is none."""
    folder = os.environ.get("STRIPED_HF_TEST_DATA")
    if not folder:
        pytest.skip("STRIPED_HF_TEST_DATA is not set to the folder of real data")
    return Path(folder)


@pytest.fixture(scope="session")
def run_script() -> Script:
    """Runs a script of the repository in a process of its own and returns its output.

    ``run_script("recipes/sample.py", "out/run", cwd=folder, status=0, FLAG="1")``: keywords other
    than ``cwd`` and ``status``, the exit status to expect, are environment variables.
    """

    def run(
        script: str, *arguments: object, cwd: Path, status: int = 0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        finished = subprocess.run(
            [sys.executable, str(REPOSITORY / script), *map(str, arguments)],
            cwd=cwd,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=1200,  # only what hangs: a busy machine takes minutes for seconds
        )
        assert finished.returncode == status, finished.stdout + finished.stderr
        return finished

    return run


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
