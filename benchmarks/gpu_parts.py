"""The parts of ``make gpu`` and ``make gpu-smoke``: what each runs, and how long it may take."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import (
    gpu_kernels,
    gpu_losses,
    gpu_tests,
    layerwise_memory,
    optimizer_tables,
    training_memory,
    training_step,
)
from striped_hf.data import write_data_set

# 300 examples in one process; each compiles other kernels
TOO_LONG = "tests/optim/test_against_oracle.py::test_every_number_agrees_with_the_oracle"

# how to render the results of each part, by the names of the files in benchmarks/results/
RENDER: dict[str, Callable[[dict[str, Any]], str]] = {
    "gpu_tests": gpu_tests.render,
    "gpu_kernels": gpu_kernels.render,
    "optimizers_gpt2_xl_cuda_float32": optimizer_tables.render,
    "layerwise_memory_cuda": layerwise_memory.render,
    "finetune_gpt2_xl_cuda": training_memory.render,
    "optimizers_gpt2_cuda_float32": optimizer_tables.render,
    "throughput_gpt2_cuda": training_memory.render,
    "training_step_gpt2_cuda": training_step.render,
    "gpu_losses": gpu_losses.render,
}
SLOW_REHEARSAL = 10  # a rehearsal's limits: the interpreter on two cores is slower than a GPU


@dataclass(frozen=True)
class Part:
    """One process to run.

    Args:
        name: The name of its results, a key of ``RENDER``.
        command: The arguments of the Python interpreter; the last one is the results file.
        limit_s: The time limit in seconds, after which the part is killed.
        takes_the_rest: Whether the part may use all of the remaining time, if that is more.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    takes_the_rest: bool = False

    def render(self, results: dict[str, Any]) -> str:
        """Makes the Markdown table of its results."""
        return RENDER[self.name](results)


def smoke(folder: Path, rehearsal: bool) -> list[Part]:
    """Lists the parts of a first look: one shape of each kernel variant, and the kernel times."""
    planned = [
        kernel_tests(folder, 60, rehearsal, smoke=True),
        kernel_times(folder, 50, rehearsal),
    ]
    return slowed(planned) if rehearsal else planned


def full(folder: Path, rehearsal: bool) -> list[Part]:
    """Lists all parts, the most valuable first. If time runs out, the last ones do not run.

    Args:
        folder: The folder of the results files.
        rehearsal: Whether to do as much as a CPU can in a minute: tiny models, few steps.
    """
    device = ("--device", "cpu" if rehearsal else "cuda")
    models = {"gpt2": "gpt2", "gpt2-xl": "gpt2-xl"}
    data = "data/novels"
    if rehearsal:
        models = dict.fromkeys(models, tiny_model(folder))
        data = tiny_data(folder)

    def part(name: str, limit_s: float, *command: str, tiny: tuple[str, ...]) -> Part:
        flags = (*device, *(tiny if rehearsal else ()))
        results = str(folder / f"{name}.json")
        return Part(name, ("-m", *command, *flags, "--results", results), limit_s)

    planned = [
        kernel_tests(folder, 100, rehearsal, smoke=rehearsal),
        kernel_times(folder, 70, rehearsal),
        # few optimizers: each compiles for seconds, and the part before times the others
        part(
            *("optimizers_gpt2_xl_cuda_float32", 45),
            *("benchmarks.optimizers", "--shapes", models["gpt2-xl"], "--rounds", "10"),
            *("--optimizers", "striped_float32", "striped_int8", "striped_int4"),
            tiny=("--rounds", "1"),
        ),
        # GPT-2 XL, 1 window x 1,024 tokens x 32 accumulation steps; Llama-2 7B, 1 x 1,024 tokens
        part(
            *("layerwise_memory_cuda", 100, "benchmarks.layerwise_memory", "--seconds", "80"),
            tiny=("--model", folding_model(folder), "--accumulation", "2", "--block_size", "32"),
        ),
        # finetune_shakespeare.py's setting: 1 window x 1,024 tokens x 32 accumulation steps
        part(
            *("finetune_gpt2_xl_cuda", 55),
            *("benchmarks.training_memory", "--model", models["gpt2-xl"], "--steps", "3"),
            *("--optim", "adamw_torch_fused", "striped_adamw_8bit"),
            tiny=("--accumulation", "2", "--block_size", "32"),
        ),
        part(
            *("optimizers_gpt2_cuda_float32", 40, "benchmarks.optimizers"),
            *("--shapes", models["gpt2"], "--rounds", "10"),
            tiny=("--rounds", "1", "--optimizers", "adamw_foreach", "striped_int8"),
        ),
        # 16 windows x 1,024 tokens
        part(
            *("throughput_gpt2_cuda", 30, "benchmarks.training_memory", "--model", models["gpt2"]),
            *("--steps", "30", "--batch_size", "16", "--accumulation", "1"),
            tiny=("--steps", "3", "--batch_size", "2", "--block_size", "32"),
        ),
        # 12 windows x 1,024 tokens; each variant compiles for half a minute
        part(
            *("training_step_gpt2_cuda", 70, "benchmarks.training_step"),
            *("--variants", "recipe", "bare loop", "--rounds", "3", "--steps", "20"),
            *("--preset", "cpu" if rehearsal else "gpt2"),
            tiny=("--rounds", "1", "--steps", "2"),
        ),
        Part(
            *("gpu_losses", losses(folder, data, models["gpt2"], *device, rehearsal=rehearsal), 15),
            takes_the_rest=True,
        ),
    ]
    return slowed(planned) if rehearsal else planned


def slowed(planned: list[Part]) -> list[Part]:
    """Returns the parts with a rehearsal's limits."""
    return [replace(part, limit_s=part.limit_s * SLOW_REHEARSAL) for part in planned]


def kernel_tests(folder: Path, limit_s: float, rehearsal: bool, smoke: bool) -> Part:
    """Compares the kernels with the reference and the oracle.

    Args:
        folder: The folder of the results file.
        limit_s: The time limit of the part, in seconds.
        rehearsal: Whether the kernels are interpreted.
        smoke: Whether to run one shape of each kernel variant instead of all tests.
    """
    marks = " and ".join(
        mark for mark, wanted in (("gpu", not rehearsal), ("smoke", smoke)) if wanted
    )
    chosen = ("-m", marks, "--deselect", TOO_LONG, "tests/optim")
    processes = "2" if rehearsal else "8"
    output = ("-q", "--tb", "short", "-p", "no:cacheprovider", "-n", processes)
    results = str(folder / "gpu_tests.json")
    command = ("-m", "benchmarks.gpu_tests", "--results", results, "--", *output, *chosen)
    return Part("gpu_tests", command, limit_s)


def kernel_times(folder: Path, limit_s: float, rehearsal: bool) -> Part:
    """Times each striped step and kernel, fused AdamW and a plain copy."""
    # time for the imports, and for the row that is running
    flags = ("--seconds", str(limit_s - 12))
    if rehearsal:
        flags = ("--device", "cpu", "--model", tiny_model(folder), "--rounds", "1")
        flags += ("--seconds", "600")
    results = ("--results", str(folder / "gpu_kernels.json"))
    return Part("gpu_kernels", ("-m", "benchmarks.gpu_kernels", *flags, *results), limit_s)


def losses(
    folder: Path, data_dir: str, model: str, *device: str, rehearsal: bool
) -> tuple[str, ...]:
    """Compares losses, in all of the remaining time."""
    flags = ("--data_dir", data_dir, "--model", model, *device)
    if rehearsal:
        flags += ("--steps", "4", "--turn", "2", "--batch_size", "2", "--block_size", "32")
    results = ("--results", str(folder / "gpu_losses.json"))
    return ("-m", "benchmarks.gpu_losses", *flags, *results)


def tiny_model(folder: Path) -> str:
    """Writes the configuration of a very small GPT-2, and returns its folder."""
    return _small_model(folder / "tiny-gpt2", vocab_size=96, width=16)


def folding_model(folder: Path) -> str:
    """Writes that of a GPT-2 just large enough that the gradient of its embedding is freed."""
    return _small_model(folder / "folding-gpt2", vocab_size=1024, width=64)


def _small_model(path: Path, vocab_size: int, width: int) -> str:
    path.mkdir(exist_ok=True)
    config = {"model_type": "gpt2", "vocab_size": vocab_size, "n_positions": 64, "n_embd": width}
    config |= {"n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(path)


def tiny_data(folder: Path) -> str:
    """Writes a small data set of random tokens, and returns its folder."""
    path = folder / "tiny-data"
    tokens = np.random.default_rng(0).integers(96, size=4096, dtype=np.uint16)
    source = {"name": "random tokens", "url": None, "sha256": None}
    splits = {"train": tokens[:3072], "val": tokens[3072:]}
    write_data_set(path, splits, vocab_size=96, source=source, tokenizer_name="none")
    return str(path)
