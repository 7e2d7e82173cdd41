"""Make the environment of a GPU machine that has torch, but not this project's extras.

    python -m benchmarks.gpu_environment build/gpu_environment

It has the packages in ``VERSIONS`` and none of the packages in ``LACKING``. It shares everything
else with this environment, also torch, which is a CPU build. ``make gpu-check`` rehearses in it.
"""

import argparse
import site
import subprocess
import sys
import venv
from pathlib import Path

from striped_hf.cli import run

VERSIONS = (
    *("transformers==5.17.0", "huggingface_hub==1.33.0", "tokenizers==0.23.2"),
    *("triton==3.6.0", "numpy==2.3.5"),  # the interpreter of triton 3.6 fails with numpy 2.4
)
LACKING = ("datasets", "evaluate", "expecttest", "trl", "wandb")


def make(folder: Path) -> Path:
    """Makes the environment, and returns the path of its Python."""
    venv.create(folder, with_pip=False, symlinks=True, clear=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*install, "--no-deps", *VERSIONS], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Python searches the new packages first, then this environment's
    lines = [*site.getsitepackages(), f"import sys; sys.modules.update(dict.fromkeys({LACKING}))"]
    (packages / "this_environment.pth").write_text("\n".join(lines), encoding="utf-8")
    return python


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    print(make(parser.parse_args().folder.resolve()))


if __name__ == "__main__":
    run(main)
