"""The short tables of the README, and the plot and sample of the documentation's first page.

Each comes from a results file; docs/benchmarks.md has the whole table.
"""

import os
from pathlib import Path
from typing import Any

from benchmarks.loss_peers import BASELINE
from benchmarks.loss_tables import KINDS, Runs, best_rate, is_complete, mean, runs_by_rate
from striped_hf.results import markdown_table

# AdamW, StripedAdamW, the other optimizers of at most about two bytes per parameter, and the best
SHOWN_LOSSES = (
    BASELINE,
    "striped_float32",
    "striped_int8",
    "striped_int4",
    "bitsandbytes_adamw8bit",
    "torchao_adamw8bit",
    "torchao_adamw4bit",
    "transformers_adafactor_no_momentum",
    "adafactor8bit_adafactor",
    "muon",
)
# fused AdamW, StripedAdamW in 8 bits, and 8-bit AdamW of other packages
PEERS = ("adamw_fused", "striped_int8", "bitsandbytes_adamw8bit", "torchao_adamw8bit")
FORMATS = {"adamw": "AdamW", "float32": "float32", "int8": "8-bit", "int4": "4-bit"}


def losses(scratch: dict[str, Any], finetune: dict[str, Any]) -> str:
    """Makes the table of losses: AdamW's, and differences from them, each at its best rate.

    Args:
        scratch: A results file of losses.py: a training from scratch.
        finetune: Another one: the finetuning of a pretrained model.
    """
    found = [_best_runs(each) for each in (scratch, finetune)]
    texts = []
    for runs in found:
        (count,) = {len(some) for some in runs.values()}
        of_adamw = [run["val_loss"] for run in runs[BASELINE]]
        texts.append(f"{count} seeds ({max(of_adamw) - min(of_adamw):.3f})")

    def cell(name: str, runs: dict[str, Runs], kind: str) -> str:
        if name not in runs:
            return "not run"
        loss, adamw = mean(runs[name], kind), mean(runs[BASELINE], kind)
        assert loss is not None
        assert adamw is not None
        return f"{loss:.4f}" if name == BASELINE else f"{loss - adamw:+.4f}"

    rows = [
        (
            f"`{name}`",
            f"{(found[1].get(name) or found[0][name])[0]['state_bytes_per_param']:.2f}",
            *(cell(name, runs, kind) for runs in found for kind in KINDS),
        )
        for name in SHOWN_LOSSES
        if name in found[0]
    ]
    header = (
        *("optimizer", "state, bytes per parameter", "from scratch: train", "val"),
        *("finetuning: train", "val"),
    )
    return (
        f"{markdown_table(header, rows)}\n\nAdamW's losses, and the differences from them. Means "
        f"of {texts[0]} and {texts[1]}; in parentheses the range of AdamW's validation losses. "
        "The bytes depend on the model: they are those of the finetuning, where that was run."
    )


def _best_runs(results: dict[str, Any]) -> dict[str, Runs]:
    """Returns the runs of each shown optimizer at its best rate."""
    found = {name: runs_by_rate(results, name) for name in SHOWN_LOSSES}
    return {
        name: rates[rate]
        for name, rates in found.items()
        if is_complete(results, name) and (rate := best_rate(rates)) is not None
    }


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
