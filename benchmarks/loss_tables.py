"""The tables and the plot of a results file of losses.py."""

import os
import statistics
from pathlib import Path
from typing import Any

from benchmarks.loss_grid import wanted
from benchmarks.loss_peers import BASELINE, PEERS
from benchmarks.loss_studies import STUDIES
from benchmarks.loss_tasks import TASKS
from striped_hf.results import loss_text, markdown_table

Results = dict[str, Any]
Runs = list[dict[str, Any]]
KINDS = ("train_loss", "val_loss")


def runs_by_rate(results: Results, name: str) -> dict[float, Runs]:
    """Returns an optimizer's runs by learning rate; the runs of a rate differ in their seeds."""
    rates: dict[float, Runs] = {}
    for run in results["runs"]:
        if run["optimizer"] == name:
            rates.setdefault(run["learning_rate"], []).append(run)
    return dict(sorted(rates.items()))


def mean(runs: Runs, kind: str) -> float | None:
    """Returns the mean of a loss over some seeds; None if one of the runs diverged."""
    losses = [run[kind] for run in runs]
    return None if None in losses else statistics.mean(losses)


def best_rate(rates: dict[float, Runs]) -> float | None:
    """Returns the rate with the lowest mean validation loss, of the rates with the most seeds.

    Returns:
        None if there is no run, or if all of them diverged.
    """
    most = max(map(len, rates.values()), default=0)
    losses = {rate: mean(runs, "val_loss") for rate, runs in rates.items() if len(runs) == most}
    known = {rate: loss for rate, loss in losses.items() if loss is not None}
    return min(known, key=lambda rate: known[rate]) if known else None


def is_complete(results: Results, name: str) -> bool:
    """Tells whether an optimizer has all runs that its grid of learning rates needs."""
    task = TASKS[results["task"]]
    runs = [run for run in results["runs"] if run["optimizer"] == name]
    return not wanted(runs, task.rates, task.seeds)


def render(results: Results) -> str:
    """Makes the Markdown tables: each optimizer at its best rate, and equal learning rates."""
    task = TASKS[results["task"]]
    tokens = results["batch_size"] * results["block_size"]
    versions = sorted({f"{run['package']} {run['version']}" for run in results["runs"]})
    parts = [_best_table(results), *_equal_table(results)]
    parts.append(
        f"{task.text}: {results['steps']:,} steps of {tokens:,} tokens, betas "
        f"{results['betas'][0]:g} and {results['betas'][1]:g}. Versions: {', '.join(versions)}."
    )
    return "\n\n".join(parts)


def _best_table(results: Results) -> str:
    header = (
        *("optimizer", "state, bytes per parameter", "best rate", "train loss", "val loss"),
        *("val loss, range", "seeds", "rates", "row"),
    )
    rows = []
    for name in PEERS:
        rates = runs_by_rate(results, name)
        best = best_rate(rates)
        if name in results["reasons"]:
            rows.append((f"`{name}`", *[""] * 7, f"cannot run: {results['reasons'][name]}"))
        elif best is None:
            rows.append((f"`{name}`", *[""] * 7, "diverged" if rates else "not run yet"))
        else:
            runs = rates[best]
            losses = [run["val_loss"] for run in runs]
            rows.append(
                (
                    f"`{name}`",
                    f"{runs[0]['state_bytes_per_param']:.2f}",
                    f"{best:g}",
                    *(loss_text(mean(runs, kind)) for kind in KINDS),
                    f"{min(losses):.4f} to {max(losses):.4f}",
                    str(len(runs)),
                    str(len(rates)),
                    "complete" if is_complete(results, name) else "incomplete",
                )
            )
    return markdown_table(header, rows)


def _equal_table(results: Results) -> list[str]:
    """Compares StripedAdamW with AdamW at equal rates, over their common seeds."""
    baseline = runs_by_rate(results, BASELINE)
    rows = []
    for name, peer in (PEERS | STUDIES).items():
        if peer.package != "striped_hf" and name not in STUDIES:
            continue
        for rate, runs in runs_by_rate(results, name).items():
            by_seed = {run["seed"]: run for run in baseline.get(rate, [])}
            pairs = [
                (run, by_seed[run["seed"]])
                for run in runs
                if run["seed"] in by_seed
                and None not in (run["val_loss"], by_seed[run["seed"]]["val_loss"])
            ]
            if not pairs:
                continue
            cells = [f"`{name}`", f"{rate:g}"]
            for kind in KINDS:
                differences = [run[kind] - other[kind] for run, other in pairs]
                cells.append(f"{statistics.mean(differences):+.4f}")
                cells.append(f"{min(differences):+.4f} to {max(differences):+.4f}")
            rows.append((*cells, str(len(pairs))))
    if not rows:
        return []
    header = (
        *("difference from AdamW", "learning rate", "train loss", "range"),
        *("val loss", "range", "seeds"),
    )
    return [markdown_table(header, rows)]


def draw(results: Results, path: str | os.PathLike[str]) -> None:
    """Plots the validation loss at the best rate over the bytes of state.

    A bar is the range of the seeds. A hollow point is a row that is not complete.

    Args:
        results: The results file.
        path: The PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for name, peer in PEERS.items():
        rates = runs_by_rate(results, name)
        best = best_rate(rates)
        if best is None:
            continue
        losses = [run["val_loss"] for run in rates[best]]
        center = statistics.mean(losses)
        color = "tab:blue" if peer.package == "striped_hf" else "tab:gray"
        color = "black" if name == BASELINE else color
        size = rates[best][0]["state_bytes_per_param"]
        axes.errorbar(
            size,
            center,
            yerr=[[center - min(losses)], [max(losses) - center]],
            marker="o",
            mfc=color if is_complete(results, name) else "white",
            color=color,
            capsize=3,
        )
        axes.annotate(
            name, (size, center), xytext=(5, 4), textcoords="offset points", fontsize=8, color=color
        )
    axes.set(
        xscale="log",
        xlabel="optimizer state, bytes per parameter",
        ylabel="validation loss, nats per token",
        title="validation loss at the best learning rate found",
    )
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)
    partial = f"{path}.partial"
    figure.savefig(partial, dpi=130, format="png")
    os.replace(partial, Path(path))
    plt.close(figure)
