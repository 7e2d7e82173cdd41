"""Run one recipe on one process and on several, and compare the losses.

    python data_scripts/openwebtext.py --data_files novels.parquet --output_dir data/novels
    python -m benchmarks.processes recipes/pretrain_openwebtext.py --batch_size 4 -- \\
        --data_dir data/novels --config_name recipes/configs/gpt2_tiny.json --block_size 128 \\
        --gradient_accumulation_steps 4 --batch_size_warmup 20480 --max_steps 40 \\
        --warmup_steps 10 --eval_steps 20 --save_steps 20

The arguments after `--` go to the recipe. The processes share each batch, so every run sees the
same windows in each step. Each process has one thread. Without a GPU the processes run on the CPU.
The results go to benchmarks/results/pretrain_novels.json, and a table in docs/ comes from that
file.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from striped_hf.cli import UserError, run
from striped_hf.results import markdown_table, write_json

RESULTS = "benchmarks/results/pretrain_novels.json"
CONFIG = Path(__file__).resolve().parents[1] / "recipes" / "accelerate" / "ddp.yaml"


def train(args: argparse.Namespace, optim: str, processes: int) -> dict[str, Any]:
    """Runs the recipe; returns its measurements and the loss of every step."""
    folder = args.output_dir / f"{optim}-{processes}"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    launch += ["--num_processes", str(processes)]
    flags = ["--optim", optim, "--logging_steps", "1", *args.recipe_flags]
    flags += ["--per_device_train_batch_size", str(args.batch_size // processes)]
    command = [*(launch if processes > 1 else []), args.recipe, *flags, "--output_dir", str(folder)]
    print(f"== {optim} on {processes}: {shlex.join(['python', *command])}", flush=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if subprocess.run([sys.executable, *command], env=env).returncode:
        raise UserError(f"{args.recipe} failed with {optim} on {processes} processes")
    measured = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    measured["losses"] = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    return measured


def render(results: dict) -> str:
    """Makes the Markdown table of a results file; differences are from the first run."""
    rows = []
    for measured in results["runs"]:
        first = next(r for r in results["runs"] if r["optim"] == measured["optim"])
        differences = [
            abs(loss - expected) / expected
            for loss, expected in zip(measured["losses"], first["losses"], strict=True)
        ]
        rows.append(
            (
                f"`{measured['optim']}`",
                str(measured["processes"]),
                f"{measured['steps']:,}",
                f"{measured['tokens']:,}",
                *(f"{loss:.4f}" for loss in (measured["losses"][0], measured["losses"][-1])),
                f"{measured['eval_loss']:.4f}",
                f"{max(differences):.1e}" if measured is not first else "",
            )
        )
    header = ("optimizer", "processes", "steps", "tokens", "first loss", "last loss", "val loss")
    return markdown_table((*header, "largest difference of a step's loss"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument(
        "--batch_size",
        type=int,
        required=True,
        help="windows in a forward pass, of all processes together",
    )
    parser.add_argument("--optim", nargs="+", default=["adamw_torch_fused", "striped_adamw_8bit"])
    parser.add_argument("--output_dir", type=Path, default=Path("out", "processes"))
    parser.add_argument("--results", default=RESULTS, help="the results file")
    own = sys.argv[1:]
    behind = own.index("--") if "--" in own else len(own)
    args = parser.parse_args(own[:behind])
    args.recipe_flags = own[behind + 1 :]
    if uneven := [n for n in args.processes if n < 1 or args.batch_size % n]:
        raise UserError(
            f"--batch_size {args.batch_size} does not divide evenly among {uneven[0]} processes: "
            "pass a multiple of every number of --processes"
        )
    runs = [train(args, optim, n) for optim in args.optim for n in args.processes]
    results = {"environment": runs[0]["environment"], "runs": runs}
    for measured in runs:
        measured.pop("environment")
    write_json(args.results, results)
    print(render(results))


if __name__ == "__main__":
    run(main)
