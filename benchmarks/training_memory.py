"""Measure the memory and time of training a model with each optimizer, from random weights.

    python -m benchmarks.training_memory --device cuda                      # GPT-2 XL's finetuning
    python -m benchmarks.training_memory --device cuda --model gpt2 --batch_size 16 --accumulation 1

The defaults are the settings of finetune_shakespeare.py (1 window x 1,024 tokens x 32 accumulation
steps), with random tokens. A GPU uses bfloat16 autocast. Nothing is downloaded. Each optimizer
trains in a separate process, whose peak memory is measured. On a GPU this is the peak of torch's
allocator. On a CPU it is the peak of the process, minus its memory before it made the model.
malloc keeps no freed memory there, which makes the steps slower. The table also has the prediction
of `optimizers.py --memory`.
"""

import argparse
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from transformers import AutoModelForCausalLM, set_seed

from benchmarks.measuring import return_freed_memory
from benchmarks.memory_budget import budget
from benchmarks.model_shapes import meta_model, slug
from benchmarks.optimizer_peers import all_peers
from benchmarks.synthetic_run import RandomTokens, make_trainer
from recipes.finetune_shakespeare import DEFAULTS
from striped_hf.cli import UserError, one_line, run
from striped_hf.published_configs import load_config
from striped_hf.results import environment, markdown_table, write_json
from striped_hf.trainer.callbacks import RunMeasurements
from striped_hf.trainer.memory import peak_memory_mib

OPTIMIZERS = {  # Trainer's names, and the names of the peers
    "adamw_torch_fused": "adamw_fused",
    "striped_adamw": "striped_float32",
    "striped_adamw_8bit": "striped_int8",
    "striped_adamw_4bit": "striped_int4",
}
# peak memory that this project's origin measured on an A100, with finetune_shakespeare.py's
# settings
ORIGIN_MIB = {"AdamW, origin, A100": 40311, "its own optimizer, A100": 33107}
ORIGIN_SETTING = ("gpt2-xl", 1, 32, 1024)


def train(optim: str, args: argparse.Namespace) -> dict[str, Any]:
    """Trains for a few steps and returns the measurements; runs in a separate process."""
    on_gpu = args.device == "cuda"
    windows_per_step = args.batch_size * args.accumulation
    set_seed(DEFAULTS["seed"])
    config = load_config(args.model)
    windows = args.steps * windows_per_step
    data = RandomTokens(config.vocab_size, args.block_size, windows, windows)
    if not on_gpu:
        return_freed_memory()
    before = 0.0 if on_gpu else peak_memory_mib()
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config)
    measurements = RunMeasurements()
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            **DEFAULTS,
            "output_dir": folder,
            "optim": optim,
            "max_steps": args.steps,
            "per_device_train_batch_size": args.batch_size,
            "gradient_accumulation_steps": args.accumulation,
            "eval_on_start": False,
            "eval_strategy": "no",
            "logging_steps": args.steps,
            "bf16": on_gpu,
        }
        make_trainer(model, data, args.device, [measurements], **settings).train()
    results = measurements.results()
    step_ms = results["median_step_ms"]
    return {
        "state_bytes": results["state_bytes"],
        "peak_mib": results["peak_memory_mib"] - before,
        "step_ms": step_ms,
        "tokens_per_s": 1e3 * windows_per_step * args.block_size / step_ms,
    }


def measure(args: argparse.Namespace, path: str) -> dict[str, Any]:
    """Trains with each optimizer and predicts its memory; writes the results after each."""
    setting = ("model", "batch_size", "accumulation", "block_size", "steps")
    results: dict[str, Any] = {
        "environment": environment(args.device),
        **{key: getattr(args, key) for key in setting},
        "parameters": meta_model(args.model).num_parameters(),
        "complete": False,
        "optimizers": [],
    }
    spawn = multiprocessing.get_context("spawn")
    for optim in args.optim:
        row: dict[str, Any] = {"optim": optim, "predicted_mib": None}
        results["optimizers"].append(row)
        try:
            with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as process:
                row |= process.submit(train, optim, args).result()
        except Exception as error:  # such as too little memory; the other optimizers still run
            row["reason"] = one_line(error) or type(error).__name__
        write_json(path, results)

    peers = {peer.name: peer for peer in all_peers(["auto"])}
    prediction = budget(
        *(args.model, [peers[OPTIMIZERS[optim]] for optim in args.optim]),
        *(torch.device(args.device), args.batch_size, args.block_size),
    )
    for row, predicted in zip(results["optimizers"], prediction["optimizers"], strict=True):
        row["predicted_mib"] = predicted["peak"] / 2**20 if "peak" in predicted else None
    results["complete"] = True
    write_json(path, results)
    return results


def render(results: dict[str, Any]) -> str:
    """Makes the Markdown table of a results file, and the lines that belong under it."""
    header = (
        *("optimizer", "state, bytes per parameter", "peak memory, MiB", "predicted, MiB"),
        *("step, ms", "tokens per second"),
    )
    rows = [
        (
            f"`{row['optim']}`",
            f"{row['state_bytes'] / results['parameters']:.2f}",
            f"{row['peak_mib']:,.0f}",
            "" if row["predicted_mib"] is None else f"{row['predicted_mib']:,.0f}",
            f"{row['step_ms']:,.0f}",
            f"{row['tokens_per_s']:,.0f}",
        )
        for row in results["optimizers"]
        if "reason" not in row
    ]
    setting = tuple(results[k] for k in ("model", "batch_size", "accumulation", "block_size"))
    if setting == ORIGIN_SETTING:
        rows += [(name, "", f"{mib:,}", "", "", "") for name, mib in ORIGIN_MIB.items()]
    lines = [
        markdown_table(header, rows),
        "",
        "`{}` from random weights, {} x {} x {} tokens a step.".format(*setting),
    ]
    skipped = [f"`{r['optim']}` ({r['reason']})" for r in results["optimizers"] if "reason" in r]
    if skipped:
        lines.append(f"Not run: {'; '.join(skipped)}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gpt2-xl", help="a model, as for optimizers.py")
    parser.add_argument(
        "--optim", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS)[:3], metavar="NAME"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch_size", type=int, default=DEFAULTS["per_device_train_batch_size"])
    parser.add_argument("--accumulation", type=int, default=DEFAULTS["gradient_accumulation_steps"])
    parser.add_argument("--block_size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--results", help="default: benchmarks/results/, named after the run")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device: pass --device cpu")
    name = f"training_{slug(args.model)}_{args.device}.json"
    results = measure(args, args.results or f"benchmarks/results/{name}")
    print(render(results))
    if all("reason" in row for row in results["optimizers"]):
        raise UserError("no optimizer could be measured: the reasons are above")


if __name__ == "__main__":
    run(main)
