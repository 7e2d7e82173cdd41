"""This room's tests under the older versions of transformers that are promised to work.

They install packages, so they run only when asked for: ``pytest -m compat``.
"""

import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
# each version with the older packages that it needs; the rest is this environment's
VERSIONS = {
    "4.57.6": ("huggingface_hub>=0.34,<1", "tokenizers>=0.22,<0.23", "datasets>=4,<4.5"),
    "5.0.0": ("huggingface_hub>=1.3,<2", "tokenizers>=0.22,<0.23"),
}


@pytest.mark.compat
@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_this_room_under(version: str, tmp_path: Path) -> None:
    venv.create(tmp_path, with_pip=False, symlinks=True)
    python = str(tmp_path / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, f"transformers=={version}", *VERSIONS[version]], check=True)
    # the packages just installed come first, then this environment's
    (packages,) = tmp_path.glob("lib/python*/site-packages")
    paths = [*site.getsitepackages(), str(REPOSITORY)]
    (packages / "this_environment.pth").write_text("\n".join(paths))

    found = subprocess.check_output(
        [python, "-c", "import transformers; print(transformers.__version__)"], text=True
    )
    assert found.strip() == version
    tests = ["test_registration.py", "test_param_groups.py", "test_trainer_runs.py"]
    # the recipes' Trainer and its checkpoints override what is Trainer's own affair
    tests += ["test_causal_lm.py", "test_pretraining.py", "test_watching.py"]
    finished = subprocess.run(
        # compiling tells nothing new here and takes long
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not compile", *tests],
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-10_000:]
    assert "passed" in finished.stdout
