"""Run one recipe with several optimizers, one after another, and compare them.

    python recipes/compare_optimizers.py recipes/train_shakespeare_char.py \\
        --optim adamw_torch_fused@4e-3 striped_adamw@4e-3 striped_adamw_8bit@6e-3 -- --preset cpu

What stands behind `--` goes to the recipe. Each run is a process of its own and leaves its folder
in --output_dir, which gets comparison.json (every figure measured), comparison.md and
comparison.png. An optimizer's own arguments and learning rate follow its name:
striped_adamw_8bit:nesterov=true@6e-3.

--accelerate_config recipes/accelerate/ddp.yaml has each run launched by accelerate, on the devices
that the file names.

--learning_rate and --seed take several values: every combination is run, and the table has each
optimizer's mean over the seeds at each learning rate. --resume takes over the runs that an earlier,
stopped comparison finished with the same command and the same --accelerate_config. Where runs come
from several commits, versions or devices, the line under the table says which is whose.
"""

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from striped_hf.comparison import is_sweep, render_plot, render_table
from striped_hf.results import common_environment, measured_on, write_json, write_text


def main() -> None:
    args = parse_arguments()
    settings = list(itertools.product(args.optim, args.learning_rate, args.seed))
    names, runs = [], []
    for i, (optim, learning_rate, seed) in enumerate(settings, start=1):
        optim, _, own_rate = optim.partition("@")
        optim, _, optim_args = optim.partition(":")
        learning_rate = own_rate or learning_rate
        name = "-".join(filter(None, (optim, optim_args, learning_rate, seed)))
        print(f"== run {i} of {len(settings)}: {name}", flush=True)
        flags = ["--optim", optim, "--optim_args", optim_args]
        flags += ["--learning_rate", learning_rate] if learning_rate else []
        flags += ["--seed", seed] if seed else []
        flags += [*args.recipe_flags, "--output_dir", str(args.output_dir / name)]
        names.append(name)
        runs.append(run_recipe(args, flags, args.output_dir / name))

    environments = {name: run.pop("environment") for name, run in zip(names, runs, strict=True)}
    comparison: dict[str, Any] = {"environment": common_environment(environments), "runs": runs}
    comparison["command"] = shlex.join(["python", *sys.argv])
    for run in runs:
        if is_sweep(comparison):
            run.pop("history")
    write_json(args.output_dir / "comparison.json", comparison)
    table = f"{render_table(comparison)}\n\n{measured_on(comparison['environment'])}"
    write_text(args.output_dir / "comparison.md", f"{table}\n")
    render_plot(comparison, args.output_dir / "comparison.png")
    print(f"\n{table}\n")
    print(f"written to {args.output_dir}/comparison.json, comparison.md and comparison.png")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="the script to run, such as recipes/finetune_shakespeare.py")
    parser.add_argument("--optim", nargs="+", required=True, metavar="NAME[:OPTIM_ARGS][@LR]")
    parser.add_argument("--learning_rate", nargs="+", default=[""], metavar="LR")
    parser.add_argument("--seed", nargs="+", default=[""], metavar="SEED")
    parser.add_argument("--output_dir", type=Path, default=Path("out/comparison"))
    parser.add_argument("--accelerate_config", metavar="FILE", help="launch the runs with it")
    parser.add_argument("--resume", action="store_true", help="take over runs finished before")
    own = sys.argv[1:]
    behind = own.index("--") if "--" in own else len(own)
    args = parser.parse_args(own[:behind])
    args.recipe_flags = own[behind + 1 :]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error("start it by python, and pass --accelerate_config to have its runs launched")
    if not Path(args.recipe).is_file():
        parser.error(f"{args.recipe} does not exist: pass a script of recipes/")
    if args.accelerate_config and not Path(args.accelerate_config).is_file():
        parser.error(f"--accelerate_config {args.accelerate_config} does not exist")
    return args


def run_recipe(args: argparse.Namespace, flags: list[str], folder: Path) -> dict[str, Any]:
    """Runs the recipe unless its result is there and wanted; returns its run.json and history."""
    result = folder / "run.json"
    printed = shlex.join(["python", args.recipe, *flags])
    launcher = []
    if args.accelerate_config:
        launcher = ["-m", "accelerate.commands.launch", "--config_file", args.accelerate_config]
    done = args.resume and result.exists()
    done = done and json.loads(result.read_text(encoding="utf-8"))["command"] == printed
    # the launch is no part of the command that a run knows of itself
    launch = folder / "accelerate_config.yaml"
    config = Path(args.accelerate_config).read_text("utf-8") if args.accelerate_config else None
    if done and config != (launch.read_text("utf-8") if launch.exists() else None):
        print(f"{folder} was run under another --accelerate_config: it is run again", flush=True)
        done = False
    if not done:
        result.unlink(missing_ok=True)
        launch.unlink(missing_ok=True)
        if config is not None:
            write_text(launch, config)
        command = [sys.executable, *launcher, args.recipe, *flags]
        status = subprocess.run(command).returncode
        if status != 0:
            sys.exit(f"error: {printed}\nended with status {status}; its output above says why")
    run = json.loads(result.read_text(encoding="utf-8"))
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    train = [entry for entry in log if "loss" in entry]
    # the final evaluation repeats that of the best checkpoint at the last step
    evals = {entry["step"]: entry["eval_loss"] for entry in log[:-2] if "eval_loss" in entry}
    run["history"] = {
        "steps": [entry["step"] for entry in train],
        "losses": [entry["loss"] for entry in train],
        "eval_steps": list(evals),
        "eval_losses": list(evals.values()),
    }
    return run


if __name__ == "__main__":
    main()
