"""Measure the speed and the memory of data_scripts/openwebtext.py.

    python -m benchmarks.tokenization documents.parquet

Speed: the baseline is a plain loop that encodes one document after another with tiktoken. The
variants take turns, each in a separate process. The measure is the processor time of all processes
of a variant. Memory: the peak of the whole script with all its processes, on the file and on four
times the file. The results go to benchmarks/results/openwebtext_novels.json, and the table in docs/
comes from that file. tiktoken's vocabulary comes from its cache (TIKTOKEN_CACHE_DIR) or the
network.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

# imported before the packages of an extra, to explain a missing one
from striped_hf.cli import run

# isort: split
import datasets
import numpy as np
import psutil
import pyarrow.parquet as pq
import tiktoken
from tqdm import tqdm

from striped_hf.data.documents import load_documents, write_documents
from striped_hf.results import environment, markdown_table, write_json

SCRIPT = Path(__file__).resolve().parents[1] / "data_scripts" / "openwebtext.py"
RESULTS = "benchmarks/results/openwebtext_novels.json"
VARIANTS = {"the plain loop": 0, "one process encodes": 1, "two processes encode": 2}
REPEATS = (1, 4)  # how many copies of the file the second memory measurement reads
ROW_GROUP = 1000  # rows, as in `datasets`' parquet files; the script reads one row group at a time
SAMPLE_S = 0.05


def plain_loop(documents: datasets.Dataset, path: Path) -> int:
    """Encodes one document after another; returns the number of tokens."""
    encoding = tiktoken.get_encoding("gpt2")
    tokens = 0
    with path.open("wb") as file:
        for document in documents:
            ids = encoding.encode_ordinary(document["text"])
            ids.append(encoding.eot_token)
            np.array(ids, dtype=np.uint16).tofile(file)
            tokens += len(ids)
    return tokens


def encode(file: str, num_proc: int) -> dict[str, float]:
    """Encodes a file and returns tokens and times; runs in a process of its own."""
    documents = load_documents("", data_files=[file])
    tiktoken.get_encoding("gpt2").encode_ordinary("warm")
    with tempfile.TemporaryDirectory() as folder:
        begin, before = time.perf_counter(), sum(os.times()[:4])
        if num_proc:
            source = {"name": "documents", "url": None, "sha256": None}
            meta = write_documents(Path(folder), documents, source, num_proc)
            tokens = sum(meta["tokens"].values())
        else:
            tokens = plain_loop(documents, Path(folder, "train.bin"))
        seconds = time.perf_counter() - begin
        cpu_seconds = sum(os.times()[:4]) - before  # includes ended child processes
    return {"tokens": tokens, "seconds": seconds, "cpu_seconds": cpu_seconds}


def measure_speed(file: str, rounds: int) -> list[dict[str, Any]]:
    """Runs the variants in turns; returns them with the times of every turn."""
    rows: list[dict[str, Any]] = [
        {"variant": variant, "num_proc": num_proc, "turns": []}
        for variant, num_proc in VARIANTS.items()
    ]
    fork = multiprocessing.get_context("fork")  # the benchmark runs only on Linux
    for row in tqdm([row for _ in range(rounds) for row in rows], unit=" turns"):
        with ProcessPoolExecutor(max_workers=1, mp_context=fork) as process:
            row["turns"].append(process.submit(encode, file, row["num_proc"]).result())
    if len({turn["tokens"] for row in rows for turn in row["turns"]}) != 1:
        raise RuntimeError(f"the variants made different numbers of tokens: {rows}")
    return rows


def measure_memory(file: str, repeat: int) -> dict[str, Any]:
    """Runs the script on several copies of a file's documents; returns its peak memory."""
    table = pq.read_table(file)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "documents.parquet")
        with pq.ParquetWriter(path, table.schema) as writer:
            for _ in range(repeat):
                writer.write_table(table, ROW_GROUP)
        text_bytes = repeat * table.column("text").nbytes
        command = [sys.executable, str(SCRIPT), "--data_files", str(path), "--num_proc", "2"]
        process = subprocess.Popen(
            [*command, "--output_dir", str(Path(folder, "data"))],
            env={**os.environ, "HF_HOME": folder},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        peak = 0
        while process.poll() is None:
            peak = max(peak, tree_bytes(process.pid))
            time.sleep(SAMPLE_S)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
    return {"repeat": repeat, "text_bytes": text_bytes, "peak_bytes": peak}


def tree_bytes(pid: int) -> int:
    """Sums up the memory of a process and its descendants; shared memory counts once."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            total += process.memory_full_info().pss
    except psutil.NoSuchProcess:
        pass  # the process has just ended
    return total


def render(results: dict) -> str:
    """Makes the Markdown table of a results file, and the lines that belong under it."""
    speeds = [
        statistics.median(turn["tokens"] / turn["cpu_seconds"] for turn in row["turns"])
        for row in results["speed"]
    ]
    rows = [
        (row["variant"], f"{speed:,.0f}", f"{speed / speeds[0]:.2f}")
        for row, speed in zip(results["speed"], speeds, strict=True)
    ]
    header = ("", "tokens a second of processor time", "ratio to the plain loop")
    once, several = results["memory"]
    return "\n".join(
        (
            markdown_table(header, rows),
            "",
            f"Medians of {len(results['speed'][0]['turns'])} turns over "
            f"{results['speed'][0]['turns'][0]['tokens']:,} tokens.",
            f"Peak memory of the script with two processes that encode: "
            f"{once['peak_bytes'] / 2**20:,.0f} MiB on {once['text_bytes'] / 2**20:,.0f} MiB of "
            f"text, {several['peak_bytes'] / 2**20:,.0f} MiB on "
            f"{several['text_bytes'] / 2**20:,.0f} MiB.",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", help='a parquet file with a column "text"')
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", default=RESULTS, help="the results file")
    args = parser.parse_args()
    results = {
        "environment": {**environment("cpu"), "tiktoken": tiktoken.__version__},
        "speed": measure_speed(args.file, args.rounds),
        "memory": [measure_memory(args.file, repeat) for repeat in REPEATS],
    }
    write_json(args.results, results)
    print(render(results))


if __name__ == "__main__":
    run(main)
