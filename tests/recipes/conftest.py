"""Runs of the recipes that several tests look at."""

from pathlib import Path

import pytest
from tiny import QUIET, STEPS, TINY


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
