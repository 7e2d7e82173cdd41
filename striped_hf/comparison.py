"""Runs of one recipe with several optimizers: their table and their plot.

A comparison is what ``recipes/compare_optimizers.py`` writes as ``comparison.json``: the
``environment`` (see ``results.common_environment``), the ``command``, and the ``runs``, each what
``finish_run`` measured and, where every optimizer ran once, its ``history``: ``steps`` and
``losses`` as logged in training, ``eval_steps`` and ``eval_losses``.
"""

import os
import statistics
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from striped_hf.results import markdown_table

Comparison = dict[str, Any]
Run = dict[str, Any]


def label(run: Run) -> str:
    """Names a run's optimizer, with its own arguments where it has any."""
    return f"{run['optim']} ({run['optim_args']})" if run["optim_args"] else run["optim"]


def groups(comparison: Comparison) -> dict[tuple[str, float], list[Run]]:
    """Collects the runs, which differ in their seeds, of each optimizer at each learning rate."""
    collected: dict[tuple[str, float], list[Run]] = {}
    for run in comparison["runs"]:
        collected.setdefault((label(run), run["learning_rate"]), []).append(run)
    return collected


def is_sweep(comparison: Comparison) -> bool:
    """Tells whether optimizers ran more than once, at several learning rates or seeds."""
    return len(comparison["runs"]) > len({label(run) for run in comparison["runs"]})


def render_table(comparison: Comparison) -> str:
    """Makes the Markdown table: one row a run, or for a sweep one a learning rate."""
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
                f"{run['median_step_ms']:.1f}",
                f"{run['train_loss']:.4f}",
                f"{run['eval_loss']:.4f}",
            )
            for run in comparison["runs"]
        ]
        return markdown_table(header, rows)

    rows = []
    for (name, learning_rate), runs in groups(comparison).items():
        losses = [run["eval_loss"] for run in runs]
        rows.append(
            (
                f"`{name}`",
                f"{learning_rate:g}",
                f"{statistics.mean(run['train_loss'] for run in runs):.4f}",
                f"{statistics.mean(losses):.4f}",
                f"{min(losses):.4f} to {max(losses):.4f}",
                str(len(runs)),
            )
        )
    header = ("optimizer", "learning rate", "train loss", "val loss", "val loss, range", "seeds")
    return markdown_table(header, rows)


def render_plot(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Draws the losses, over steps or for a sweep over learning rates, and optimizer memory.

    Args:
        comparison: What to draw.
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
            means = [statistics.mean(run["eval_loss"] for run in same) for same in runs]
            losses.plot(rates, means, marker="o", label=name, color=colors[name])
            for rate, same in zip(rates, runs, strict=True):
                seeds = [run["eval_loss"] for run in same]
                losses.scatter([rate] * len(seeds), seeds, s=12, alpha=0.5, color=colors[name])
        losses.set(xscale="log", xlabel="learning rate", ylabel="validation loss, nats per token")
        every_rate = sorted({rate for _, rate in groups(comparison)})
        losses.set_xticks(every_rate, [f"{rate:g}" for rate in every_rate])
        losses.minorticks_off()
        losses.set_title("validation loss: mean of the seeds (lines) and each seed (dots)")
    else:
        for run in comparison["runs"]:
            name, history = label(run), run["history"]
            losses.plot(history["steps"], history["losses"], lw=0.8, alpha=0.45, color=colors[name])
            losses.plot(
                history["eval_steps"],
                history["eval_losses"],
                marker="o",
                ms=4,
                lw=1.6,
                label=name,
                color=colors[name],
            )
        # the first steps fall from log(vocabulary) and would flatten everything after them
        settled = [
            loss
            for run in comparison["runs"]
            for loss in run["history"]["losses"][len(run["history"]["losses"]) // 10 :]
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
