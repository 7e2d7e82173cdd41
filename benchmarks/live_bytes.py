"""Count the bytes of all live tensors in steps of Trainer, apart from activations.

    python -m benchmarks.live_bytes    # GPT-2 124M in bfloat16 on a CPU; some minutes

A real ``transformers.Trainer`` trains from random weights on random tokens, with each optimizer,
with and without gradient accumulation. Two steps are followed operation by operation
(striped_hf/trainer/live_bytes.py). The peaks of weights, gradients, optimizer state and the
optimizer's buffers are exact, and the same on any machine. The memory that a kernel allocates and
frees in one operation is not seen.
"""

import argparse
import tempfile
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from benchmarks.synthetic_run import RandomTokens
from striped_hf.cli import run
from striped_hf.published_configs import load_config
from striped_hf.results import environment, markdown_table, write_json
from striped_hf.trainer.live_bytes import OTHER, LiveBytes

RESULTS = "benchmarks/results/live_bytes_gpt2.json"
OPTIMIZERS = (
    *("adamw_torch_fused", "striped_adamw_8bit", "striped_adamw_8bit_layerwise"),
    *("striped_adamw_4bit", "striped_adamw_4bit_layerwise"),
)
PASSES = (1, 4)  # micro-batches in a step
WEIGHTS, GRADIENTS, STATE, BUFFERS = "weights", "gradients", "state", "buffers"


class Labels(TrainerCallback):
    """Labels the tensors of a training."""

    def __init__(self, model: Any, live: LiveBytes) -> None:
        self.live = live
        live.label(WEIGHTS, [*model.parameters(), *model.buffers()])
        self.params = [param for param in model.parameters() if param.requires_grad]
        for param in self.params:  # before the optimizer's hooks
            param.register_hook(self._on_gradient)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for param in self.params:  # after the optimizer's hooks
            param.register_post_accumulate_grad_hook(self._after_gradient)

    def _on_gradient(self, grad: Tensor) -> None:
        self.live.label(GRADIENTS, [grad])
        self.live.new = BUFFERS

    def _after_gradient(self, param: Tensor) -> None:
        self.live.new = OTHER

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.live.new = BUFFERS

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        leaves = tree_leaves(list(kwargs["optimizer"].state.values()))
        self.live.label(STATE, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
        self.live.new = OTHER


def train(config: PretrainedConfig, optim: str, passes: int, block_size: int) -> dict[str, int]:
    """Trains for two steps.

    Args:
        config: The model's configuration.
        optim: The optimizer's name in ``TrainingArguments``.
        passes: Forward and backward passes in a step, each of one window.
        block_size: Tokens in a window.

    Returns:
        The peaks, in bytes: of each label; ``kept``, of weights, state and buffers; ``without
        activations``, of these and the gradients; and ``all``.
    """
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    data = RandomTokens(config.vocab_size, block_size, passes, 2 * passes)
    windows = [{"input_ids": ids, "labels": ids} for ids in (data.tokens[:, 1:])] * 2
    live = LiveBytes()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=2,
            optim=optim,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=passes,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        labels = Labels(model, live)
        trainer = Trainer(model, args, train_dataset=windows, callbacks=[labels])
        with live:
            trainer.train()

    def peak(*labels: str) -> int:
        return sum(live.at_peak(labels).values())

    return {
        **{label: peak(label) for label in (WEIGHTS, STATE, BUFFERS, GRADIENTS)},
        "kept": peak(WEIGHTS, STATE, BUFFERS),
        "without activations": peak(WEIGHTS, STATE, BUFFERS, GRADIENTS),
        "all": live.peak,
    }


def measure(config: PretrainedConfig, block_size: int) -> list[dict[str, Any]]:
    """Trains with each optimizer, with and without accumulation; returns a row for each."""
    rows = []
    for passes in PASSES:
        for optim in OPTIMIZERS:
            row = {"optim": optim, "passes": passes}
            rows.append(row | {"bytes": train(config, optim, passes, block_size)})
            print(rows[-1], flush=True)
    return rows


def render(results: dict[str, Any]) -> str:
    """Makes the Markdown table of a results file, and the line under it."""
    header = (
        *("optimizer", "passes in a step", "weights, state and buffers", "gradients"),
        *("at a time, without activations", "MiB at the peak, with activations"),
    )
    rows = []
    for row in results["rows"]:
        sizes = row["bytes"]
        keys = ("kept", GRADIENTS, "without activations")
        of_parameter = (f"{sizes[key] / results['parameters']:.2f}" for key in keys)
        peak = f"{sizes['all'] / 2**20:,.0f}"
        rows.append((f"`{row['optim']}`", str(row["passes"]), *of_parameter, peak))
    return (
        f"{markdown_table(header, rows)}\n\nBytes per parameter, the most at a time: of weights, "
        "optimizer state and the optimizer's buffers; of gradients; and of all these. "
        f"`{results['model']}`, {results['parameters']:,} parameters, in bfloat16, windows of "
        f"{results['block_size']} tokens."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gpt2", help="as for recipes/plan_memory.py")
    parser.add_argument("--block_size", type=int, default=128, help="tokens in a window")
    parser.add_argument("--results", default=RESULTS, help=f"default: {RESULTS}")
    args = parser.parse_args()
    config = load_config(args.model)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    results = {
        "environment": environment("cpu"),
        "model": args.model,
        "parameters": parameters,
        "block_size": args.block_size,
        "rows": measure(config, args.block_size),
    }
    write_json(args.results, results)
    print(render(results))


if __name__ == "__main__":
    run(main)
