"""``make gpu``'s driver: order, failures, time limits, where results go, and the summary."""

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Part, run_parts

REPOSITORY = Path(__file__).resolve().parents[2]


def python(code: str, name: str = "part", limit_s: float = 30, **results) -> Part:
    return Part(name, ("-c", code), limit_s, **results)


def read(out: Path) -> dict:
    return json.loads((out / "gpu.json").read_text(encoding="utf-8"))


def test_a_failing_part_does_not_stop_the_next(tmp_path, capfd):
    out = tmp_path / "new"
    parts = [
        python("print('one')", "first"),
        python("import sys; print('two'); sys.exit(3)", "second"),
        python("print('three')", "third"),
    ]
    assert not run_parts(parts, out)
    printed = capfd.readouterr().out
    assert printed.index("one") < printed.index("two") < printed.index("three")
    ended = [part["ended"] for part in read(out)["parts"]]
    assert ended == ["passed", "failed with status 3", "passed"]
    last = printed.strip().splitlines()[-4:]
    assert last[0].startswith("== summary: FAILED")
    assert [line.split(":")[0] for line in last[1:]] == ["first", "second", "third"]


def test_all_parts_pass(tmp_path, capfd):
    assert run_parts([python("pass")], tmp_path)
    assert "== summary: all parts passed" in capfd.readouterr().out


def test_a_part_is_ended_at_its_limit_with_its_children(tmp_path, capfd):
    late = tmp_path / "late"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(late)!r}).touch()"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); "
    begin = time.monotonic()
    parts = [python(code + "time.sleep(60)", "slow", limit_s=1.5), python("print('next')", "next")]
    assert not run_parts(parts, tmp_path)
    assert [part["ended"] for part in read(tmp_path)["parts"]] == [
        "ended after its limit of 2 s",
        "passed",
    ]
    time.sleep(max(0, begin + 6 - time.monotonic()))
    assert not late.exists()


def test_the_budget_of_all_parts_holds(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(gpu, "SHORTEST_S", 1)
    parts = [
        python("import time; time.sleep(60)", "first", limit_s=60),
        python("pass", "second", limit_s=60),
    ]
    assert not run_parts(parts, tmp_path, budget_s=3)
    ended = [part["ended"] for part in read(tmp_path)["parts"]]
    assert ended == ["ended after its limit of 3 s", "not begun: no time left"]


def test_the_summary_shows_tables_of_this_run_only(tmp_path, capfd):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text('{"value": "from before"}')
    write = f"import pathlib; pathlib.Path({str(new)!r}).write_text('{{\"value\": 7}}')"

    def render(results):
        return f"| value {results['value']} |"

    parts = [
        python(write, "writes", results=new, render=render),
        python("raise SystemExit(1)", "fails", results=old, render=render),
    ]
    run_parts(parts, tmp_path)
    printed = capfd.readouterr().out
    assert printed.index("| value 7 |") < printed.index("== summary")
    assert "from before" not in printed


def test_parts_fit_into_nine_minutes_and_write_where_they_are_told(tmp_path):
    parts = gpu.parts(tmp_path)
    assert gpu.BUDGET_S <= 9 * 60 - 10
    assert all(gpu.SHORTEST_S < part.limit_s < gpu.BUDGET_S for part in parts)
    assert parts[0].command[:2] == ("-m", "pytest")
    written = [part.results for part in parts if part.results]
    assert len(set(written)) == len(written) == len(parts) - 1
    for part in parts[1:]:
        assert part.results.parent == tmp_path
        assert str(part.results) == part.command[-1]
        assert (REPOSITORY / f"{part.command[1].replace('.', '/')}.py").is_file()
        assert part.render is not None
        assert "cuda" in part.command
    # the setting whose memory the origin of the project measured
    assert "gpt2-xl" in parts[1].command
    assert "--accumulation" not in parts[1].command


@pytest.mark.slow
def test_real_parts_run_on_a_cpu_with_a_tiny_model(tmp_path, monkeypatch, capfd, tiny_config):
    """The commands as they are, but for the device, the model and the number of optimizers."""
    monkeypatch.chdir(tmp_path)
    planned = []
    for part in gpu.parts(tmp_path, device="cpu"):
        command = [
            str(tiny_config) if word in ("gpt2", "gpt2-xl") else word for word in part.command
        ]
        if part.name.startswith("optimizers") and part.command[-3] == "bfloat16":
            command += ["--rounds", "2", "--optimizers", "striped_int8"]
        elif part.name == "finetune_gpt2_xl":
            command += ["--steps", "2", "--accumulation", "2", "--block_size", "32"]
            command += ["--optim", "striped_adamw_8bit"]
        else:
            continue
        planned.append(Part(part.name, tuple(command), 120, part.results, part.render))
    assert len(planned) == 3
    assert run_parts(planned[:2], tmp_path, budget_s=240)
    printed = capfd.readouterr().out
    tables = printed[printed.index("== results") :]
    assert "`striped_adamw_8bit`" in tables
    assert "`striped_int8`" in tables


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(run_script, tmp_path):
    done = run_script("benchmarks.gpu", cwd=tmp_path, status=1, OUT=str(tmp_path / "out"))
    assert done.stderr.splitlines()[-1] == (
        "gpu.py: error: there is no CUDA device here: run it where there is one"
    )


@pytest.mark.parametrize("given", [True, False])
def test_results_go_where_out_says(monkeypatch, tmp_path, given):
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "run_parts", lambda parts, out: seen.append((parts, out)) or False)
    monkeypatch.setenv("OUT", str(tmp_path) if given else "")
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1
    (parts, out), wanted = seen[0], tmp_path if given else REPOSITORY / "benchmarks" / "results"
    assert out == wanted
    assert all(part.results.parent == wanted for part in parts if part.results)
