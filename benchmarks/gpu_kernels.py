"""Time a step and each of its kernels on a GPU, beside fused AdamW and a plain copy.

    python -m benchmarks.gpu_kernels --results out/gpu_kernels.json

Parameters and gradients are random, with a model's shapes. For each row:

- device time: from a CUDA event before the step to one after it. The device sleeps first, so that
  all launches are queued and no gap between them counts. Fused AdamW has a turn in every round, and
  the ratio is the median of the rounds' ratios;
- kernel times: device time by kernel, as CUPTI reports it through ``torch.profiler``;
- host time: how long ``step()`` takes to return while the device sleeps;
- wall time: steps one after another, host and device together;
- graph time: device time of the step replayed as a CUDA graph.

The step in two phases has a row for each of them: ``fold`` folds the gradients of all matrices, as
the backward pass does, and ``folded step`` is the rest. The ratio is to the whole of fused AdamW.

The most valuable rows come first. Results are written after every row, and no row begins after
``--seconds``. ``--device cpu`` rehearses everything but the device (with ``TRITON_INTERPRET=1``).
"""

import argparse
import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu_phases import PHASES, Phase, time_phase
from benchmarks.gpu_timing import device_ms, graph_ms, host_ms, kernel_ms
from benchmarks.measuring import quartiles, seconds
from benchmarks.model_shapes import Weight, allocate, meta_model, meta_weights
from benchmarks.optimizer_peers import adamw_fused, states, striped
from striped_hf.cli import UserError, one_line, run
from striped_hf.optim.backends import resolve
from striped_hf.results import environment, markdown_table, write_json
from striped_hf.trainer.memory import tensor_bytes


@dataclass(frozen=True)
class Step:
    """One striped step to time.

    Args:
        momentum_dtype: As for ``StripedAdamW``.
        lagged: As for ``StripedAdamW``.
        graph: Whether to also replay the step as a CUDA graph.
        compiler: Triton compile options instead of the backend's, to compare both.
        tuning: Fields of ``arguments.Tuning`` instead of the backend's, to compare both.
    """

    momentum_dtype: str
    lagged: bool = False
    graph: bool = False
    compiler: dict[str, Any] = field(default_factory=dict)
    tuning: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = [f"{key}={value}" for key, value in (self.compiler | self.tuning).items()]
        return " ".join([self.momentum_dtype, *(["lagged"] if self.lagged else []), *options])


FORMATS = tuple(Step(momentum_dtype) for momentum_dtype in ("float32", "int8", "bfloat16", "int4"))
LAGGED = (Step("float32", lagged=True), Step("int8", lagged=True))
GRAPHS = (Step("float32", graph=True), Step("int8", graph=True))
# Variants that only a GPU can judge: loads in advance, an approximate reciprocal, and both; or
# fewer registers, so that more programs run at a time.
TUNINGS: tuple[dict[str, Any], ...] = (
    {"stages": 2},
    {"approximate_reciprocal": True},
    {"stages": 2, "approximate_reciprocal": True},
)
A_B = (
    *(Step(f, tuning=tuning) for tuning in TUNINGS for f in ("float32", "int8")),
    Step("int8", lagged=True, tuning=TUNINGS[-1]),
    *(Step(f, compiler={"maxnreg": 64}) for f in ("float32", "int8")),
)
BFLOAT16_A_B = tuple(Step("int8", tuning=tuning) for tuning in TUNINGS[1:])
# (model, parameters' dtype, steps), the most valuable first
PLAN: tuple[tuple[str, str, tuple[Step | Phase, ...]], ...] = (
    ("gpt2-xl", "float32", (*FORMATS, *LAGGED)),
    ("gpt2-xl", "bfloat16", (*FORMATS, *PHASES, LAGGED[1])),
    ("gpt2", "float32", (*FORMATS[:2], *GRAPHS)),
    ("gpt2-xl", "float32", A_B),
    ("gpt2-xl", "bfloat16", BFLOAT16_A_B),
)


def bandwidths(device: torch.device, rounds: int) -> dict[str, float]:
    """Measures a copy (bytes read and written) and a sum (bytes read), in 10^9 bytes a second."""
    elements = (1 if device.type == "cuda" else 1 / 1024) * 2**30
    source = torch.ones(int(elements), device=device)
    target = torch.empty_like(source)
    calls: dict[str, tuple[int, Callable[[], Any]]] = {
        "copy_gb_s": (2, lambda: target.copy_(source)),
        "read_gb_s": (1, source.sum),
    }
    found = {}
    for name, (passes, call) in calls.items():
        call()
        ms = statistics.median(device_ms(device, call) for _ in range(rounds))
        found[name] = passes * source.nbytes / ms / 1e6
    return found


@contextlib.contextmanager
def variant_of(step: Step) -> Iterator[None]:
    """Makes the backend's launches those of an A/B variant."""
    if not (step.compiler or step.tuning):
        yield
        return
    from striped_hf.optim.backends.triton import arguments

    options, tuning = dict(arguments.OPTIONS), arguments.TUNING
    arguments.OPTIONS.update(step.compiler)
    arguments.TUNING = tuning._replace(**step.tuning)
    try:
        yield
    finally:
        arguments.OPTIONS.clear()
        arguments.OPTIONS.update(options)
        arguments.TUNING = tuning


def time_step(
    step: Step, weights: list[Weight], baseline: Callable[[], Any], rounds: int
) -> dict[str, Any]:
    """Builds a striped optimizer and returns the measurements of its step."""
    device = weights[0].param.device
    build = striped(step.momentum_dtype, "triton", lagged=step.lagged, capturable=step.graph)
    optimizer = build(weights)
    row: dict[str, Any] = {"first_step_s": seconds(device, optimizer.step)}
    optimizer.step()
    ours, theirs = [], []
    for _ in range(rounds):
        theirs.append(device_ms(device, baseline))
        ours.append(device_ms(device, optimizer.step))
    row["device_ms"] = statistics.median(ours)
    low, ratio, high = quartiles([a / b for a, b in zip(ours, theirs, strict=True)])
    row |= {"ratio": ratio, "ratio_quartiles": [low, high]}
    row["host_ms"] = host_ms(device, optimizer.step, rounds)
    row["wall_ms"] = 1e3 * seconds(device, optimizer.step, rounds)
    row["kernels_ms"] = kernel_ms(device, optimizer.step)
    parameters = sum(weight.param.numel() for weight in weights)
    # parameter and state read and written, the gradient read once or twice
    moved = sum(weight.param.nbytes for weight in weights) * (3 if step.lagged else 4)
    moved += 2 * tensor_bytes(states(optimizer))
    row["gb_s"] = moved / row["device_ms"] / 1e6
    row["bytes_per_param"] = moved / parameters
    if step.graph:
        row["graph_ms"] = graph_ms(device, optimizer.step, rounds)
    return row


def time_fused_adamw(
    weights: list[Weight], baseline: Callable[[], Any], rounds: int
) -> dict[str, Any]:
    """Returns the measurements of fused AdamW's step."""
    device = weights[0].param.device
    ms = statistics.median(device_ms(device, baseline) for _ in range(rounds))
    moved = 7 * sum(weight.param.nbytes for weight in weights)  # its state has the dtype of p
    return {
        "device_ms": ms,
        "ratio": 1.0,
        "ratio_quartiles": [1.0, 1.0],
        "host_ms": host_ms(device, baseline, rounds),
        "wall_ms": 1e3 * seconds(device, baseline, rounds),
        "kernels_ms": kernel_ms(device, baseline),
        "gb_s": moved / ms / 1e6,
        "bytes_per_param": moved / sum(weight.param.numel() for weight in weights),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Times everything in ``PLAN`` while there is time; writes the results after each row."""
    deadline = time.monotonic() + args.seconds
    device = torch.device(args.device)
    resolve("triton", args.device)  # raises an error with the reason if no kernel can run
    results: dict[str, Any] = {"environment": environment(args.device), "complete": False}
    results |= {**bandwidths(device, args.rounds), "rows": []}

    def add(row: dict[str, Any]) -> None:
        results["rows"].append(row)
        write_json(args.results, results)
        print(describe(row), flush=True)

    for model, dtype, steps in PLAN[: args.groups]:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        shapes = meta_weights(meta_model(args.model or model))
        weights = list(allocate(shapes, device, getattr(torch, dtype)))
        fused = adamw_fused(weights)
        fused.step()
        same = {"model": model, "dtype": dtype}
        add(
            {
                **same,
                "optimizer": "adamw_fused",
                **time_fused_adamw(weights, fused.step, args.rounds),
            }
        )
        for step in steps:
            if time.monotonic() > deadline:
                return results
            row = {**same, "optimizer": f"striped {step}"}
            try:
                if isinstance(step, Phase):
                    row |= time_phase(step, weights, fused.step, args.rounds)
                else:
                    with variant_of(step):
                        row |= time_step(step, weights, fused.step, args.rounds)
            except Exception as error:  # the other rows still run
                row["reason"] = one_line(error) or type(error).__name__
            add(row)
        del weights, fused
    results["complete"] = True
    write_json(args.results, results)
    return results


def describe(row: dict[str, Any]) -> str:
    """Returns a row as one line of the log."""
    name = f"{row['model']} {row['dtype']} {row['optimizer']}"
    if "reason" in row:
        return f"{name}: {row['reason']}"
    kernels = ", ".join(f"{key} {ms:.3f}" for key, ms in row["kernels_ms"].items())
    return (
        f"{name}: {row['device_ms']:.3f} ms on the device, {row['ratio']:.3f} of fused AdamW, host "
        f"{row['host_ms']:.3f} ms, wall {row['wall_ms']:.3f} ms, {row['gb_s']:.0f} GB/s; {kernels}"
    )


def render(results: dict[str, Any]) -> str:
    """Makes the Markdown table of a results file, and the lines that belong under it."""
    header = (
        *("model, parameters", "optimizer", "device, ms", "ratio to fused AdamW (quartiles)"),
        *("GB/s", "host, ms", "wall, ms", "as a graph, ms"),
    )
    ran = [row for row in results["rows"] if "reason" not in row]
    rows = []
    for row in ran:
        low, high = row["ratio_quartiles"]
        graph = row.get("graph_ms")
        rows.append(
            (
                f"{row['model']}, {row['dtype']}",
                f"`{row['optimizer']}`",
                f"{row['device_ms']:.3f}",
                f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})",
                f"{row['gb_s']:,.0f}",
                f"{row['host_ms']:.3f}",
                f"{row['wall_ms']:.3f}",
                "" if graph is None else f"{graph:.3f}",
            )
        )
    lines = [
        markdown_table(header, rows),
        "",
        f"A plain copy moves {results['copy_gb_s']:,.0f} GB/s, a sum reads "
        f"{results['read_gb_s']:,.0f}.",
    ]
    failed = [f"`{r['optimizer']}` ({r['reason']})" for r in results["rows"] if "reason" in r]
    if failed:
        lines.append(f"Not run: {'; '.join(failed)}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--model", help="a model to use in place of every model of the plan")
    parser.add_argument(
        "--groups", type=int, default=len(PLAN), help="how many rows of the plan to run"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--seconds", type=float, default=60, help="no row begins after so many seconds"
    )
    parser.add_argument("--results", default="out/gpu_kernels.json")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device: pass --device cpu to rehearse")
    print(render(measure(args)))


if __name__ == "__main__":
    run(main)
