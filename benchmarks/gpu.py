"""Run everything in this project that needs a GPU, in one command.

    make gpu              # results go where $OUT says, else into benchmarks/results/

It installs nothing and needs no network: it runs from the tree with whatever torch, transformers
and triton there are; optimizers whose packages are missing are named with that reason. Each part is
a process with its own time limit. One that fails does not stop the next, and the command ends in
error where any did. A part begins only while there is time left, so that the whole ends within 9
minutes. The summary comes last. To add a part, add it to ``parts``.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import optimizer_tables, training_memory, training_step
from striped_hf.cli import UserError, run
from striped_hf.results import environment, write_json

REPOSITORY = Path(__file__).resolve().parents[1]
BUDGET_S = 530  # of all parts; imports and the summary take the rest of 9 minutes
SHORTEST_S = 15  # a part with less time than this left is not begun


@dataclass(frozen=True)
class Part:
    """One process to run.

    Args:
        name: What the summary calls it.
        command: Its arguments, for the Python that runs this.
        limit_s: After so many seconds it is ended, and has failed.
        results: The file that it writes, shown in the summary.
        render: What makes a table of that file.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    results: Path | None = None
    render: Callable[[dict[str, Any]], str] | None = None


def parts(out: Path, device: str = "cuda") -> list[Part]:
    """Lists the parts, in order of importance: the last are the first to find no time left."""

    def optimizers(model: str, dtype: str, limit_s: float) -> Part:
        name = model.replace("-", "_")
        results = out / f"optimizers_{name}_{device}_{dtype}.json"
        flags = ("--shapes", model, "--device", device, "--dtype", dtype, "--results", str(results))
        command = ("-m", "benchmarks.optimizers", *flags)
        return Part(
            f"optimizers, {model}, {dtype}", command, limit_s, results, optimizer_tables.render
        )

    def training(name: str, model: str, limit_s: float, *flags: str) -> Part:
        results = out / f"{name}_{device}.json"
        command = ("-m", "benchmarks.training_memory", "--device", device, "--model", model, *flags)
        command += ("--results", str(results))
        return Part(name, command, limit_s, results, training_memory.render)

    steps = out / f"training_step_gpt2_{device}.json"
    step_flags = ("--preset", "gpt2", "--device", device, "--rounds", "5", "--steps", "20")
    return [
        Part("tests", ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"), 180),
        # finetune_shakespeare.py's setting: 1 window x 1,024 tokens x 32 accumulation steps
        training("finetune_gpt2_xl", "gpt2-xl", 160, "--steps", "4"),
        optimizers("gpt2", "float32", 90),
        optimizers("gpt2", "bfloat16", 90),
        # 16 windows x 1,024 tokens
        training(
            *("throughput_gpt2", "gpt2", 60, "--steps", "30"),
            *("--batch_size", "16", "--accumulation", "1"),
        ),
        # 12 windows x 1,024 tokens, and what each thing that makes it fast is worth
        Part(
            *(
                "training_step_gpt2",
                ("-m", "benchmarks.training_step", *step_flags, "--results", str(steps)),
            ),
            *(240, steps, training_step.render),
        ),
        optimizers("gpt2-xl", "float32", 110),
        optimizers("gpt2-xl", "bfloat16", 110),
    ]


def run_part(part: Part, limit_s: float) -> dict[str, Any]:
    """Runs a part, ends all its processes when its time is over, and returns how it ended."""
    begin = time.monotonic()
    if part.results is not None:
        part.results.unlink(missing_ok=True)  # what the summary shows is to be of this run
    process = subprocess.Popen(
        [sys.executable, *part.command],
        cwd=REPOSITORY,
        # one GPU, unless told which: Trainer would spread over all
        env={"CUDA_VISIBLE_DEVICES": "0", **os.environ, "PYTHONPATH": str(REPOSITORY)},
        start_new_session=True,  # so that its own children can be ended with it
    )
    try:
        status = process.wait(limit_s)
        ended = "passed" if status == 0 else f"failed with status {status}"
    except subprocess.TimeoutExpired:
        ended = f"ended after its limit of {limit_s:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # they have all ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return {"part": part.name, "ended": ended, "seconds": time.monotonic() - begin}


def run_parts(planned: Sequence[Part], out: Path, budget_s: float = BUDGET_S) -> bool:
    """Runs parts one after another and prints the summary; returns whether all passed."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + budget_s
    outcomes = []
    for part in planned:
        left = deadline - time.monotonic()
        if left < min(SHORTEST_S, part.limit_s):
            outcomes.append({"part": part.name, "ended": "not begun: no time left", "seconds": 0.0})
            continue
        print(f"\n== {part.name}", flush=True)
        outcomes.append(run_part(part, min(left, part.limit_s)))

    print("\n== results", flush=True)
    for part in planned:
        if part.results is not None and part.results.is_file() and part.render is not None:
            table = part.render(json.loads(part.results.read_text(encoding="utf-8")))
            print(f"\n{part.name}:\n\n{table}")
    write_json(out / "gpu.json", {"environment": environment(), "parts": outcomes})
    passed = all(outcome["ended"] == "passed" for outcome in outcomes)
    print(f"\n== summary: {'all parts passed' if passed else 'FAILED'}; results are in {out}")
    for outcome in outcomes:
        print(f"{outcome['part']}: {outcome['ended']} ({outcome['seconds']:.0f} s)")
    sys.stdout.flush()
    return passed


def main() -> None:
    if not torch.cuda.is_available():
        raise UserError("there is no CUDA device here: run it where there is one")
    out = Path(os.environ.get("OUT") or REPOSITORY / "benchmarks" / "results").resolve()
    if not run_parts(parts(out), out):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
