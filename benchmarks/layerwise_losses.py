"""Train with the layerwise optimizers beside the ordinary ones, and compare the losses.

    python data_scripts/shakespeare_char.py
    python -m benchmarks.layerwise_losses

A small character model is trained from scratch, with three seeds. The first part accumulates each
step's gradient over 1, 4, 16 and 32 micro-batches, which share the same windows. The ordinary
optimizer needs no such rows: its accumulated gradient is the gradient of the whole batch. In the
second part one step in a hundred sees noise, whose gradient is large, and the rows differ in how
they clip it. A run that was stopped goes on where it was.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.small_trainings import (
    SEEDS,
    Training,
    argument_parser,
    character_task,
    mean_and_range,
    run_trainings,
    same_but_seed,
)
from striped_hf.cli import run
from striped_hf.results import markdown_table

RESULTS = "benchmarks/results/layerwise_losses.json"
ACCUMULATION, SPIKES = "accumulation", "spikes"
MICRO_BATCHES = (1, 4, 16, 32)
LEARNING_RATE = 2e-3
NOISE_EVERY = 100


def trainings() -> list[Training]:
    """Lists all trainings: spikes first."""
    spikes = [
        Training(
            *(SPIKES, optim, LEARNING_RATE, seed),
            max_grad_norm=max_grad_norm,
            noise_every=NOISE_EVERY,
        )
        for optim, max_grad_norm in (
            ("striped_adamw_8bit", 1.0),
            ("striped_adamw_8bit_layerwise", 1.0),
            ("striped_adamw_8bit", None),
        )
        for seed in SEEDS
    ]
    accumulation = [
        Training(*(ACCUMULATION, optim, LEARNING_RATE, seed), micro_batches=micro_batches)
        for name in ("striped_adamw_8bit", "striped_adamw_4bit")
        for optim, counts in ((name, (1,)), (f"{name}_layerwise", MICRO_BATCHES))
        for micro_batches in counts
        for seed in SEEDS
    ]
    return spikes + accumulation


def render_accumulation(results: dict[str, Any]) -> str:
    """Makes the Markdown table of the losses by the number of micro-batches."""
    return _render(results, ACCUMULATION, "micro-batches of a step", _micro_batches_of)


def render_spikes(results: dict[str, Any]) -> str:
    """Makes the Markdown table of the losses by the kind of clipping."""
    return _render(results, SPIKES, "clipping", _clipping_of)


def _render(
    results: dict[str, Any], task: str, title: str, cell_of: Callable[[dict[str, Any]], str]
) -> str:
    """Makes the Markdown table of one task, with a column that tells the trainings apart."""
    rows = [
        (
            f"`{rows[0]['optim']}`",
            cell_of(rows[0]),
            mean_and_range(rows, "train_loss"),
            mean_and_range(rows, "eval_loss"),
        )
        for rows in same_but_seed(results)
        if rows[0]["task"] == task
    ]
    return markdown_table(("optimizer", title, "train loss", "val loss"), rows)


def _micro_batches_of(row: dict[str, Any]) -> str:
    return str(row["micro_batches"]) if row["optim"].endswith("_layerwise") else "any"


def _clipping_of(row: dict[str, Any]) -> str:
    if row["max_grad_norm"] is None:
        return "none"
    assumed = "the step before's norm, or a larger estimate by the first gradients"
    return assumed if row["optim"].endswith("_layerwise") else "the norm of all gradients"


def main() -> None:
    args = argument_parser(__doc__, RESULTS).parse_args()
    task = character_task(args.data_dir)
    tasks = {
        # 32 windows x 32 characters = 1,024 tokens a step
        ACCUMULATION: replace(
            task, block_size=32, batch_size=32, steps=300, averaged=100, warmup=50
        ),
        SPIKES: task,
    }
    run_trainings(args.results, tasks, trainings())


if __name__ == "__main__":
    run(main)
