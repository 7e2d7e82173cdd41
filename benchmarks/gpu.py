"""Run everything in this project that needs a GPU, in one command.

    make gpu-smoke        # 2 minutes: the kernel tests and the kernel times
    make gpu              # 9 minutes: everything
    make gpu-check        # without a GPU: every part, tiny, in an environment like a GPU machine's
    python -m benchmarks.gpu --collect out/gpu/gpu.json      # into benchmarks/results/

It installs nothing and needs no network. Each part is a process with its own time limit. The most
valuable parts run first. A part that fails does not stop the next one, but then the command ends
with an error. ``gpu.json`` has the results of all parts. It is written every two seconds while a
part runs: a run can be stopped at any moment, and its measurements stay. ``gpu.log`` has all
output. Both files go to the folder $OUT. Its default is out/gpu/, or out/gpu_rehearsal/ for a
rehearsal, which measures nothing.

benchmarks/gpu.md says how to use a quarter of an hour on a GPU. ``benchmarks/gpu_parts.py`` lists
the parts.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.gpu_parts import RENDER, SLOW_REHEARSAL, Part, full, smoke
from striped_hf.cli import UserError, run
from striped_hf.results import environment, write_json

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
# of all parts together; the start takes some more seconds
BUDGET_S = {"full": 525.0, "smoke": 110.0}
SHORTEST_S = 15.0  # a part does not begin with less time than this
WRITE_EVERY_S = 2.0


def run_part(part: Part, limit_s: float, log: IO[str], save: Any) -> dict[str, Any]:
    """Runs a part, and kills its processes when its time is over.

    Args:
        part: What to run.
        limit_s: The time limit, in seconds.
        log: A file for the part's output, which also goes to standard output.
        save: Called every few seconds with the part's state so far.

    Returns:
        The outcome: ``part``, ``ended`` (how it ended) and ``seconds``.
    """
    begin = time.monotonic()
    python_path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, *part.command],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={
            "CUDA_VISIBLE_DEVICES": "0",  # the default: Trainer would use all GPUs
            "HF_HUB_OFFLINE": "1",
            **os.environ,
            "PYTHONPATH": python_path,
            "PYTHONUNBUFFERED": "1",
        },
        start_new_session=True,  # killpg then also ends its children
    )

    def copy_output() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            for stream in (sys.stdout, log):
                stream.write(line)
                stream.flush()

    reader = threading.Thread(target=copy_output, daemon=True)
    reader.start()
    outcome = {"part": part.name, "ended": "was running when the run was cut off"}
    try:
        while True:
            seconds = time.monotonic() - begin
            save({**outcome, "seconds": seconds})
            if seconds >= limit_s:
                outcome["ended"] = f"ended after its limit of {limit_s:.0f} s"
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(min(WRITE_EVERY_S, limit_s - seconds))
                outcome["ended"] = "passed" if status == 0 else f"failed with status {status}"
                break
    finally:
        with contextlib.suppress(ProcessLookupError):  # all of its processes have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(timeout=5)
    return {**outcome, "seconds": time.monotonic() - begin}


def run_parts(
    planned: Sequence[Part], out: Path, folder: Path, budget_s: float, rehearsal: bool = False
) -> bool:
    """Runs parts one after another and prints the summary; returns whether all passed.

    Args:
        planned: The parts, the most valuable first.
        out: Where gpu.json and gpu.log go.
        folder: Where the parts write their own results files.
        budget_s: The time limit of all parts together, in seconds.
        rehearsal: Whether this is a rehearsal, whose figures mean nothing. gpu.json notes it.
    """
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + budget_s
    outcomes: list[dict[str, Any]] = []
    where = environment()

    def save(running: dict[str, Any] | None = None) -> dict[str, Any]:
        """Writes gpu.json, with the results of every part so far."""
        found = {}
        for part in planned:
            path = folder / f"{part.name}.json"
            if path.is_file():
                found[part.name] = json.loads(path.read_text(encoding="utf-8"))
        ended = [*outcomes, *([running] if running else [])]
        written = {"environment": where, "rehearsal": rehearsal, "parts": ended, "results": found}
        write_json(out / "gpu.json", written)
        return written

    with (out / "gpu.log").open("w", encoding="utf-8") as log:
        for part in planned:
            left = deadline - time.monotonic()
            if left < min(SHORTEST_S, part.limit_s):
                ended = {"part": part.name, "ended": "not begun: no time left", "seconds": 0.0}
                outcomes.append(ended)
                continue
            print(f"\n== {part.name}", flush=True)
            log.write(f"\n== {part.name}\n")
            limit_s = left if part.takes_the_rest else min(left, part.limit_s)
            outcomes.append(run_part(part, limit_s, log, save))
            save()
        results = save()["results"]
        for text in summary(planned, outcomes, results):
            print(text, flush=True)
            log.write(f"{text}\n")
    print(f"everything is in {out}/gpu.json and {out}/gpu.log")
    return all(outcome["ended"] == "passed" for outcome in outcomes)


def summary(
    planned: Sequence[Part], outcomes: Sequence[dict[str, Any]], results: dict[str, Any]
) -> list[str]:
    """Returns the tables of all results, and then how each part ended."""
    lines = ["\n== results"]
    for part in planned:
        if part.name in results:
            try:
                table = part.render(results[part.name])
            except Exception as error:  # too early an end for a table; gpu.json has the figures
                table = f"no table: {error!r}"
            lines.append(f"\n{part.name}:\n\n{table}")
    passed = all(outcome["ended"] == "passed" for outcome in outcomes)
    lines.append(f"\n== summary: {'all parts passed' if passed else 'FAILED'}")
    for outcome in outcomes:
        found = results.get(outcome["part"])
        note = "no result" if found is None else "" if found.get("complete") else "cut off"
        note = f", {note}" if note else ""
        lines.append(f"{outcome['part']}: {outcome['ended']} ({outcome['seconds']:.0f} s){note}")
    return lines


def collect(path: Path) -> None:
    """Writes the results of each part in a gpu.json into benchmarks/results/, for the tables.

    Raises:
        UserError: It is no gpu.json, or it is from a rehearsal.
    """
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        results, rehearsal = written["results"], written["rehearsal"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--collect {path}: pass a gpu.json that `make gpu` wrote") from error
    if rehearsal:
        raise UserError(f"--collect {path}: a rehearsal measures nothing; pass one of `make gpu`")
    for name in RENDER:  # not the file's names: a file must not choose a path
        if name in results:
            write_json(RESULTS / f"{name}.json", results[name])
            print(f"written: {RESULTS / name}.json")
    print("now run `python -m benchmarks.render_tables`")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="the kernel tests and times only")
    parser.add_argument(
        "--rehearse", action="store_true", help="everything tiny, on the CPU, kernels interpreted"
    )
    parser.add_argument(
        "--collect",
        type=Path,
        metavar="FILE",
        help="copy the results of a gpu.json into benchmarks/results/",
    )
    args = parser.parse_args()
    if args.collect:
        collect(args.collect)
        return
    if not args.rehearse and not torch.cuda.is_available():
        raise UserError(
            "there is no CUDA device: run this on a machine with a GPU, or rehearse it with "
            "`make gpu-check`"
        )
    default = REPOSITORY / "out" / ("gpu_rehearsal" if args.rehearse else "gpu")
    out = Path(os.environ.get("OUT") or default).resolve()
    with tempfile.TemporaryDirectory(prefix="gpu_parts_") as name:
        folder = Path(name)
        planned = (smoke if args.smoke else full)(folder, args.rehearse)
        budget_s = BUDGET_S["smoke" if args.smoke else "full"]
        if args.rehearse:
            os.environ["TRITON_INTERPRET"] = "1"
            budget_s *= SLOW_REHEARSAL
        passed = run_parts(planned, out, folder, budget_s, args.rehearse)
    if args.rehearse:
        written = json.loads((out / "gpu.json").read_text(encoding="utf-8"))
        without = [part.name for part in planned if not has_result(written, part.name)]
        if without:
            sys.exit(f"without a whole result: {', '.join(without)}")
        print("every part ended with a whole result")
    if not passed:
        sys.exit(1)


def has_result(written: dict[str, Any], name: str) -> bool:
    """Tells whether a part ran to its end and measured every row that the machine can run."""
    found = written["results"].get(name, {})
    rows = found.get("rows") or found.get("optimizers") or found.get("variants") or [{}]
    reasons = [row["reason"] for row in rows if "reason" in row]
    unexpected = [reason for reason in reasons if not reason.endswith("is not installed")]
    return bool(found.get("complete")) and not unexpected and len(reasons) < len(rows)


if __name__ == "__main__":
    run(main)
