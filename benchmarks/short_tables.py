"""The short tables of the README, and the plot and sample of the documentation's first page.

Each comes from a results file; docs/benchmarks.md has the whole table.
"""

import os
from pathlib import Path
from typing import Any

from benchmarks.loss_peers import BASELINE
from benchmarks.loss_tables import KINDS, best_rate, mean, runs_by_rate
from striped_hf.results import markdown_table

# AdamW, StripedAdamW, and the other optimizers of at most about two bytes per parameter
SHOWN_LOSSES = (
    BASELINE,
    "striped_float32",
    "striped_int8",
    "striped_int4",
    "bitsandbytes_adamw8bit",
    "torchao_adamw8bit",
    "torchao_adamw4bit",
    "transformers_adafactor_no_momentum",
)
# fused AdamW, StripedAdamW in 8 bits, and 8-bit AdamW of other packages
PEERS = ("adamw_fused", "striped_int8", "bitsandbytes_adamw8bit", "torchao_adamw8bit")
FORMATS = {"adamw": "AdamW", "float32": "float32", "int8": "8-bit", "int4": "4-bit"}


def losses(results: dict[str, Any]) -> str:
    """Makes the table of losses, each optimizer at its best rate, with the differences from AdamW.

    Args:
        results: A results file of losses.py.
    """
    found = {name: runs_by_rate(results, name) for name in SHOWN_LOSSES}
    best = {name: rate for name, rates in found.items() if (rate := best_rate(rates)) is not None}

    def cell(name: str, kind: str) -> str:
        loss, adamw = (mean(found[each][best[each]], kind) for each in (name, BASELINE))
        assert loss is not None
        assert adamw is not None
        return f"{loss:.4f}" + ("" if name == BASELINE else f" ({loss - adamw:+.4f})")

    rows = [
        (
            f"`{name}`",
            f"{found[name][rate][0]['state_bytes_per_param']:.2f}",
            f"{rate:g}",
            *(cell(name, kind) for kind in KINDS),
        )
        for name, rate in best.items()
    ]
    header = ("optimizer", "state, bytes per parameter", "best rate", "train loss", "val loss")
    (count,) = {len(found[name][rate]) for name, rate in best.items()}
    of_adamw = [run["val_loss"] for run in found[BASELINE][best[BASELINE]]]
    return (
        f"{markdown_table(header, rows)}\n\nMeans of {count} seeds; in parentheses the difference "
        f"from AdamW. AdamW's own validation loss differs by {max(of_adamw) - min(of_adamw):.3f} "
        "between seeds."
    )


def state_bytes(results: dict[str, Any]) -> str:
    """Makes the table of optimizer state for each model, in MiB and in bytes per parameter."""
    rows = [
        (
            f"`{model['name']}`",
            *(
                f"{model[key] / 2**20:,.0f} MiB ({model[key] / model['parameters']:.2f})"
                for key in FORMATS
            ),
        )
        for model in results["models"]
    ]
    return markdown_table(("model", *FORMATS.values()), rows)


def draw_state_bytes(results: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draws the optimizer state of each model.

    Args:
        results: The results file of state_bytes.py.
        path: The PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    height = 0.8 / len(FORMATS)
    for i, (key, name) in enumerate(FORMATS.items()):
        sizes = [model[key] / 2**30 for model in results["models"]]
        places = [y + (i - (len(FORMATS) - 1) / 2) * height for y in range(len(sizes))]
        bars = axes.barh(places, sizes, height, label=name)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axes.set_yticks(range(len(results["models"])), [model["name"] for model in results["models"]])
    axes.invert_yaxis()
    axes.margins(x=0.08)  # room for the labels
    axes.set(xlabel="optimizer state, GiB", title="optimizer state of GPT-2's four sizes")
    axes.legend()
    partial = f"{path}.partial"
    figure.savefig(partial, dpi=130, format="png")
    os.replace(partial, Path(path))
    plt.close(figure)


def step_time(one_die: dict[str, Any], two_dies: dict[str, Any]) -> str:
    """Makes the table of a step's time as a ratio to fused AdamW's in the same run.

    Args:
        one_die: A results file of optimizers.py, measured on two cores of one die.
        two_dies: A results file of optimizers.py, measured on cores of two dies.
    """
    rows = {row["name"]: row for row in one_die["optimizers"]}
    other = {row["name"]: row for row in two_dies["optimizers"]}

    def ratio(row: dict[str, Any] | None) -> str:
        if row is None:
            return "not run"
        return f"{row['ratio']:.2f}" if row["usable"] else "unusable"

    body = [
        (
            f"`{name}`",
            f"{rows[name]['state_bytes_per_param']:.2f}",
            ratio(rows[name]),
            ratio(other.get(name)),
        )
        for name in PEERS
    ]
    header = (
        *("optimizer", "state, bytes per parameter"),
        *("time, two cores on one die", "time, cores on two dies"),
    )
    return (
        f"{markdown_table(header, body)}\n\nRatios to fused AdamW on the shapes of "
        f"`{one_die['shapes']}`, {one_die['dtype']}."
    )


def sample(results: dict[str, Any]) -> str:
    """Formats the text that a trained model wrote, with the losses of its run."""
    return (
        f"Train loss {results['train_loss']:.4f}, validation loss {results['eval_loss']:.4f}.\n\n"
        f"```text\n{results['text'].strip()}\n```"
    )
