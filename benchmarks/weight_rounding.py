"""Train with weights in float32 and in bfloat16, rounded in several ways, and compare the losses.

    python data_scripts/shakespeare_char.py
    python data_scripts/shakespeare.py --tokenizer stories260K --output_dir data/shakespeare_stories
    python -m benchmarks.weight_rounding --model stories260K \\
        --model_data_dir data/shakespeare_stories

Two tasks: finetuning stories260K on Shakespeare at two small learning rates, and training a small
character model from scratch. Each row has three seeds. A run that was stopped goes on where it was.
"""

from typing import Any

from benchmarks.small_trainings import (
    ADAMW,
    SEEDS,
    Training,
    argument_parser,
    character_task,
    finetuning_task,
    label,
    mean_and_range,
    run_trainings,
    same_but_seed,
)
from striped_hf.cli import run
from striped_hf.results import markdown_table

RESULTS = "benchmarks/results/weight_rounding.json"
FINETUNE, SCRATCH = "finetune", "scratch"
RATES = {FINETUNE: (3e-5, 3e-6), SCRATCH: (2e-3,)}
# optimizer, dtype of the weights, options, and how the new weights are rounded
ROWS: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    (ADAMW, "float32", {}, "not rounded"),
    (ADAMW, "bfloat16", {}, "to nearest"),
    ("striped_adamw_8bit", "float32", {}, "not rounded"),
    ("striped_adamw_8bit", "bfloat16", {"stochastic_rounding": False}, "to nearest"),
    ("striped_adamw_8bit", "bfloat16", {}, "stochastic"),
    ("striped_adamw_8bit_layerwise", "bfloat16", {}, "stochastic"),
    ("striped_adamw_8bit", "bfloat16", {"master_bits": 24}, "stochastic, from 24 bits"),
)


def trainings() -> list[Training]:
    """Lists all trainings: the rows of the finetuning first."""
    return [
        Training(task, optim, rate, seed, dtype, options)
        for task, rates in RATES.items()
        for rate in rates
        for optim, dtype, options, _ in ROWS
        for seed in SEEDS
    ]


def rounding_of(row: dict[str, Any]) -> str:
    """Says how a row's weights are rounded."""
    for optim, dtype, options, rounding in ROWS:
        if (row["optim"], row["dtype"], row["options"]) == (optim, dtype, options):
            return rounding
    raise ValueError(f"{row} is none of the rows of this benchmark")


def render(results: dict[str, Any]) -> str:
    """Makes the Markdown tables of a results file: finetuning, then training from scratch."""
    return "\n\n".join((_table(results, FINETUNE), _table(results, SCRATCH)))


def _table(results: dict[str, Any], task: str) -> str:
    header = ("optimizer", "weights", "rounding", "learning rate", "train loss", "val loss")
    rows = [
        (
            label(rows[0]),
            rows[0]["dtype"],
            rounding_of(rows[0]),
            f"{rows[0]['learning_rate']:g}",
            mean_and_range(rows, "train_loss"),
            mean_and_range(rows, "eval_loss"),
        )
        for rows in same_but_seed(results)
        if rows[0]["task"] == task
    ]
    return markdown_table(header, rows)


def main() -> None:
    parser = argument_parser(__doc__, RESULTS)
    parser.add_argument("--model", default="stories260K", help="the model to finetune")
    parser.add_argument(
        "--model_data_dir",
        default="data/shakespeare_stories",
        help="the output folder of data_scripts/shakespeare.py with the model's tokenizer",
    )
    args = parser.parse_args()
    tasks = {
        FINETUNE: finetuning_task(args.model, args.model_data_dir),
        SCRATCH: character_task(args.data_dir),
    }
    run_trainings(args.results, tasks, trainings())


if __name__ == "__main__":
    run(main)
