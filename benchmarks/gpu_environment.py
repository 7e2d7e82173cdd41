"""Make the environment of a GPU machine that has torch, but not this project's extras.

    python -m benchmarks.gpu_environment build/gpu_environment

It has the packages in ``VERSIONS`` and none of the packages in ``LACKING``. It shares everything
else with this environment, also torch, which is a CPU build. ``make gpu-check`` rehearses in it.
"""

import argparse
from pathlib import Path

from benchmarks.overlay import make_overlay
from striped_hf.cli import run

VERSIONS = (
    *("transformers==5.17.0", "huggingface_hub==1.33.0", "tokenizers==0.23.2"),
    *("triton==3.6.0", "numpy==2.3.5"),  # the interpreter of triton 3.6 fails with numpy 2.4
)
LACKING = ("datasets", "evaluate", "expecttest", "trl", "wandb")


def make(folder: Path) -> Path:
    """Makes the environment, and returns the path of its Python."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({LACKING}))"
    return make_overlay(folder, VERSIONS, [hide])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    print(make(parser.parse_args().folder.resolve()))


if __name__ == "__main__":
    run(main)
