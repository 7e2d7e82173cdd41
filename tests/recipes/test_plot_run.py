"""The plot of runs from their folders: finished or not, with or without watching."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

from recipes import plot_run

PNG = b"\x89PNG\r\n\x1a\n"


def write_state(folder: Path, log: list[dict]) -> Path:
    folder.mkdir(parents=True)
    state = json.dumps({"log_history": log})
    (folder / "trainer_state.json").write_text(state, encoding="utf-8")
    return folder


def watched(scale: float) -> list[dict]:
    log: list[dict] = [
        {
            "step": step, "loss": scale / step, "learning_rate": 1e-3, "grad_norm": 1.0,
            "grad_norm_mean": scale, "grad_norm_max": 2 * scale, "peak_memory_mib": 100 + step,
        }
        for step in range(10, 60, 10)
    ]  # fmt: skip
    log[0] |= {"state_mib_exp_avg": 3.0, "state_mib_exp_avg_sq_row": 1.5}
    return [*log, {"step": 50, "eval_loss": scale}, {"step": 50, "train_runtime": 1.0}]


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the plot when it is written."""
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    yield lambda: kept[-1].axes
    monkeypatch.undo()
    plt.close("all")


def test_runs_are_drawn_together(monkeypatch, tmp_path, drawn, capsys):
    unwatched = [
        {k: v for k, v in entry.items() if k in ("step", "loss", "learning_rate", "grad_norm")}
        for entry in watched(3.0)
    ]
    folders = [
        write_state(tmp_path / "a" / "run", watched(1.0)),
        write_state(tmp_path / "b" / "run", watched(2.0)),
        write_state(tmp_path / "c" / "checkpoint-50", unwatched).parent,
    ]
    out = tmp_path / "plots" / "runs.png"
    monkeypatch.setattr(sys, "argv", ["plot_run.py", *map(str, folders), "--output", str(out)])
    plot_run.main()
    assert out.read_bytes().startswith(PNG)
    assert [path.name for path in out.parent.iterdir()] == ["runs.png"]
    loss, rate, norm, memory = drawn()
    shown = [text.get_text() for text in loss.get_legend().get_texts()]
    assert shown[:2] == ["a/run", "b/run"]  # the last parts of their paths are the same

    def curves(axis):
        lines = [list(line.get_ydata()) for line in axis.lines]
        return [line for line in lines if line]

    assert curves(loss)[0] == pytest.approx([1 / 10, 1 / 20, 1 / 30, 1 / 40, 1 / 50])
    assert [1.0] in curves(loss)  # validation
    assert len(curves(rate)) == 3
    assert [2.0] * 5 in curves(norm)  # the mean of b, and the largest of a
    assert curves(norm)[-1] == [1.0] * 5  # c has no mean
    assert curves(memory)[0] == [110, 120, 130, 140, 150]
    assert [4.5, 4.5] in curves(memory)  # the sum of both kinds of state
    assert len(curves(memory)) == 4
    assert len({line.get_color() for line in rate.lines}) == 3


def test_runs_with_few_logs(monkeypatch, tmp_path, drawn):
    """With more --logging_steps than steps there are only evaluations; one log is one point."""
    unlogged = [{"step": 3, "eval_loss": 2.0}, {"step": 6, "eval_loss": float("nan")}]
    folders = [
        write_state(tmp_path / "a", unlogged),
        write_state(tmp_path / "b", [{"step": 4, "loss": 3.0, "learning_rate": 1e-3}]),
    ]
    monkeypatch.setattr(sys, "argv", ["plot_run.py", *map(str, folders), "--output", "x.png"])
    monkeypatch.chdir(tmp_path)
    plot_run.main()
    loss, rate, *_ = drawn()
    one = [line for axis in (loss, rate) for line in axis.lines if len(line.get_xdata()) == 1]
    assert len(one) == 2
    assert all(line.get_marker() == "." for line in one)
    low, high = loss.get_ylim()
    assert low < 2 < 3 < high


@pytest.mark.slow
def test_a_real_run_finished_and_not(tiny_run, run_script, tmp_path):
    shutil.copytree(tiny_run / "checkpoint-10", tmp_path / "half" / "checkpoint-10")
    run_script("recipes/plot_run.py", tiny_run, tmp_path / "half", cwd=tmp_path)
    assert (tmp_path / "out" / "runs.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no trainer_state.json, nor a checkpoint"),
        ("{", "is not what Trainer writes"),
        ('{"log_history": []}', "has logged no loss: wait"),
    ],
)
def test_a_folder_without_a_run_ends_with_one_line(monkeypatch, tmp_path, content, message):
    if content is not None:
        (tmp_path / "trainer_state.json").write_text(content, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["plot_run.py", str(tmp_path)])
    with pytest.raises(plot_run.UserError, match=message):
        plot_run.main()
