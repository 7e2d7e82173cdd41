"""Benchmark optimizers on a model's shapes, or compute the memory of finetuning the model.

    make bench                                          # GPT-2's shapes on the CPU, all peers
    python -m benchmarks.optimizers --shapes gpt2-xl --device cuda --dtype bfloat16
    python -m benchmarks.optimizers --memory gpt2-xl --device cuda
    python -m benchmarks.optimizers --memory gpt2-xl --devices 2 4 8
    python -m benchmarks.optimizers --render FILE    # a results file's table and plot

A model is one of gpt2, gpt2-medium, gpt2-large, gpt2-xl, llama-1b, a local folder or a name on the
hub. Only its configuration is read. Weights and gradients are random, and all optimizers share
them. If an optimizer cannot run, its row gives the reason.

For each optimizer it measures:

- state: the bytes of its state tensors, and the size of its state dict as a file;
- first step: includes the allocation of the state, and compilation with empty caches;
- temporary memory: the peak of a later step above the memory that is kept. On a CPU a separate
  process measures it, with malloc set to return freed memory, so that allocations of C code count;
- step: in every round each optimizer runs a turn of a few steps. The table has the median of its
  turns, and the median and quartiles of its ratio to fused AdamW's turn in the same round. A slow
  optimizer runs in fewer rounds. If the quartiles of fused AdamW differ by more than 15% of its
  median, the machine was not idle, and the table has no time of the run;
- effective GB/s: the bytes that the rule must move, divided by the time. A parameter needs
  2 p + k g + 2 s bytes: p bytes of parameter and s bytes of state, read and written, and g bytes of
  gradient, read k times. k is 1 for AdamW, 2 for rules that first sum over a matrix, and 3 for
  Adafactor, which also needs the norm of the update. The table also has the bandwidth of a plain
  copy.

It takes 5 to 10 minutes for GPT-2 in float32 on 2 cores. Run it on an idle machine.
"""

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before torch reads them: the first step must compile anew
    caches = tempfile.TemporaryDirectory(prefix="optimizers_", ignore_cleanup_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["TRITON_CACHE_DIR"] = caches.name

import torch

from benchmarks.measuring import (
    available_bytes,
    checkpoint_bytes,
    copy_gb_s,
    is_steady,
    quartiles,
    return_freed_memory,
    seconds,
    temporary_bytes,
)
from benchmarks.memory_budget import run_memory
from benchmarks.model_shapes import Weight, allocate, meta_model, meta_weights, slug
from benchmarks.optimizer_peers import BASELINE, Peer, all_peers, states
from benchmarks.optimizer_tables import draw, render
from striped_hf.cli import UserError, one_line, run
from striped_hf.optim.backends import BACKENDS, resolve
from striped_hf.results import environment, write_json
from striped_hf.trainer.memory import tensor_bytes

# by device: a turn has as many steps as fit into it, at least 1 and at most 20
TURN_SECONDS = {"cpu": 0.4, "cuda": 0.1}
# by device, for all turns of an optimizer together: a slow optimizer has fewer turns, ...
PEER_SECONDS = {"cpu": 16.0, "cuda": 4.0}
FEWEST_TURNS = 3  # ... but at least these


@dataclass
class Contender:
    """An optimizer, its row of the results, and its times by round, in seconds."""

    peer: Peer
    optimizer: Any = None
    row: dict[str, Any] = field(init=False)
    steps: int = 1  # in a turn
    turns: int = FEWEST_TURNS
    times: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        peer = self.peer
        self.row = {"name": peer.name, "package": peer.package, "version": peer.version()}


def prepare(peer: Peer, weights: list[Weight], device: torch.device, rounds: int) -> Contender:
    """Makes an optimizer and measures all but its time, or notes why it cannot run."""
    contender = Contender(peer)
    row = contender.row
    try:
        optimizer = contender.optimizer = peer.build(weights)
        row["first_step_s"] = seconds(device, optimizer.step)
    except Exception as error:  # any error of a peer is the reason in its row
        contender.optimizer = None
        row["reason"] = reason(error)
        return contender
    if peer.package == "striped_hf":
        row["backend"] = resolve(optimizer.backend, device.type).__name__.split(".")[-1]
    row["state_bytes_per_param"] = tensor_bytes(states(optimizer)) / sum(
        w.param.numel() for w in weights
    )
    row["checkpoint_bytes"] = checkpoint_bytes(optimizer.state_dict())
    row["temporary_bytes"] = None
    if device.type == "cuda":  # temporaries() measures them on a CPU
        row["temporary_bytes"] = temporary_bytes(device, optimizer.step)

    step = seconds(device, optimizer.step)
    contender.steps = max(1, min(20, int(TURN_SECONDS[device.type] / step)))
    fitting = max(FEWEST_TURNS, int(PEER_SECONDS[device.type] / (contender.steps * step)))
    contender.turns = rounds if peer.name == BASELINE else min(rounds, fitting)
    return contender


def reason(error: Exception) -> str:
    """Says in one line why an optimizer cannot run."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return one_line(error) or type(error).__name__


def time_in_turns(group: list[Contender], device: torch.device, rounds: int) -> None:
    """Times the optimizers in turns; round 0 warms up the optimizers that run in every round."""
    for round_ in range(rounds + 1):
        for contender in group[round_ % len(group) :] + group[: round_ % len(group)]:
            turns = contender.turns
            begins = round_ * turns // rounds > (round_ - 1) * turns // rounds  # evenly spread
            if begins if round_ else turns == rounds:
                contender.times[round_] = seconds(device, contender.optimizer.step, contender.steps)
    for contender in group:
        contender.times.pop(0, None)


def free_memory(device: torch.device) -> None:
    """Gives freed memory back to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def moved_bytes(row: dict[str, Any], peer: Peer, itemsize: int) -> float | None:
    """Returns the bytes per parameter that an optimizer's rule must move in a step."""
    if peer.gradient_reads is None:
        return None
    return (2 + peer.gradient_reads) * itemsize + 2 * row["state_bytes_per_param"]


def finish(group: list[Contender], parameters: int, itemsize: int) -> None:
    """Computes the times and ratios of a group, whose first optimizer is the baseline."""
    baseline = group[0].times
    usable = is_steady(list(baseline.values()))
    for contender in group:
        row, times = contender.row, contender.times
        step = statistics.median(times.values())
        moved = moved_bytes(row, contender.peer, itemsize)
        ratios = quartiles([time / baseline[round_] for round_, time in times.items()])
        row["usable"] = usable
        row["step_ms"] = 1e3 * step
        row["ratio"], row["ratio_quartiles"] = ratios[1], [ratios[0], ratios[2]]
        row["gb_s"] = None if moved is None else moved * parameters / step / 1e9
        row["steps_per_turn"] = contender.steps
        row["turns_ms"] = {str(round_): 1e3 * time for round_, time in times.items()}


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark, writes the results file after each group, and returns its content."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    shapes = meta_weights(meta_model(args.shapes))
    parameters = sum(weight.param.numel() for weight in shapes)
    baseline, *waiting = chosen(args)
    needed = (2 + baseline.room / 4) * dtype.itemsize * parameters
    if needed > available_bytes(device):
        raise UserError(
            f"{args.shapes} in {args.dtype} takes {needed / 2**30:.1f} GiB for weights, gradients "
            f"and AdamW's state, and {available_bytes(device) / 2**30:.1f} GiB are free: take "
            "smaller shapes"
        )
    bandwidth = copy_gb_s(device)
    weights = list(allocate(shapes, device, dtype))

    rows: dict[str, dict[str, Any]] = {}
    while waiting or not rows:
        # each group has as many optimizers as there is room for, and the baseline
        group: list[Contender] = []
        for peer in [baseline, *waiting]:
            need, free = peer.room * parameters, available_bytes(device)
            if peer is not baseline and need > free:
                if len(group) > 1:
                    continue  # the peer waits for the next group
                entry = Contender(peer)
                entry.row["reason"] = (
                    f"may take {need / 2**30:.1f} GiB beside AdamW, and {free / 2**30:.1f} are free"
                )
            else:
                print(f"{peer.name} ...", file=sys.stderr, flush=True)
                entry = prepare(peer, weights, device, args.rounds)
            if "reason" not in entry.row:
                group.append(entry)
            elif peer is baseline:
                raise UserError(f"{BASELINE} cannot run: {entry.row['reason']}")
            rows.setdefault(peer.name, entry.row)  # the baseline's row is from the first group
            waiting = [other for other in waiting if other is not peer]
        time_in_turns(group, device, args.rounds)
        finish(group, parameters, dtype.itemsize)
        write_json(args.results, described(args, parameters, bandwidth, rows))
        del group, entry
        free_memory(device)
    if device.type == "cpu":
        del weights
        free_memory(device)
        # last: compilers then find the cache of the first step
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as process:
            for name, found in process.submit(temporaries, args).result().items():
                rows[name]["temporary_bytes"] = found
    results = {**described(args, parameters, bandwidth, rows), "complete": True}
    write_json(args.results, results)
    return results


def described(
    args: argparse.Namespace, parameters: int, bandwidth: float, rows: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Returns the content of the results file, for the optimizers that have a row by now."""
    return {
        "environment": environment(args.device),
        "shapes": args.shapes,
        "parameters": parameters,
        "device": args.device,
        "dtype": args.dtype,
        "rounds": args.rounds,
        "copy_gb_s": bandwidth,
        "complete": False,
        "optimizers": [rows[peer.name] for peer in chosen(args) if peer.name in rows],
    }


def temporaries(args: argparse.Namespace) -> dict[str, int | None]:
    """Measures the temporary memory of a step of each optimizer that can run, on a CPU, in bytes.

    Call it in a separate process without any timing, because ``return_freed_memory`` slows down
    allocation.
    """
    return_freed_memory()
    device = torch.device("cpu")
    shapes = meta_weights(meta_model(args.shapes))
    weights = list(allocate(shapes, device, getattr(torch, args.dtype)))
    found = {}
    for peer in chosen(args):
        if peer.room * sum(w.param.numel() for w in weights) > available_bytes(device):
            continue
        try:
            optimizer = peer.build(weights)
            optimizer.step()
        except Exception:  # the row has the reason
            continue
        found[peer.name] = temporary_bytes(device, optimizer.step)
        del optimizer
    return found


def chosen(args: argparse.Namespace) -> list[Peer]:
    """Returns the optimizers that the command line names, the baseline first."""
    peers = all_peers(args.backend)
    # the names of the peers, without the backend
    names = list(dict.fromkeys(peer.name.split(":")[0] for peer in peers))
    for name in args.optimizers or []:
        if name not in names:
            raise UserError(f"{name} is no optimizer here: choose among {', '.join(names)}")
    wanted = {BASELINE, *(args.optimizers or names)}
    return [peer for peer in peers if peer.name.split(":")[0] in wanted]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    job = parser.add_mutually_exclusive_group()
    job.add_argument(
        "--shapes", metavar="MODEL", default="gpt2", help="the model whose shapes to benchmark"
    )
    job.add_argument("--memory", metavar="MODEL", help="print the memory of finetuning this model")
    job.add_argument(
        "--render",
        metavar="FILE",
        help="print the table of this results file, and draw its plot beside the file",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=["auto"])
    parser.add_argument(
        "--optimizers", nargs="+", metavar="NAME", help="measure only these and fused AdamW"
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--batch_size", type=int, default=1, help="for --memory: sequences in a forward pass"
    )
    parser.add_argument(
        "--block_size", type=int, default=1024, help="for --memory: tokens in a sequence"
    )
    parser.add_argument(
        "--devices",
        nargs="+",
        type=int,
        metavar="N",
        help="for --memory: also the memory on each of so many devices",
    )
    parser.add_argument("--results", help="default: benchmarks/results/, named after the run")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.render:
        path = Path(args.render)
        results = json.loads(path.read_text(encoding="utf-8"))
        print(render(results))
        draw(results, path.with_suffix(".png"))
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device: pass --device cpu")
    if args.memory:
        return_freed_memory()
        run_memory(args, chosen(args))
        return
    name = f"optimizers_{slug(args.shapes)}_{args.device}_{args.dtype}.json"
    args.results = args.results or f"benchmarks/results/{name}"
    print(render(benchmark(args)))


if __name__ == "__main__":
    run(main)
