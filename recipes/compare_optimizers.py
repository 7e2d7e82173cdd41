"""Run one recipe with several optimizers, one after another, and compare them.

    python recipes/compare_optimizers.py recipes/train_shakespeare_char.py \\
        --optim adamw_torch_fused@4e-3 striped_adamw@4e-3 striped_adamw_8bit@6e-3 -- --preset cpu

The arguments after `--` go to the recipe. Each run is a separate process with its own folder in
--output_dir, which also gets comparison.json (every measured figure), comparison.md and
comparison.png. An optimizer's own arguments and learning rate follow its name:
striped_adamw_8bit:nesterov=true@6e-3.

With --accelerate_config recipes/accelerate/ddp.yaml, accelerate launches each run on the devices of
that file.

--learning_rate and --seed accept several values. Every combination is run, and the table has each
optimizer's mean over the seeds at each learning rate. The table marks a run that diverged. It
leaves out a run that failed; the other runs continue. --resume keeps the finished runs of an
earlier, stopped comparison if their command, --accelerate_config and data are the same. If runs
come from several commits, versions or devices, the line under the table names them.
"""

import argparse
import itertools
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# imported before the packages of an extra, to explain a missing one
import striped_hf.cli  # noqa: F401

# isort: split
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from striped_hf.fingerprint import file_fingerprint
from striped_hf.results import (
    common_environment,
    loss_text,
    markdown_table,
    measured_on,
    write_json,
    write_text,
)

Comparison = dict[str, Any]
Run = dict[str, Any]


def main() -> None:
    args = parse_arguments()
    settings = list(itertools.product(args.optim, args.learning_rate, args.seed))
    names, runs, failed = [], [], []
    for i, (optim, learning_rate, seed) in enumerate(settings, start=1):
        optim, _, own_rate = optim.partition("@")
        optim, _, optim_args = optim.partition(":")
        learning_rate = own_rate or learning_rate
        name = "-".join(filter(None, (optim, optim_args, learning_rate, seed)))
        print(f"== run {i} of {len(settings)}: {name}", flush=True)
        flags = ["--optim", optim, "--optim_args", optim_args]
        flags += ["--learning_rate", learning_rate] if learning_rate else []
        flags += ["--seed", seed] if seed else []
        flags += [*args.recipe_flags, "--output_dir", str(args.output_dir / name)]
        run = run_recipe(args, flags, args.output_dir / name)
        if run is not None:
            names.append(name)
            runs.append(run)
            continue
        print(f"{name} failed; its output above says why", flush=True)
        failed.append(name)
        if not runs:  # the first run failed, so the others would too
            break
    if not runs:
        sys.exit(f"error: {failed[0]} failed; its output above says why")

    environments = {name: run.pop("environment") for name, run in zip(names, runs, strict=True)}
    comparison: dict[str, Any] = {"environment": common_environment(environments), "runs": runs}
    comparison["command"] = shlex.join(["python", *sys.argv])
    for run in runs:
        if is_sweep(comparison):
            run.pop("history")
    write_json(args.output_dir / "comparison.json", comparison)
    table = f"{render_table(comparison)}\n\n{dtypes(comparison)}"
    table += measured_on(comparison["environment"])
    write_text(args.output_dir / "comparison.md", f"{table}\n")
    render_plot(comparison, args.output_dir / "comparison.png")
    print(f"\n{table}\n")
    print(f"written to {args.output_dir}/comparison.json, comparison.md and comparison.png")
    if failed:
        sys.exit(f"error: not in the comparison, since they failed: {', '.join(failed)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="the script to run, such as recipes/finetune_shakespeare.py")
    parser.add_argument("--optim", nargs="+", required=True, metavar="NAME[:OPTIM_ARGS][@LR]")
    parser.add_argument("--learning_rate", nargs="+", default=[""], metavar="LR")
    parser.add_argument("--seed", nargs="+", default=[""], metavar="SEED")
    parser.add_argument("--output_dir", type=Path, default=Path("out/comparison"))
    parser.add_argument(
        "--accelerate_config", metavar="FILE", help="accelerate launches the runs with this"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep finished runs of a stopped comparison"
    )
    given = sys.argv[1:]
    split = given.index("--") if "--" in given else len(given)
    args = parser.parse_args(given[:split])
    args.recipe_flags = given[split + 1 :]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error("start it with python; with --accelerate_config it launches its runs")
    if not Path(args.recipe).is_file():
        parser.error(f"{args.recipe} does not exist: pass a script of recipes/")
    if args.accelerate_config and not Path(args.accelerate_config).is_file():
        parser.error(f"--accelerate_config {args.accelerate_config} does not exist")
    return args


def run_recipe(args: argparse.Namespace, flags: list[str], folder: Path) -> Run | None:
    """Runs the recipe, unless --resume finds its finished result.

    Returns:
        The content of run.json, and the losses over time as ``history``; None if the recipe failed.
    """
    result = folder / "run.json"
    printed = shlex.join(["python", args.recipe, *flags])
    launcher = []
    if args.accelerate_config:
        launcher = ["-m", "accelerate.commands.launch", "--config_file", args.accelerate_config]
    done = args.resume and result.exists()
    earlier = json.loads(result.read_text(encoding="utf-8")) if done else {}
    done = done and earlier["command"] == printed
    # the command in run.json does not include the launcher, so keep its configuration
    launch = folder / "accelerate_config.yaml"
    config = Path(args.accelerate_config).read_text("utf-8") if args.accelerate_config else None
    if done and config != (launch.read_text("utf-8") if launch.exists() else None):
        print(f"{folder} was run under another --accelerate_config: it is run again", flush=True)
        done = False
    if done and (changed := changed_files(earlier)):
        print(f"{folder} was run before {changed} was changed: it is run again", flush=True)
        done = False
    if not done:
        result.unlink(missing_ok=True)
        launch.unlink(missing_ok=True)
        if config is not None:
            write_text(launch, config)
        command = [sys.executable, *launcher, args.recipe, *flags]
        if subprocess.run(command).returncode != 0:
            return None
    run = json.loads(result.read_text(encoding="utf-8"))
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    train = [entry for entry in log if "loss" in entry]
    # the last two entries are the final evaluations of the best checkpoint
    evals = {entry["step"]: entry["eval_loss"] for entry in log[:-2] if "eval_loss" in entry}
    run["history"] = {
        "steps": [entry["step"] for entry in train],
        "losses": [_finite(entry["loss"]) for entry in train],
        "eval_steps": list(evals),
        "eval_losses": [_finite(loss) for loss in evals.values()],
    }
    return run


def changed_files(run: Run) -> str | None:
    """Names the data files that have another content now than when a run read them."""
    changed = [
        path
        for path, fingerprint in run.get("data", {}).items()
        if not Path(path).is_file() or file_fingerprint(Path(path)) != fingerprint
    ]
    return " and ".join(changed) or None


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def mean(losses: Sequence[float | None]) -> float | None:
    """Returns the mean of some losses; None if one of the runs diverged."""
    known = [loss for loss in losses if loss is not None]
    return statistics.mean(known) if len(known) == len(losses) else None


def label(run: Run) -> str:
    """Names a run's optimizer, with its own arguments if it has any."""
    return f"{run['optim']} ({run['optim_args']})" if run["optim_args"] else run["optim"]


def groups(comparison: Comparison) -> dict[tuple[str, float], list[Run]]:
    """Groups the runs by optimizer and learning rate; the runs of a group differ in their seeds."""
    collected: dict[tuple[str, float], list[Run]] = {}
    for run in comparison["runs"]:
        collected.setdefault((label(run), run["learning_rate"]), []).append(run)
    return collected


def is_sweep(comparison: Comparison) -> bool:
    """Returns whether an optimizer ran more than once, at several learning rates or seeds."""
    return len(comparison["runs"]) > len({label(run) for run in comparison["runs"]})


def dtypes(comparison: Comparison) -> str:
    """Returns a sentence with the dtype of the runs' weights, or "" for older results files."""
    found = sorted({run["dtype"] for run in comparison["runs"] if "dtype" in run})
    return f"Weights in {' and '.join(found)}. " if found else ""


def render_table(comparison: Comparison) -> str:
    """Makes the Markdown table: one row per run, or in a sweep per optimizer and learning rate."""
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    if not is_sweep(comparison):
        header = (
            *("optimizer", "learning rate", "state, bytes per parameter", "peak memory, MiB"),
            *("median step, ms", "train loss", "val loss"),
        )
        rows = [
            (
                f"`{label(run)}`",
                f"{run['learning_rate']:g}",
                f"{run['state_bytes_per_param']:.2f}",
                f"{run['peak_memory_mib']:,.0f}",
                "" if run["median_step_ms"] is None else f"{run['median_step_ms']:.1f}",
                loss_text(run["train_loss"]),
                loss_text(run["eval_loss"]),
            )
            for run in comparison["runs"]
        ]
        return markdown_table(header, rows)

    rows = []
    for (name, learning_rate), runs in groups(comparison).items():
        losses = [run["eval_loss"] for run in runs]
        # a run that diverged counts as the highest
        lowest, *_, highest = sorted([*losses, *losses[:1]], key=_order)
        rows.append(
            (
                f"`{name}`",
                f"{learning_rate:g}",
                loss_text(mean([run["train_loss"] for run in runs])),
                loss_text(mean(losses)),
                f"{loss_text(lowest)} to {loss_text(highest)}",
                str(len(runs)),
            )
        )
    header = ("optimizer", "learning rate", "train loss", "val loss", "val loss, range", "seeds")
    return markdown_table(header, rows)


def _order(loss: float | None) -> float:
    return math.inf if loss is None else loss


def _drawn(loss: float | None) -> float:
    return math.nan if loss is None else loss  # matplotlib draws a gap for it


def render_plot(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Plots the losses over steps (in a sweep over learning rates), and the optimizer state.

    Args:
        comparison: The content of comparison.json.
        path: The PNG file to write.
    """
    figure, (losses, memory) = plt.subplots(
        1, 2, figsize=(11, 4.2), width_ratios=(2, 1), layout="constrained"
    )
    by_label: dict[str, list[Run]] = {}
    for run in comparison["runs"]:
        by_label.setdefault(label(run), []).append(run)
    colors = dict(zip(by_label, plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]

    if is_sweep(comparison):
        for name in by_label:
            rates = sorted(rate for other, rate in groups(comparison) if other == name)
            runs = [groups(comparison)[name, rate] for rate in rates]
            means = [_drawn(mean([run["eval_loss"] for run in same])) for same in runs]
            losses.plot(rates, means, marker="o", label=name, color=colors[name])
            for rate, same in zip(rates, runs, strict=True):
                seeds = [_drawn(run["eval_loss"]) for run in same]
                losses.scatter([rate] * len(seeds), seeds, s=12, alpha=0.5, color=colors[name])
        losses.set(xscale="log", xlabel="learning rate", ylabel="validation loss, nats per token")
        every_rate = sorted({rate for _, rate in groups(comparison)})
        losses.set_xticks(every_rate, [f"{rate:g}" for rate in every_rate])
        losses.minorticks_off()
        losses.set_title("validation loss: mean of the seeds (lines) and each seed (dots)")
    else:
        for run in comparison["runs"]:
            name, history = label(run), run["history"]
            values = [_drawn(loss) for loss in history["losses"]]
            losses.plot(history["steps"], values, lw=0.8, alpha=0.45, color=colors[name])
            losses.plot(
                history["eval_steps"],
                [_drawn(loss) for loss in history["eval_losses"]],
                marker="o",
                ms=4,
                lw=1.6,
                label=name,
                color=colors[name],
            )
        # without the first tenth of the steps, whose fall would flatten the rest
        settled = [
            loss
            for run in comparison["runs"]
            for loss in run["history"]["losses"][len(run["history"]["losses"]) // 10 :]
            if loss is not None
        ]
        if settled:
            margin = 0.05 * (max(settled) - min(settled))
            losses.set_ylim(min(settled) - margin, max(settled) + margin)
        losses.set(xlabel="step", ylabel="loss, nats per token")
        losses.set_title("validation loss (dots) and training loss (thin)")
    losses.legend()
    losses.grid(alpha=0.3)

    names = list(by_label)
    sizes = [by_label[name][0]["state_bytes_per_param"] for name in names]
    bars = memory.barh(range(len(names)), sizes, color=[colors[name] for name in names])
    memory.bar_label(bars, fmt="%.2f", padding=2)
    memory.set_yticks(range(len(names)), [name.replace(" ", "\n") for name in names])
    memory.invert_yaxis()
    memory.set_xlim(0, 1.15 * max(sizes))
    memory.set(xlabel="bytes per parameter")
    memory.set_title("optimizer state")
    partial = f"{path}.partial"
    figure.savefig(partial, dpi=130, format="png")
    os.replace(partial, path)
    plt.close(figure)


if __name__ == "__main__":
    main()
