"""Train one task with many optimizers, each at its best learning rate, and compare the losses.

    python data_scripts/shakespeare_char.py
    python -m benchmarks.losses --task char --data_dir data/shakespeare_char

The tasks are nanoGPT's CPU-sized model (``char``), finetuning of a pretrained model of GPT-2's size
(``finetune``), and, on a GPU, GPT-2 124M from scratch (``novels``).

Every optimizer has a grid of learning rates, a factor of 2 apart. The first seed runs at each rate.
While the best rate is at an edge of the grid, the grid grows beyond that edge. The other seeds run
at the rates whose first seed is within 0.03 nats of the best. The best rate is the rate with the
lowest mean validation loss over the seeds.

The results file is written after each run. A command with the same task continues an earlier,
stopped one: finished runs are not run again. The packages of the optimizers are in the extra
``bench``. An optimizer that cannot run here is in the table with the reason; ``--trial`` shows that
within minutes.

Two runs are side by side, of one thread each: only losses are compared, no times.
"""

import argparse
import concurrent.futures
import concurrent.futures.process
import multiprocessing
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from benchmarks.loss_grid import RateAndSeed, wanted
from benchmarks.loss_peers import PEERS, Peer
from benchmarks.loss_studies import STUDIES
from benchmarks.loss_tables import render
from benchmarks.loss_tasks import TASKS, Run, Task, check_device, train
from striped_hf.cli import UserError, run
from striped_hf.results import begin_results, loss_text, write_json

Results = dict[str, Any]


def waiting(results: Results, task: Task, peers: Sequence[Peer]) -> list[tuple[Peer, RateAndSeed]]:
    """Lists the runs that are known to be needed, in their order: by group, then in turns."""
    rows = []
    for peer in peers:
        if peer.name not in results["reasons"]:
            runs = [each for each in results["runs"] if each["optimizer"] == peer.name]
            needed = wanted(runs, task.rates, task.seeds)
            rows += [(peer.group, turn, peer, each) for turn, each in enumerate(needed, len(runs))]
    rows.sort(key=lambda row: row[:2])
    return [(peer, each) for _, _, peer, each in rows]


def start_worker() -> None:
    """Prepares a process for runs."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def compare(args: argparse.Namespace) -> Results:
    """Trains until no run is needed; writes the results after each run."""
    task = TASKS[args.task]
    if args.trial:
        task = replace(task, steps=3, evaluated=4)
    peers = [(PEERS | STUDIES)[name] for name in args.optimizers]
    # a folder and a name on the hub are the same model
    settings = {**task.settings(), "model": Path(args.model).name, "runs": []}
    results = begin_results(args.results, settings, resume=True, device_type=args.device)
    results["reasons"] = {}  # a missing package may be installed now
    bar = tqdm(desc=task.name, unit="run", initial=len(results["runs"]))
    running: dict[concurrent.futures.Future[dict[str, Any]], Run] = {}
    with concurrent.futures.ProcessPoolExecutor(
        args.processes, multiprocessing.get_context("spawn"), initializer=start_worker
    ) as pool:
        while True:
            known = [
                Run(task, peer, rate, seed, args.data_dir, args.model, args.device)
                for peer, (rate, seed) in waiting(results, task, peers)
            ]
            bar.total = len(results["runs"]) + len(known)
            bar.refresh()
            keys = {each.key for each in running.values()}
            fresh = [each for each in known if each.key not in keys]
            for each in fresh[: args.processes - len(running)]:
                running[pool.submit(train, each)] = each
            if not running:
                break
            finished, _ = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in finished:
                each = running.pop(future)
                try:
                    note(results, each, future.result(), bar)
                except concurrent.futures.process.BrokenProcessPool as error:
                    raise UserError(
                        f"a process was killed while {each.peer.name} or another optimizer "
                        "trained: if memory was short, pass --processes 1 and start again; the "
                        "finished runs are kept"
                    ) from error
            write_json(args.results, results)
    bar.close()
    return results


def note(results: Results, run: Run, result: dict[str, Any], bar: Any) -> None:
    """Adds a finished run to the results."""
    if "reason" in result:
        results["reasons"][run.peer.name] = result["reason"]
        bar.write(f"{run.peer.name} cannot run: {result['reason']}")
        return
    results["runs"].append(result)
    bar.update()
    bar.write(
        f"{run.peer.name} at {run.learning_rate:g}, seed {run.seed}: train "
        f"{loss_text(result['train_loss'])}, val {loss_text(result['val_loss'])}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, default="char")
    parser.add_argument("--data_dir", required=True, help="the output folder of a data script")
    parser.add_argument(
        "--model", default="", help="folder or name of the pretrained model; for novels: gpt2"
    )
    parser.add_argument(
        "--optimizers", nargs="+", choices=PEERS | STUDIES, default=list(PEERS), metavar="NAME"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--processes", type=int, default=2, help="runs side by side")
    parser.add_argument(
        "--trial", action="store_true", help="3 steps a run, to see which optimizers run here"
    )
    parser.add_argument("--results", help="default: out/losses_TASK.json")
    args = parser.parse_args()
    args.results = args.results or f"out/losses_{args.task}.json"
    return args


def main() -> None:
    args = parse()
    check_device(args.device)
    if args.task != "char" and not args.model:
        raise UserError(f"--task {args.task} needs --model")
    print(render(compare(args)))


if __name__ == "__main__":
    run(main)
