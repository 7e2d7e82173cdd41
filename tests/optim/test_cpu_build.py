"""Installs with and without the tools that build the CPU backend."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

STEP = """
import logging
logging.basicConfig()
import torch
from striped_hf.optim import StripedAdamW
weight = torch.nn.Parameter(torch.ones(4, 6))
optimizer = StripedAdamW([weight])
for _ in range(3):
    weight.grad = torch.ones(4, 6)
    optimizer.step()
assert (weight < 1).all()
"""


def install(folder: Path, compiler: str) -> Path:
    """Builds the package into ``folder`` as an install does, with or without its library."""
    source = folder / "source"
    shutil.copytree(REPOSITORY / "striped_hf", source / "striped_hf", ignore=_LIBRARIES)
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    build = ["setup.py", "-q", "build", "--build-base", str(folder), "--build-lib", str(folder)]
    run = subprocess.run(
        [sys.executable, *build],
        cwd=source,
        env=os.environ | {"CC": compiler},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


_LIBRARIES = shutil.ignore_patterns("*.so", "__pycache__")


def python(folder: Path, script: str) -> str:
    """Runs a script that imports the built package; returns what it logged."""
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stderr
    return run.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_compiler_builds_the_library(tmp_path: Path) -> None:
    folder = install(tmp_path, "cc")
    assert list(folder.glob("striped_hf/optim/backends/_cpu*.so"))
    logged = python(folder, STEP.replace("[weight]", "[weight], backend='cpu'"))
    assert "plain PyTorch" not in logged


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["compiler", "OpenMP"])
def test_the_install_succeeds_without(missing: str, tmp_path: Path) -> None:
    """The reference then computes the step, and one log line reports it."""
    compiler = tmp_path / "compiler"
    refuse = 'for flag; do [ "$flag" != -fopenmp ] || exit 1; done\nexec cc "$@"\n'
    compiler.write_text("#!/bin/sh\n" + ("exit 127\n" if missing == "compiler" else refuse))
    compiler.chmod(0o755)
    folder = install(tmp_path, str(compiler))
    assert not list(folder.glob("striped_hf/optim/backends/_cpu*"))
    logged = [line for line in python(folder, STEP).splitlines() if "striped_hf" in line]
    assert len(logged) == 1
    assert "plain PyTorch" in logged[0]
    assert "C compiler" in logged[0]
