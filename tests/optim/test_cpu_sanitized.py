"""The C code under sanitizers, which check every read and write, and undefined behavior."""

from __future__ import annotations

import os
import secrets
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from striped_hf.optim import backends

try:
    backends.resolve("cpu", "cpu")
except RuntimeError as error:
    pytest.skip(str(error), allow_module_level=True)

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("fuzz_cpu.py")
SECONDS = float(os.environ.get("FUZZ_SECONDS", "60"))
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
# one build instead of one for each processor, which takes a third of the time
FLAGS = f"{SANITIZERS} -fno-omit-frame-pointer -g -DSTRIPED_BASELINE"


def find(name: str) -> str:
    """Returns the path of one of the compiler's libraries, or skips the test."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    try:
        found = subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no C compiler: {error}")
    path = found.stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"the C compiler {compiler} has no {name}")
    return path


def build(folder: Path) -> Path:
    """Builds the library by setup.py with sanitizers, into ``folder``."""
    for argument in ("build-lib", "build-temp"):
        (folder / argument).mkdir()
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    for argument in ("build-lib", "build-temp"):
        command += [f"--{argument}", str(folder / argument)]
    built = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=os.environ | {"CFLAGS": FLAGS},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    libraries = list(folder.glob("build-lib/**/_cpu*.so"))
    assert libraries, built.stdout + built.stderr  # after an error setup.py builds no library
    return libraries[0]


@pytest.mark.slow
def test_random_steps_under_sanitizers(tmp_path: Path) -> None:
    """``fuzz_cpu.py`` describes its cases. A failure shows the command that repeats its case."""
    # Python has no sanitizer, so the sanitizer's library must be loaded first. When it starts, it
    # looks up C++'s exceptions, which torch throws.
    preloaded = [find("libasan.so"), find("libstdc++.so.6")]
    library = build(tmp_path)
    environment = {
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
        "OMP_NUM_THREADS": "1",
    }
    seed = secrets.randbelow(2**32)
    run = subprocess.run(
        [sys.executable, PROGRAM, library, "--seed", str(seed), "--seconds", str(SECONDS)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS + 1200,
    )
    *_, last = run.stdout.splitlines() or [""]
    assert run.returncode == 0, run.stdout[-10_000:]
    assert last.endswith("cases passed")
