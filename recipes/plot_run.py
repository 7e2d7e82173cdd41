"""Plot one or more runs from their folders: loss, learning rate, gradient norm and memory.

    python recipes/plot_run.py out/shakespeare_char
    python recipes/plot_run.py out/comparison/* --output comparison.png

A run is a folder with trainer_state.json. For an unfinished run, the plot shows its last
checkpoint. No tracking server is needed. The training loss has one point every --logging_steps
steps, the validation loss one every --eval_steps.
"""

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

# imported before the packages of an extra, to explain a missing one
from striped_hf.cli import UserError, run

# isort: split
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from transformers.trainer_utils import get_last_checkpoint


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Returns Trainer's logs of a run, in order."""
    path = folder / "trainer_state.json"
    if not path.is_file():
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if last is None or not (path := Path(last, "trainer_state.json")).is_file():
            raise UserError(
                f"{folder} has no trainer_state.json, nor a checkpoint with one: pass the "
                "--output_dir of a run, after its first checkpoint"
            )
    try:
        return json.loads(path.read_text(encoding="utf-8"))["log_history"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not what Trainer writes: {error!r}") from None


def series(log: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Returns the steps at which a figure was logged, and its values."""
    found = {entry["step"]: entry[key] for entry in log if key in entry}
    return list(found), list(found.values())


def state_mib(log: list[dict[str, Any]]) -> float | None:
    """Returns the last logged size of the whole optimizer state, in MiB; None if never logged."""
    for entry in reversed(log):
        kinds = [value for key, value in entry.items() if key.startswith("state_mib_")]
        if kinds:
            return sum(kinds)
    return None


def names(folders: list[Path]) -> list[str]:
    """Names runs by the last parts of their paths, as many as needed to make the names unique."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-count:]) for part in parts]
        if len(set(short)) == len(short):
            break
    return short


def draw(logs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draws runs into a PNG file, each in its own colour."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    loss, rate, norm, memory = axes.flat
    for number, (name, log) in enumerate(logs.items()):
        color = f"C{number % 10}"
        # markers for few logged steps: a single point has no line
        few = {"marker": "."} if len(series(log, "loss")[0]) < 3 else {}
        loss.plot(*series(log, "loss"), lw=0.9, alpha=0.5, color=color, **few)
        loss.plot(*series(log, "eval_loss"), marker="o", ms=3.5, lw=1.5, color=color)
        loss.plot([], [], color=color, label=name)
        rate.plot(*series(log, "learning_rate"), color=color, **few)
        # a run without `watch` has only the norm of each logged step
        steps, norms = series(log, "grad_norm_mean")
        steps, norms = (steps, norms) if steps else series(log, "grad_norm")
        norm.plot(steps, norms, lw=1, color=color, **few)
        norm.plot(*series(log, "grad_norm_max"), lw=0.7, ls=":", color=color, **few)
        memory.plot(*series(log, "peak_memory_mib"), color=color, **few)
        if (size := state_mib(log)) is not None:
            memory.axhline(size, ls="--", lw=1, color=color)
    settle(loss, [series(log, "loss")[1] or series(log, "eval_loss")[1] for log in logs.values()])
    loss.set(title="loss: training (thin), validation (dots)", ylabel="nats per token")
    loss.legend(fontsize="small")
    rate.set(title="learning rate", ylabel="learning rate")
    norm.set(title="gradient norm before clipping: mean, largest (dotted)", ylabel="norm")
    if norm.lines and any(len(line.get_xdata()) for line in norm.lines):
        norm.set_yscale("log")
    memory.set(title="memory: peak, optimizer state (dashed)", ylabel="MiB")
    memory.set_ylim(bottom=0)
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=130, format="png")
    os.replace(partial, path)
    plt.close(figure)


def settle(axis: Axes, losses: list[list[float]]) -> None:
    """Sets the y-range without the first tenth of the steps, whose fall would flatten the rest."""
    settled = [loss for each in losses for loss in each[len(each) // 10 :] if math.isfinite(loss)]
    if settled:
        margin = 0.05 * (max(settled) - min(settled)) or 0.1
        axis.set_ylim(min(settled) - margin, max(settled) + margin)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's --output_dir")
    parser.add_argument("--output", type=Path, default=Path("out/runs.png"), help="PNG file")
    args = parser.parse_args()
    folders = list(dict.fromkeys(args.runs))
    logs = {name: read_log(f) for name, f in zip(names(folders), folders, strict=True)}
    for name, log in logs.items():
        if not (series(log, "loss")[0] or series(log, "eval_loss")[0]):
            raise UserError(
                f"{name} has logged no loss: wait for its next checkpoint, or run it with fewer "
                "--logging_steps than it has steps"
            )
    draw(logs, args.output)
    print(f"drawn into {args.output}")


if __name__ == "__main__":
    run(main)
