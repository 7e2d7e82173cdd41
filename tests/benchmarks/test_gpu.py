"""``make gpu``: the order of the parts, failures, time limits, and results that are never lost."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_parts
from benchmarks.gpu_parts import Part

REPOSITORY = Path(__file__).resolve().parents[2]
FIRST, SECOND, THIRD, FOURTH, *_ = gpu_parts.RENDER


def writes(path: Path, **results: object) -> str:
    """The code of a part that writes results."""
    return f"import pathlib; pathlib.Path({str(path)!r}).write_text({json.dumps(results)!r}); "


def part(name: str, code: str, limit_s: float = 30, **more: bool) -> Part:
    return Part(name, ("-c", code), limit_s, **more)


def read(out: Path) -> dict:
    return json.loads((out / "gpu.json").read_text(encoding="utf-8"))


def ended(out: Path) -> dict[str, str]:
    return {part["part"]: part["ended"] for part in read(out)["parts"]}


def test_a_failing_part_does_not_stop_the_next(tmp_path, capfd):
    out = tmp_path / "new"
    parts = [
        part(FIRST, "print('one')"),
        part(SECOND, "import sys; print('two', file=sys.stderr); sys.exit(3)"),
        part(THIRD, "print('three')"),
    ]
    assert not gpu.run_parts(parts, out, tmp_path, 60)
    assert list(ended(out).values()) == ["passed", "failed with status 3", "passed"]
    printed = capfd.readouterr().out
    log = (out / "gpu.log").read_text(encoding="utf-8")
    for text in (printed, log):
        assert text.index("one") < text.index("two") < text.index("three")
        summary = text[text.index("== summary: FAILED") :].splitlines()
        assert [line.split(":")[0] for line in summary[1:4]] == [FIRST, SECOND, THIRD]


def test_all_parts_pass(tmp_path, capfd):
    assert gpu.run_parts([part(FIRST, "pass")], tmp_path, tmp_path, 60)
    assert "== summary: all parts passed" in capfd.readouterr().out


def test_a_part_ends_at_its_limit_with_its_children_and_keeps_its_results(tmp_path, capfd):
    late, results = tmp_path / "late", tmp_path / f"{FIRST}.json"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(late)!r}).touch()"
    code = writes(results, complete=False, passed=7, failed=0, skipped=0, failures=[])
    code += f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); "
    begin = time.monotonic()
    parts = [part(FIRST, code + "time.sleep(60)", limit_s=1.5), part(SECOND, "print('next')")]
    assert not gpu.run_parts(parts, tmp_path, tmp_path, 60)
    assert ended(tmp_path) == {FIRST: "ended after its limit of 2 s", SECOND: "passed"}
    assert read(tmp_path)["results"][FIRST]["passed"] == 7
    assert "| before the run was cut off | 7 | 0 | 0 |" in capfd.readouterr().out
    time.sleep(max(0, begin + 6 - time.monotonic()))
    assert not late.exists()


def test_all_parts_together_end_within_the_budget(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(gpu, "SHORTEST_S", 1)
    parts = [part(FIRST, "import time; time.sleep(60)", 60), part(SECOND, "pass", 60)]
    assert not gpu.run_parts(parts, tmp_path, tmp_path, 3)
    assert ended(tmp_path) == {
        FIRST: "ended after its limit of 3 s",
        SECOND: "not begun: no time left",
    }


def test_a_part_may_use_the_time_that_others_left(tmp_path, capfd):
    code = "import time; time.sleep(1.5)"
    assert gpu.run_parts([part(FIRST, code, 1, takes_the_rest=True)], tmp_path, tmp_path, 60)
    assert not gpu.run_parts([part(FIRST, code, 1)], tmp_path, tmp_path, 60)


def test_a_table_that_fails_loses_no_results(tmp_path, capfd):
    parts = [
        # without the entries that a table needs
        part(FIRST, writes(tmp_path / f"{FIRST}.json", figure=1)),
        part(SECOND, "print('goes on')"),
    ]
    assert gpu.run_parts(parts, tmp_path, tmp_path, 60)
    printed = capfd.readouterr().out
    assert "no table: KeyError" in printed
    assert "== summary: all parts passed" in printed
    assert read(tmp_path)["results"] == {FIRST: {"figure": 1}}


def test_parts_keep_the_given_python_path(tmp_path, monkeypatch, capfd):
    """It may be the path of packages outside of the environment."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(("/carried", "/too")))
    code = "import os; print('path', os.environ['PYTHONPATH'])"
    gpu.run_parts([part(FIRST, code)], tmp_path, tmp_path, 60)
    assert f"path {REPOSITORY}{os.pathsep}/carried{os.pathsep}/too\n" in capfd.readouterr().out


def test_a_kill_at_any_moment_keeps_the_measurements(tmp_path):
    """The results of finished parts and of the running part stay."""
    first, second = (tmp_path / f"{name}.json" for name in (FIRST, SECOND))
    codes = (writes(first, figure=1), writes(second, figure=2) + "import time; time.sleep(60)")
    run = (
        "from pathlib import Path; from benchmarks.gpu import run_parts\n"
        "from benchmarks.gpu_parts import Part\n"
        f"parts = [Part({FIRST!r}, ('-c', {codes[0]!r}), 60),"
        f" Part({SECOND!r}, ('-c', {codes[1]!r}), 60)]\n"
        f"run_parts(parts, Path({str(tmp_path / 'out')!r}), Path({str(tmp_path)!r}), 600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", run], cwd=REPOSITORY, start_new_session=True, stdout=subprocess.PIPE
    )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if (tmp_path / "out" / "gpu.json").is_file():
            written = read(tmp_path / "out")  # the file is whole JSON at every moment
            if SECOND in written["results"]:
                break
    time.sleep(2 * random.random())
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    written = read(tmp_path / "out")
    assert written["results"] == {FIRST: {"figure": 1}, SECOND: {"figure": 2}}
    assert ended(tmp_path / "out") == {
        FIRST: "passed",
        SECOND: "was running when the run was cut off",
    }


@pytest.mark.parametrize("listed", [gpu_parts.full, gpu_parts.smoke])
@pytest.mark.parametrize("rehearsal", [False, True])
def test_the_plan_fits_into_its_time(tmp_path, listed, rehearsal):
    parts = listed(tmp_path, rehearsal)
    budget_s = gpu.BUDGET_S[listed.__name__] * (gpu_parts.SLOW_REHEARSAL if rehearsal else 1)
    assert sum(part.limit_s for part in parts) <= budget_s
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)
    if listed is gpu_parts.full:
        assert names == list(gpu_parts.RENDER)
        assert gpu.BUDGET_S["full"] <= 9 * 60 - 10
    for part in parts:
        assert part.command[0] == "-m"
        assert (REPOSITORY / f"{part.command[1].replace('.', '/')}.py").is_file()
        assert str(tmp_path / f"{part.name}.json") in part.command
        if not rehearsal and part.name != "gpu_tests":
            assert "cpu" not in part.command


def test_the_finetune_has_the_settings_of_the_origins_measurement(tmp_path):
    (finetune,) = [p for p in gpu_parts.full(tmp_path, False) if p.name.startswith("finetune")]
    assert "gpt2-xl" in finetune.command
    assert "--accumulation" not in finetune.command


def test_collected_results_go_into_the_files_of_the_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    path = tmp_path / "gpu.json"
    results = {FIRST: {"figure": 1}, "../elsewhere": {"figure": 2}}
    path.write_text(json.dumps({"rehearsal": False, "results": results}))
    gpu.collect(path)
    (written,) = (tmp_path / "results").iterdir()
    assert written.name == f"{FIRST}.json"
    assert json.loads(written.read_text()) == {"figure": 1}
    assert not (tmp_path / "elsewhere.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not JSON", "pass a gpu.json that `make gpu` wrote"),
        ("[]", "pass a gpu.json that `make gpu` wrote"),
        ('{"rehearsal": true, "results": {}}', "a rehearsal measures nothing"),
    ],
)
def test_other_files_and_rehearsals_are_not_collected(tmp_path, text, message):
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with pytest.raises(gpu.UserError, match=message):
        gpu.collect(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_command_ends_with_an_error(run_script, tmp_path):
    done = run_script("benchmarks.gpu", cwd=tmp_path, status=1, OUT=str(tmp_path / "out"))
    assert done.stderr.splitlines()[-1] == (
        "gpu.py: error: there is no CUDA device: run this on a machine with a GPU, or rehearse it "
        "with `make gpu-check`"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.compat
@pytest.mark.slow
def test_every_part_runs_to_its_end_in_an_environment_like_a_gpu_machines(tmp_path):
    done = subprocess.run(
        ["make", "gpu-check"],
        cwd=REPOSITORY,
        env={**os.environ, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2000:]
    assert "every part ended with a whole result" in done.stdout
    written = read(tmp_path)
    assert written["environment"]["transformers"] == "5.17.0"
    assert list(written["results"]) == list(gpu_parts.RENDER)
    assert set(ended(tmp_path).values()) == {"passed"}
    assert len(list(tmp_path.iterdir())) == 2
