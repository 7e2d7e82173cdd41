"""Predict the time of a striped step on an H100 from the machine code of its kernels.

    python -m benchmarks.gpu_static

Nothing runs on a GPU. The command compiles the kernels for sm_90 and reads their machine code. A
multiprocessor runs as many programs at a time as registers and shared memory allow. In one
iteration of their loops, the time of these programs is the longest of

- memory: the bytes that they read and write, at the bandwidth of ``H100``;
- issue: the cycles for which their warps keep the busiest part of a scheduler;
- latency: the time of one warp alone, whose waits for memory follow each other (``sass.simulate``).

A step is the sum of its two large kernels, the statistics and the update. It does not count the
kernels that add up partial sums and average stripes, gradients that are still in the L2 cache when
the update reads them, nor gaps between launches.
"""

import argparse
import os
from dataclasses import asdict, dataclass
from typing import Any

from striped_hf.cli import UserError, run
from striped_hf.results import environment, markdown_table, write_json

RESULTS = "benchmarks/results/gpu_static.json"


@dataclass(frozen=True)
class Gpu:
    """The figures of a GPU that the prediction needs."""

    multiprocessors: int
    clock_hz: float
    bandwidth: float  # bytes per second that a plain kernel reaches
    latency_cycles: float  # of a read from memory, while the memory is busy
    registers: int  # of a multiprocessor; the following, too
    shared_bytes: int
    warps: int
    programs: int

    @property
    def bytes_per_cycle(self) -> float:
        """Of one multiprocessor."""
        return self.bandwidth / self.multiprocessors / self.clock_hz


# the SXM5 card; the bandwidth is 85% of the 3.35 TB/s in its data sheet
H100 = Gpu(
    multiprocessors=132,
    clock_hz=1.755e9,
    bandwidth=2.85e12,
    latency_cycles=900,
    registers=65536,
    shared_bytes=228 * 1024,
    warps=64,
    programs=32,
)

# (parameters' dtype, momentum format, lagged, fields of ``arguments.Tuning``)
STEPS: tuple[tuple[str, str, bool, dict[str, Any]], ...] = (
    ("float32", "float32", False, {}),
    ("float32", "bfloat16", False, {}),
    ("float32", "int8", False, {}),
    ("float32", "int4", False, {}),
    ("float32", "float32", True, {}),
    ("float32", "int8", True, {}),
    ("bfloat16", "bfloat16", False, {}),
    ("bfloat16", "int8", False, {}),
    ("bfloat16", "int8", True, {}),
    ("float32", "float32", False, {"approximate_reciprocal": True}),
    ("float32", "float32", False, {"stages": 2}),
    ("bfloat16", "int8", False, {"approximate_reciprocal": True}),
    ("bfloat16", "int8", False, {"stages": 2}),
)
PARAM_BYTES = {"float32": 4, "bfloat16": 2}
MOMENTUM_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1 + 4 / 128, "int4": 1 / 2 + 4 / 128}
SUMMED_ROWS = 256  # of a large model


@dataclass(frozen=True)
class Kernel:
    """The machine code of one kernel, and its predicted time."""

    instructions_per_element: float
    registers: int
    warps: int  # of a multiprocessor, at a time
    serial_waits: int  # of an iteration
    bytes_per_element: float
    ns_per_element: float  # of the whole GPU
    bound: str  # "memory", "issue" or "latency"
    tolerated_ns: float  # the longest latency of memory with which memory is still the bound


def describe(variant: Any, bytes_per_element: float, gpu: Gpu) -> Kernel:
    """Compiles a variant for sm_90 and predicts its time."""
    from benchmarks import sass
    from benchmarks.compiled_kernels import compile_variant

    compiled = compile_variant(variant, 90)
    code = sass.read(compiled.asm["cubin"])
    loop = sass.hot_loop(code.instructions)
    # registers of a warp are allocated by 256; a program has 1 KiB of shared memory for the system
    of_a_warp = -(-code.registers * 32 // 256) * 256
    programs = min(
        gpu.programs,
        gpu.warps // variant.warps,
        gpu.registers // (of_a_warp * variant.warps),
        gpu.shared_bytes // (compiled.metadata.shared + 1024),
    )
    warps = programs * variant.warps
    elements = programs * variant.elements
    cycles = {
        "memory": elements * bytes_per_element / gpu.bytes_per_cycle,
        "issue": warps / 4 * sass.issue_cycles(loop),
        "latency": sass.simulate(loop, gpu.latency_cycles).cycles,
    }
    bound = max(cycles, key=lambda each: cycles[each])
    low, high = 0.0, 1e5
    while high - low > 1:
        middle = (low + high) / 2
        hidden = sass.simulate(loop, middle).cycles < cycles["memory"]
        low, high = (middle, high) if hidden else (low, middle)
    seconds = cycles[bound] / gpu.clock_hz / elements / gpu.multiprocessors
    return Kernel(
        instructions_per_element=len(loop) / variant.elements_per_thread,
        registers=code.registers,
        warps=warps,
        serial_waits=sass.simulate(loop, gpu.latency_cycles).serial_waits,
        bytes_per_element=bytes_per_element,
        ns_per_element=1e9 * seconds,
        bound=bound,
        tolerated_ns=1e9 * low / gpu.clock_hz,
    )


def predict(
    param: str, momentum_dtype: str, lagged: bool, tuning: dict[str, Any], gpu: Gpu
) -> dict[str, Any]:
    """Returns the row of one step."""
    from benchmarks import compiled_kernels as kernels

    dtype = {"float32": kernels.F32, "bfloat16": kernels.BF16}[param]
    chosen = kernels.TUNING._replace(**tuning)
    size = PARAM_BYTES[param]
    # partial sums of rows and of columns
    partials = {width: 4 / width + 4 / SUMMED_ROWS for width in (128, 256)}
    moved = 3 * size + 2 * MOMENTUM_BYTES[momentum_dtype] + (partials[128] if lagged else 0)
    update = describe(
        kernels.matrices(dtype, momentum_dtype, chosen, fused_statistics=lagged), moved, gpu
    )
    row: dict[str, Any] = {"param": param, "momentum_dtype": momentum_dtype, "lagged": lagged}
    row |= {"tuning": tuning, "update": asdict(update)}
    ns = update.ns_per_element
    if not lagged:
        statistics = kernels.statistics(dtype, tuning=chosen)
        row["statistics"] = asdict(describe(statistics, size + partials[256], gpu))
        ns += row["statistics"]["ns_per_element"]
    # fused AdamW reads and writes p, m and v, and reads g, all of p's dtype
    return row | {"ratio": ns / (1e9 * 7 * size / gpu.bandwidth)}


def measure(gpu: Gpu) -> dict[str, Any]:
    """Predicts every step of ``STEPS``."""
    import triton

    rows = []
    for step in STEPS:
        rows.append(predict(*step, gpu))
        print(step, f"{rows[-1]['ratio']:.2f}", flush=True)
    return {
        "environment": environment("cpu"),
        "triton": triton.__version__,
        "gpu": asdict(gpu),
        "rows": rows,
    }


def render(results: dict[str, Any]) -> str:
    """Makes the Markdown table of a results file."""
    header = (
        *("parameters, momentum", "instructions per element", "registers", "warps at a time"),
        *("serial waits", "bound", "tolerated latency, ns", "predicted ratio to fused AdamW"),
    )
    rows = []
    for row in results["rows"]:
        update = row["update"]
        marks = ["lagged"] if row["lagged"] else []
        marks += [f"`{key}={value}`" for key, value in row["tuning"].items()]
        rows.append(
            (
                ", ".join([row["param"], row["momentum_dtype"], *marks]),
                f"{update['instructions_per_element']:.1f}",
                str(update["registers"]),
                str(update["warps"]),
                str(update["serial_waits"]),
                update["bound"],
                f"{update['tolerated_ns']:,.0f}",
                f"{row['ratio']:.2f}",
            )
        )
    gpu = results["gpu"]
    statistics = results["rows"][0]["statistics"]
    lines = [
        markdown_table(header, rows),
        "",
        f"All columns but the last are of the update. The statistics of float32 gradients have "
        f"{statistics['instructions_per_element']:.1f} instructions per element and "
        f"{statistics['registers']} registers. Compiled by Triton {results['triton']} for sm_90; "
        f"assumed are {gpu['bandwidth'] / 1e12:.2f} TB/s for every kernel and a latency of "
        f"{1e9 * gpu['latency_cycles'] / gpu['clock_hz']:.0f} ns.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", default=RESULTS)
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("the kernels are interpreted, not compiled: unset TRITON_INTERPRET")
    results = measure(H100)
    write_json(args.results, results)
    print(render(results))


if __name__ == "__main__":
    run(main)
