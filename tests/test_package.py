"""The package as a whole: the optimizer needs torch only, and nothing from outside is unpickled."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
# torch and what it needs itself
TORCH = ("torch", "torchgen", "typing_extensions.py", "sympy", "mpmath", "networkx", "jinja2")
TORCH += ("markupsafe", "filelock", "fsspec", "numpy", "numpy.libs")


def test_optimizer_works_without_transformers(tmp_path):
    site_packages = Path(torch.__file__).parents[1]
    for name in TORCH:
        if (site_packages / name).exists():
            (tmp_path / name).symlink_to(site_packages / name)
    (tmp_path / "striped_hf").symlink_to(REPOSITORY / "striped_hf")
    script = """
import importlib.util, torch
assert importlib.util.find_spec("transformers") is None
from striped_hf import StripedAdamW
weight = torch.nn.Parameter(torch.ones(4, 6))
optimizer = StripedAdamW([weight], momentum_dtype="int8")
weight.square().sum().backward()
optimizer.step()
assert (weight < 1).all()
"""
    run = subprocess.run(
        [sys.executable, "-S", "-c", script],  # -S: no site-packages but those above
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stderr


def test_dependencies_point_one_way():
    """benchmarks -> recipes -> trainer, data, evaluation -> optim, and optim imports torch only.

    But for the Triton backend, which is not imported where it is not chosen.
    """
    for path in (REPOSITORY / "striped_hf" / "optim").rglob("*.py"):
        imported = set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), flags=re.M))
        allowed = {"triton", "numpy"} if path.parent.name == "triton" else set()
        assert imported <= {*sys.stdlib_module_names, "torch", "striped_hf"} | allowed, path
        assert "striped_hf.trainer" not in path.read_text()
    for folder, above in (("striped_hf", "recipes|benchmarks"), ("recipes", "benchmarks")):
        for path in (REPOSITORY / folder).rglob("*.py"):
            assert not re.search(rf"^\s*(?:from|import) (?:{above})\b", path.read_text(), re.M), (
                path
            )


def test_nothing_is_unpickled():
    for folder in ("striped_hf", "recipes", "benchmarks", "data_scripts"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            assert not re.search(r"\bpickle\.load|weights_only=False", path.read_text()), path
