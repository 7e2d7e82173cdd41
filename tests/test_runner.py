"""``python -m striped_hf`` and ``striped-hf-run`` run programs as if they were run directly.

Real training programs are in tests/trainer/test_unchanged_programs.py.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PYTHON = (sys.executable,)
# the two ways to run `python ARGUMENTS`; installation makes the second one a console command
WAYS = {
    "python -m striped_hf": (sys.executable, "-m", "striped_hf"),
    "striped-hf-run": (
        *(sys.executable, "-c", "from striped_hf.runner import main; main()"),
        sys.executable,
    ),
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))

DESCRIBE = '''
"""What a program can see of how it was run."""
import json, os, sys
main = sys.modules["__main__"]
print(json.dumps({
    "argv": sys.argv,
    "path": sys.path,
    "names": sorted(globals()),
    "is main": main.__dict__ is globals(),
    "module": [__name__, __doc__, __package__, __cached__, type(__loader__).__name__],
    "file": __file__,
    "spec": __spec__ and [__spec__.name, __spec__.origin],
    "loader": __loader__.get_filename(),
    "flags": str(sys.flags),
    "cwd": os.getcwd(),
    "environment": {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "_")},
    "hook": any(type(f).__module__ == "striped_hf.import_hook" for f in sys.meta_path),
}))
'''


def run(command: tuple[str, ...], *arguments: object, cwd: Path, **environment: str) -> Any:
    return subprocess.run(
        [*command, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def script(folder: Path, source: str, name: str = "program.py") -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(textwrap.dedent(source))
    return path


def assert_same(way: tuple[str, ...], *arguments: object, cwd: Path, **environment: str) -> Any:
    """Runs a program directly and by ``way``; status and output must be the same."""
    expected = run(PYTHON, *arguments, cwd=cwd, **environment)
    result = run(way, *arguments, cwd=cwd, **environment)
    for outcome in ("returncode", "stdout", "stderr"):
        assert getattr(result, outcome) == getattr(expected, outcome), outcome
    return expected


# the program's view


@ways
@pytest.mark.parametrize(
    "arguments",
    [
        ("program.py",),
        ("./sub/program.py", "--flag", "two words", "-m", "", "-h"),
        ("../here/program.py", "x"),
        ("link.py",),
        ("-m", "program", "--optim", "striped_adamw"),
        ("-m", "sub.program", "-m"),
        ("-m", "package", "-h"),
    ],
    ids=" ".join,
)
def test_a_program_sees_the_same_as_when_run_directly(way, arguments, tmp_path: Path) -> None:
    here = tmp_path / "here"
    for name in ("program.py", "sub/program.py", "package/__init__.py", "package/__main__.py"):
        script(here, DESCRIBE if "__init__" not in name else "", name)
    (here / "link.py").symlink_to(here / "sub" / "program.py")
    expected = json.loads(run(PYTHON, *arguments, cwd=here).stdout)
    result = json.loads(run(way, *arguments, cwd=here).stdout)
    assert expected.pop("hook") is False
    assert result.pop("hook") is True
    assert result == expected


@ways
def test_an_absolute_path(way, tmp_path: Path) -> None:
    path = script(tmp_path, DESCRIBE)
    results = [json.loads(run(command, path, cwd=Path("/")).stdout) for command in (PYTHON, way)]
    assert results[0]["path"] == results[1]["path"]
    assert results[0]["file"] == results[1]["file"] == str(path)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python has no safe path yet")
def test_the_safe_path_option_is_kept(tmp_path: Path) -> None:
    path = script(tmp_path, DESCRIBE)
    command = (sys.executable, "-P")
    expected = json.loads(run(command, path, cwd=tmp_path).stdout)
    result = json.loads(run((*command, "-m", "striped_hf"), path, cwd=tmp_path).stdout)
    assert result["path"] == expected["path"]


@pytest.mark.parametrize("before", [None, "", "a", "a:b:", ":a"])
def test_pythonpath_gets_one_more_entry(before: str | None, tmp_path: Path) -> None:
    path = script(tmp_path, "import os, sys; print(os.environ.get('PYTHONPATH')); print(sys.path)")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {} if before is None else {"PYTHONPATH": before}
    start = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); "
    start += "from striped_hf.runner import main; main()"
    outputs = []
    for command in ((sys.executable, path), (sys.executable, "-c", start, sys.executable, path)):
        finished = subprocess.run(
            list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert finished.stderr == ""
        outputs.append(finished.stdout.splitlines())
    startup = str(REPOSITORY / "striped_hf" / "startup")
    assert outputs[1][0] == (f"{startup}:{before}" if before else startup)
    assert outputs[1][1] == outputs[0][1]  # sys.path is as before


def test_running_it_inside_itself_changes_nothing(tmp_path: Path) -> None:
    path = script(tmp_path, "import os; print(os.environ['PYTHONPATH'])")
    way = WAYS["striped-hf-run"]
    once, twice = (run(command, path, cwd=tmp_path).stdout for command in (way, way[:-1] + way))
    assert once == twice


# the end of a program

ENDS = {
    "an error": """
        def function():
            raise ValueError("wrong")
        function()
        """,
    "a chain of errors": """
        try:
            1 / 0
        except ZeroDivisionError as error:
            raise RuntimeError("second") from error
        """,
    "an error in another module": "import json\njson.loads('{')",
    "no such module": "import no_such_module",
    "a syntax error": "x = = 1",
    "a group": """
        import sys
        if sys.version_info < (3, 11):
            sys.exit("this Python has no groups")
        raise ExceptionGroup("several", [ValueError("a"), TypeError("b")])
        """,
    "status 3": "import sys; sys.exit(3)",
    "a message": "import sys; sys.exit('the message')",
    "os._exit": "import os; os._exit(5)",
    "an interrupt": "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)",
    "a termination": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "an interrupt of its own": "raise KeyboardInterrupt",
    "a hook of its own": """
        import sys, traceback
        def hook(kind, error, trace):
            print("hook:", kind.__name__, error, [f.name for f in traceback.extract_tb(trace)])
            print([f.name for f in traceback.extract_tb(error.__traceback__)])
        sys.excepthook = hook
        raise ValueError("wrong")
        """,
    "exit handlers and threads": """
        import atexit, pickle, threading, time
        class Item: ...
        def later():
            threading.main_thread().join()
            print(type(pickle.loads(pickle.dumps(Item()))), __name__)
        threading.Thread(target=later).start()
        atexit.register(lambda: print("exit handler", pickle.dumps(Item())))
        """,
}


@ways
@pytest.mark.parametrize("end", ENDS)
def test_a_program_ends_as_when_run_directly(way, end: str, tmp_path: Path) -> None:
    script(tmp_path, ENDS[end])
    finished = assert_same(way, "program.py", cwd=tmp_path)
    assert finished.stderr.strip() or finished.returncode or end == "exit handlers and threads"
    assert_same(way, "-m", "program", cwd=tmp_path)


@ways
@pytest.mark.parametrize("arguments", [("missing.py",), ("-m", "missing"), ("sub",)], ids=" ".join)
def test_a_missing_program_is_an_error(way, arguments, tmp_path: Path) -> None:
    if arguments == ("sub",) and "-m" in way:
        pytest.skip("a folder with a __main__.py is run by striped-hf-run only")
    (tmp_path / "sub").mkdir()
    assert assert_same(way, *arguments, cwd=tmp_path).returncode


def test_the_command_becomes_the_program(tmp_path: Path) -> None:
    """Command and program are the same process: signals and waiting reach the program itself."""
    path = script(
        tmp_path,
        """
        import os, signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
        print(os.getpid(), flush=True)
        time.sleep(600)
        """,
    )
    process = subprocess.Popen(
        [*WAYS["striped-hf-run"], path],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert int(process.stdout.readline()) == process.pid
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 7


def test_commands_other_than_python(tmp_path: Path) -> None:
    command = WAYS["striped-hf-run"][:-1]
    finished = run(command, "sh", "-c", 'echo "$0 $1"; exit 4', "a b", "--help", cwd=tmp_path)
    assert (finished.returncode, finished.stdout) == (4, "a b --help\n")
    finished = run(command, "no-such-command", cwd=tmp_path)
    assert finished.returncode == 127
    assert finished.stderr == "striped-hf-run: no-such-command: No such file or directory\n"
    script(tmp_path, "", "not_executable")
    finished = run(command, "./not_executable", cwd=tmp_path)
    assert finished.returncode == 126
    assert finished.stderr == "striped-hf-run: ./not_executable: Permission denied\n"


@pytest.mark.parametrize(
    "command", [WAYS["striped-hf-run"][:-1], WAYS["python -m striped_hf"]], ids=["command", "-m"]
)
def test_usage(command, tmp_path: Path) -> None:
    for arguments, status in (((), 2), (("--unknown",), 2), (("--help",), 0), (("-h",), 0)):
        finished = run(command, *arguments, cwd=tmp_path)
        assert finished.returncode == status
        assert (finished.stderr if status else finished.stdout).startswith("usage: ")
        assert "Traceback" not in finished.stderr


# child processes


@ways
@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_multiprocessing_finds_the_program_again(way, method: str, tmp_path: Path) -> None:
    script(
        tmp_path,
        f"""
        import multiprocessing, sys
        from dataclasses import dataclass

        @dataclass
        class Item:
            value: int

        def double(item):
            hook = any(type(f).__module__ == "striped_hf.import_hook" for f in sys.meta_path)
            return Item(2 * item.value), sys.path, hook

        if __name__ == "__main__":
            with multiprocessing.get_context({method!r}).Pool(2) as pool:
                results = pool.map(double, [Item(1), Item(2)])
            print([item for item, *_ in results], {{str(path) for _, path, _ in results}})
            print({{hook for *_, hook in results}}, file=sys.stderr)
        """,
    )
    expected, result = (run(command, "program.py", cwd=tmp_path) for command in (PYTHON, way))
    assert "[Item(value=2), Item(value=4)]" in expected.stdout
    assert (result.returncode, result.stdout) == (expected.returncode, expected.stdout)
    assert (expected.stderr, result.stderr) == ("{False}\n", "{True}\n")


@ways
def test_the_environments_own_sitecustomize_runs(way, tmp_path: Path) -> None:
    mine = script(tmp_path, "import sys; sys.mine = __file__", "own/sitecustomize.py").parent
    child = "import sys, sitecustomize as s; print(sys.mine, s.__file__, sys.path)"
    script(tmp_path, f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])")
    paths = f"{mine}{os.pathsep}{REPOSITORY}"
    finished = assert_same(way, "program.py", cwd=tmp_path, PYTHONPATH=paths)
    assert str(mine / "sitecustomize.py") in finished.stdout


@ways
@pytest.mark.parametrize("source", ["import no_such_module", "raise ValueError('wrong')"])
def test_an_error_in_the_environments_sitecustomize_is_reported(
    way, source: str, tmp_path: Path
) -> None:
    mine = script(tmp_path, source, "own/sitecustomize.py").parent
    script(tmp_path, "import sys; print(sys.path, 'sitecustomize' in sys.modules)")
    paths = f"{mine}{os.pathsep}{REPOSITORY}"
    expected, result = (
        run(command, "program.py", cwd=tmp_path, PYTHONPATH=paths) for command in (PYTHON, way)
    )
    assert expected.stderr.startswith("Error in sitecustomize")
    assert result.stdout == expected.stdout
    # once for each process, including striped-hf-run
    assert set(result.stderr.splitlines()) == set(expected.stderr.splitlines())


def other_pythons() -> Iterator[str]:
    for folder in sorted(Path.home().glob(".pyenv/versions/*")):
        yield str(folder / "bin" / "python")


@pytest.mark.parametrize("python", [sys.executable, *other_pythons()])
def test_a_python_without_striped_hf_runs_as_usual(python: str, tmp_path: Path) -> None:
    """The command may start any Python, also one that cannot run this package."""
    mine = script(tmp_path, "import sys; sys.mine = 1", "own/sitecustomize.py").parent
    startup = str(REPOSITORY / "striped_hf" / "startup")
    program = "import sys; print(sys.path); print(getattr(sys, 'mine', 0))"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for own, seen in (([], 0), ([str(mine)], 1)):
        outputs = []
        for paths in (own, [startup, *own]):
            finished = subprocess.run(
                [python, "-c", program],
                cwd=tmp_path,
                env=environment | ({"PYTHONPATH": os.pathsep.join(paths)} if paths else {}),
                capture_output=True,
                text=True,
            )
            assert (finished.returncode, finished.stderr) == (0, "")
            outputs.append(finished.stdout)
        assert outputs[0] == outputs[1]
        assert outputs[0].endswith(f"{seen}\n")
