"""Scripts in fresh processes, whose imports have not happened yet."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path


def python(script: str, *args: object) -> str:
    """Runs a script in a fresh process and returns its output."""
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, args)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout + finished.stderr
