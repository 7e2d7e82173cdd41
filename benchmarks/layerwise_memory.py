"""Measure the peak memory of training without stored gradients, beside fused AdamW.

    python -m benchmarks.layerwise_memory --device cuda

Models have random weights in bfloat16 and see random tokens, in a plain loop; nothing is
downloaded. GPT-2 XL has finetune_shakespeare.py's setting (1 window x 1,024 tokens x 32
accumulation steps). Llama-2 7B takes 1 window x 1,024 tokens with gradient checkpointing. Where
fused AdamW does not fit, its row says so. The runs share a process, and each one's peak is that of
torch's allocator.
``--device cpu`` rehearses everything; its peaks are the process's.
"""

import argparse
import gc
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, set_seed

from benchmarks.measuring import synchronize
from benchmarks.model_shapes import WEIGHT_DECAY
from striped_hf import LayerwiseStripedAdamW
from striped_hf.cli import UserError, one_line, run
from striped_hf.published_configs import load_config
from striped_hf.results import environment, markdown_table, write_json
from striped_hf.trainer import param_groups
from striped_hf.trainer.memory import peak_memory_mib
from striped_hf.trainer.optimizer_kwargs import OPTIMIZERS

LR = 3e-5
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Run:
    """One model with one optimizer.

    Args:
        model: As for ``load_config``.
        optim: By the names that Trainer knows.
        accumulation: Backward passes before each step.
        checkpointing: Whether activations are computed again in the backward pass.
    """

    model: str
    optim: str
    accumulation: int
    checkpointing: bool


BASELINE = "adamw_torch_fused"
RUNS = (  # the most valuable first
    Run("gpt2-xl", "striped_adamw_8bit_layerwise", accumulation=32, checkpointing=False),
    Run("llama-2-7b", "striped_adamw_4bit_layerwise", accumulation=1, checkpointing=True),
    Run("llama-2-7b", BASELINE, accumulation=1, checkpointing=True),
    Run("gpt2-xl", BASELINE, accumulation=32, checkpointing=False),
)


def make_optimizer(model: nn.Module, planned: Run) -> torch.optim.Optimizer:
    """Makes the optimizer of a run."""
    groups = param_groups(model, WEIGHT_DECAY)
    if planned.optim == BASELINE:
        for group in groups:
            group.pop("blocks")
        return torch.optim.AdamW(groups, lr=LR, fused=True)
    return LayerwiseStripedAdamW(
        groups,
        lr=LR,
        momentum_dtype=OPTIMIZERS[planned.optim].momentum_dtype,
        max_grad_norm=MAX_GRAD_NORM,
        gradient_accumulation=planned.accumulation > 1,
    )


def train(planned: Run, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Trains for a few steps.

    Args:
        planned: The run.
        name: The model that is built.
        args: The command line.

    Returns:
        ``parameters``, ``accumulation`` as it was, ``peak_mib``, ``first_step_s``, and ``step_s``,
        the median of the others.
    """
    device = torch.device(args.device)
    set_seed(0)
    config = load_config(name)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    if planned.checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = make_optimizer(model, planned)
    accumulation = min(planned.accumulation, args.accumulation)
    windows = torch.randint(config.vocab_size, (accumulation, 1, args.block_size), device=device)
    seconds = []
    for _ in range(args.steps):
        synchronize(device)
        begin = time.perf_counter()
        for window in windows:
            loss = model(input_ids=window, labels=window, use_cache=False).loss
            (loss / accumulation).backward()
        if planned.optim == BASELINE:
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    if not loss.isfinite():
        raise RuntimeError("the loss is not finite")
    return {
        "parameters": sum(param.numel() for param in model.parameters()),
        "accumulation": accumulation,
        "peak_mib": peak_memory_mib(),
        "first_step_s": seconds[0],
        "step_s": statistics.median(seconds[1:] or seconds),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Does every run that begins in time; writes what it has after each."""
    deadline = time.monotonic() + args.seconds
    results: dict[str, Any] = {
        "environment": environment(args.device),
        "block_size": args.block_size,
        "steps": args.steps,
        "complete": False,
        "rows": [],
    }
    for planned in RUNS:
        if time.monotonic() > deadline:
            return results
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        row = asdict(planned)
        try:
            row |= train(planned, args.model or planned.model, args)
        except Exception as error:  # the others go on
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            reason = "out of memory" if out_of_memory else one_line(error) or type(error).__name__
            row["reason"] = reason
        results["rows"].append(row)
        write_json(args.results, results)
        print(row, flush=True)
    results["complete"] = True
    write_json(args.results, results)
    return results


def render(results: dict[str, Any]) -> str:
    """Makes the Markdown table of a results file, and the lines that belong under it."""
    header = (
        *("model", "optimizer", "tokens a step", "gradient checkpointing"),
        *("peak memory, MiB", "bytes per parameter", "step, s"),
    )
    rows = [
        (
            f"`{row['model']}`",
            f"`{row['optim']}`",
            f"1 x {results['block_size']:,} x {row['accumulation']}",
            "yes" if row["checkpointing"] else "no",
            f"{row['peak_mib']:,.0f}",
            f"{row['peak_mib'] * 2**20 / row['parameters']:.2f}",
            f"{row['step_s']:.2f}",
        )
        for row in results["rows"]
        if "reason" not in row
    ]
    lines = [
        markdown_table(header, rows),
        "",
        f"Random weights in bfloat16, {results['steps']} steps; activations are part of the peak. "
        "Fused AdamW keeps its state in bfloat16, too, and rounds weights to nearest.",
    ]
    skipped = [
        f"`{row['model']}` with `{row['optim']}` ({row['reason']})"
        for row in results["rows"]
        if "reason" in row
    ]
    if skipped:
        lines.append(f"Not run: {'; '.join(skipped)}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--model", help="a model that stands in for all of them")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--accumulation", type=int, default=32, help="at most so many passes")
    parser.add_argument("--block_size", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=180, help="no run begins after them")
    parser.add_argument("--results", default="out/layerwise_memory.json")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here: pass --device cpu to rehearse")
    print(render(measure(args)))


if __name__ == "__main__":
    run(main)
