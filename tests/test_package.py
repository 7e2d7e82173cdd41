"""The package as a whole: the optimizer needs torch only, and nothing from outside is unpickled."""

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import striped_hf
from striped_hf.extras import EXTRAS

REPOSITORY = Path(__file__).resolve().parent.parent
# torch and its dependencies
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
        [sys.executable, "-S", "-c", script],  # -S: only the packages above
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("script", "missing", "extra"),
    [
        ("data_scripts/shakespeare_char.py", "tiktoken", "recipes"),
        ("data_scripts/openwebtext.py", "datasets", "recipes"),
        ("data_scripts/openwebtext.py", "pyarrow", "recipes"),
        ("recipes/compare_optimizers.py", "matplotlib", "recipes"),
        ("recipes/plot_run.py", "matplotlib", "recipes"),
        ("recipes/eval_zero_shot.py", "datasets", "recipes"),
    ],
)
def test_a_missing_extra_is_named_in_one_line(script, missing, extra, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{missing!r}] = None")
    run = subprocess.run(
        [sys.executable, str(REPOSITORY / script), "--help"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 1
    name = Path(script).name
    message = f"{name}: error: {missing} is not installed: pip install 'striped_hf[{extra}]'\n"
    assert run.stderr == message


# the versions that these tools require, or the newest versions that they allow
NEIGHBOURS = {
    "axolotl 0.19.0": "accelerate 1.13.0, datasets 4.8.4, evaluate 0.4.1, transformers 5.16.1",
    "llamafactory 0.9.5": "accelerate 1.11.0, datasets 4.0.0, transformers 5.6.0",
}


@pytest.mark.parametrize("tool", NEIGHBOURS)
def test_other_tools_can_be_installed_too(tool):
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    lines = config["options"]["install_requires"] + config["options.extras_require"]["recipes"]
    requirements = {r.name: r for r in map(Requirement, lines.strip().split("\n"))}
    for package in NEIGHBOURS[tool].split(", "):
        name, version = package.split()
        assert version in requirements[name].specifier, requirements[name]


def test_every_extra_that_a_script_explains_exists():
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    for extra, packages in EXTRAS.items():
        requirements = config["options.extras_require"][extra].split("\n")
        names = {re.match(r"[\w-]*", requirement).group() for requirement in requirements}
        assert set(packages) <= names


def test_there_is_one_version():
    """The package, the citation and the newest entry of the changelog have the same version."""
    citation = (REPOSITORY / "CITATION.cff").read_text()
    changes = (REPOSITORY / "CHANGELOG.md").read_text()
    assert re.search(r"^version: (.+)$", citation, re.M).group(1) == striped_hf.__version__
    assert re.search(r"^## (\S+)", changes, re.M).group(1) == striped_hf.__version__


def test_dependencies_point_one_way():
    """benchmarks -> recipes -> trainer, data, evaluation -> optim, and optim imports torch only.

    The Triton backend may import more, because only its own use imports it.
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
