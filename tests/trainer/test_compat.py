"""The tests of this folder with the oldest supported versions of transformers.

They install packages, so they run only with ``pytest -m compat``.
"""

import subprocess
from pathlib import Path

import pytest

from benchmarks.overlay import make_overlay

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
# each version with the older packages that it needs; other packages come from this environment
VERSIONS = {
    "4.57.6": ("huggingface_hub>=0.34,<1", "tokenizers>=0.22,<0.23", "datasets>=4,<4.5"),
    "5.0.0": ("huggingface_hub>=1.3,<2", "tokenizers>=0.22,<0.23"),
}


@pytest.mark.compat
@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_the_trainer_tests_pass_with(version: str, tmp_path: Path) -> None:
    packages = (f"transformers=={version}", *VERSIONS[version])
    python = make_overlay(tmp_path / "environment", packages, [str(REPOSITORY)])
    found = subprocess.check_output(
        [python, "-c", "import transformers; print(transformers.__version__)"], text=True
    )
    assert found.strip() == version
    tests = ["test_registration.py", "test_importing.py", "test_optimizer_kwargs.py"]
    tests += ["test_param_groups.py", "test_trainer_runs.py", "test_trainer_subclasses.py"]
    tests += ["test_layerwise.py"]
    # the recipes' Trainer and its checkpoints override Trainer's private methods
    tests += ["test_causal_lm.py", "test_pretraining.py", "test_watching.py"]
    finished = subprocess.run(
        # compilation takes long and shows nothing new here
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not compile", *tests],
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-10_000:]
    assert "passed" in finished.stdout
