"""Train GPT-2 124M from scratch with several optimizers side by side, and compare the losses.

    python data_scripts/openwebtext.py --data_files novels/train.parquet --output_dir data/novels
    python -m benchmarks.gpu_losses --data_dir data/novels --results out/losses.json

Every optimizer starts from the same weights and sees the same batches at the same learning rate.
They train in turns of ``--turn`` steps. The results file is written after each turn, so the losses
of a run that ends early can be compared at equal steps. The learning rate is constant after its
warm-up: the comparison does not depend on the planned number of steps.
"""

import argparse
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, set_seed

from striped_hf.cli import UserError, run
from striped_hf.data import ContiguousBlocks, RandomWindows, open_split
from striped_hf.optim import StripedAdamW
from striped_hf.published_configs import load_config
from striped_hf.results import environment, markdown_table, write_json
from striped_hf.trainer import param_groups

SEED = 1337
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
MAX_GRAD_NORM = 1.0
EVALUATED = 16  # blocks of the validation split, evenly spaced
MOMENTUM = {"adamw_torch_fused": None, "striped_adamw_8bit": "int8", "striped_adamw_4bit": "int4"}


@dataclass
class Contender:
    """One optimizer with its model, and the losses so far."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    train_losses: list[float] = field(default_factory=list)
    eval_losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


def make(name: str, args: argparse.Namespace) -> Contender:
    """Builds a model from the seed and its optimizer."""
    set_seed(SEED)
    config = load_config(args.model)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config)
    groups = param_groups(model, WEIGHT_DECAY)
    momentum_dtype = MOMENTUM[name]
    if momentum_dtype is None:
        for group in groups:
            group.pop("blocks")
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            groups, lr=args.learning_rate, betas=BETAS, fused=True
        )
    else:
        optimizer = StripedAdamW(
            groups, lr=args.learning_rate, betas=BETAS, momentum_dtype=momentum_dtype
        )
    return Contender(name, model, optimizer)


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor], device: str) -> torch.Tensor:
    """Returns the mean loss over a batch's targets, in nats."""
    inputs, targets = batch["input_ids"].to(device), batch["shift_labels"].to(device)
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        logits = model(input_ids=inputs, use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def train(
    contender: Contender, windows: RandomWindows, steps: range, args: argparse.Namespace
) -> None:
    """Trains for some steps, and notes the mean of their losses."""
    begin = time.perf_counter()
    contender.model.train()
    total = torch.zeros((), device=args.device)
    for step in steps:
        for group in contender.optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1.0, (step + 1) / args.warmup)
        first = step * args.batch_size
        batch = windows.__getitems__(range(first, first + args.batch_size))
        loss = loss_of(contender.model, batch, args.device)
        loss.backward()
        nn.utils.clip_grad_norm_(contender.model.parameters(), MAX_GRAD_NORM)
        contender.optimizer.step()
        contender.optimizer.zero_grad()
        total += loss.detach()
    contender.train_losses.append(total.item() / len(steps))
    contender.seconds += time.perf_counter() - begin


@torch.no_grad()
def evaluate(contender: Contender, blocks: ContiguousBlocks, args: argparse.Namespace) -> None:
    """Notes the loss over some blocks of the validation split."""
    contender.model.eval()
    count = min(EVALUATED, len(blocks) - 1)  # some targets of the last block are masked
    chosen = [i * (len(blocks) - 1) // count for i in range(count)]
    losses = [
        loss_of(contender.model, blocks.__getitems__([index]), args.device).item()
        for index in chosen
    ]
    contender.eval_losses.append(sum(losses) / len(losses))


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Trains until the steps or the seconds are over; writes the results after each turn."""
    deadline = time.monotonic() + args.seconds
    splits = {name: open_split(args.data_dir, name) for name in ("train", "val")}
    windows = RandomWindows(splits["train"], args.block_size, args.steps * args.batch_size, SEED)
    blocks = ContiguousBlocks(splits["val"], args.block_size)
    contenders = [make(name, args) for name in args.optim]
    results: dict[str, Any] = {
        "environment": environment(args.device),
        "complete": False,
        **{key: getattr(args, key) for key in ("model", "batch_size", "block_size")},
        **{key: getattr(args, key) for key in ("learning_rate", "warmup", "turn")},
        "optimizers": [],
    }
    for first in range(0, args.steps, args.turn):
        if first and time.monotonic() > deadline:
            break
        steps = range(first, min(first + args.turn, args.steps))
        for contender in contenders:
            train(contender, windows, steps, args)
            evaluate(contender, blocks, args)
            if not math.isfinite(contender.train_losses[-1] + contender.eval_losses[-1]):
                raise UserError(f"{contender.name}: its loss is not finite by step {steps.stop}")
        results["steps"] = steps.stop
        results["optimizers"] = [
            {
                "optim": contender.name,
                "train_losses": contender.train_losses,
                "eval_losses": contender.eval_losses,
                "step_ms": 1e3 * contender.seconds / steps.stop,
            }
            for contender in contenders
        ]
        results["complete"] = True  # each turn completes a comparison
        write_json(args.results, results)
        shown = ", ".join(
            f"{each.name} {each.train_losses[-1]:.4f} / {each.eval_losses[-1]:.4f}"
            for each in contenders
        )
        print(f"step {steps.stop}, train / val: {shown}", flush=True)
    return results


def render(results: dict[str, Any]) -> str:
    """Makes the Markdown table of a results file, and the line under it."""
    header = ("optimizer", "train loss, last turn", "val loss", "step, ms")
    rows = [
        (
            f"`{row['optim']}`",
            f"{row['train_losses'][-1]:.4f}",
            f"{row['eval_losses'][-1]:.4f}",
            f"{row['step_ms']:.1f}",
        )
        for row in results["optimizers"]
    ]
    return "\n".join(
        (
            markdown_table(header, rows),
            "",
            f"`{results['model']}` from the same random weights, {results['steps']} steps of "
            f"{results['batch_size']} x {results['block_size']} tokens at learning rate "
            f"{results['learning_rate']:g}, one seed.",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data_dir", default="data/novels", help="the output folder of a data script"
    )
    parser.add_argument("--model", default="gpt2", help="a model, as for optimizers.py")
    parser.add_argument("--optim", nargs="+", choices=MOMENTUM, default=list(MOMENTUM))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--turn", type=int, default=25, help="steps in each optimizer's turn")
    parser.add_argument(
        "--seconds",
        type=float,
        default=600,
        help="only the first turn may begin after so many seconds",
    )
    parser.add_argument("--batch_size", type=int, default=12)
    parser.add_argument("--block_size", type=int, default=1024)
    parser.add_argument("--learning_rate", type=float, default=6e-4)
    parser.add_argument("--warmup", type=int, default=50, help="steps")
    parser.add_argument("--results", default="out/gpu_losses.json")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device: pass --device cpu")
    print(render(compare(args)))


if __name__ == "__main__":
    run(main)
