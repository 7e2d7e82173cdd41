"""An environment that shares the packages of the running one, except for some."""

import site
import subprocess
import sys
import venv
from collections.abc import Iterable
from pathlib import Path


def make_overlay(folder: Path, packages: Iterable[str], lines: Iterable[str] = ()) -> Path:
    """Makes a virtual environment with some packages over the packages of this environment.

    Args:
        folder: The folder of the new environment. Its content is deleted.
        packages: The packages to install, as for pip; their dependencies are not installed.
        lines: More lines for its ``.pth`` file: folders with modules, or imports to run.

    Returns:
        The path of its Python.

    Raises:
        subprocess.CalledProcessError: pip cannot install the packages.
    """
    venv.create(folder, with_pip=False, symlinks=True, clear=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, *packages], check=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    # Python searches the new packages first, then the lines of this file
    text = "\n".join([*site.getsitepackages(), *lines])
    (site_packages / "this_environment.pth").write_text(text, encoding="utf-8")
    return python
