"""Compare StripedAdamW's steps on sharded parameters with its steps on whole parameters.

    python -m benchmarks.sharding     # 2, 3 and 4 processes on this machine, two minutes

Every process has its shards of some parameters. The first process also has the same parameters
whole. Shards and whole parameters get the same gradients for 50 steps. The results are the largest
differences for each momentum format, backend and way of sharding. They go to
benchmarks/results/sharding_cpu.json, and the table in docs/ comes from that file.
"""

import argparse
import math
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from tqdm import tqdm

from striped_hf.optim import StripedAdamW
from striped_hf.optim.momentum import MOMENTUM_DTYPES
from striped_hf.results import environment, markdown_table, write_json

RESULTS = "benchmarks/results/sharding_cpu.json"
MESHES = {2: (2,), 3: (3,), 4: (2, 2)}  # by the number of processes
BACKENDS = ("reference", "cpu")
ROWS, COLUMNS = (Shard(0),), (Shard(1),)


class Case(NamedTuple):
    """One way of sharding, and the shapes and blocks of the parameters that it shards."""

    name: str
    placements: tuple[Placement, ...]
    parameters: tuple[tuple[tuple[int, ...], tuple[int, int]], ...]
    exact: bool = False  # whether all sums are exact in float32


CASES = (
    Case("rows, evenly", ROWS, (((48, 64), (1, 1)), ((12, 260), (1, 1)))),
    Case("rows, unevenly", ROWS, (((7, 300), (1, 1)), ((97, 130), (1, 1)), ((50257, 4), (1, 1)))),
    Case("rows, fewer than processes", ROWS, (((1, 6), (1, 1)),)),
    Case("rows, a border inside a block", ROWS, (((30, 260), (3, 1)), ((10, 300), (5, 3)))),
    Case("columns", COLUMNS, (((40, 768), (1, 1)),)),
    Case("columns, a border inside codes", COLUMNS, (((40, 300), (1, 1)), ((9, 300), (1, 3)))),
    Case("stacked matrices", ROWS, (((5, 6, 130), (2, 1)),)),
    Case("vectors", ROWS, (((97,), (1, 1)), ((1,), (1, 1)))),
    Case("rows, exact sums", ROWS, (((64, 32), (1, 1)), ((16, 256), (2, 2))), exact=True),
    Case("rows and columns", (Shard(0), Shard(1)), (((97, 300), (1, 1)), ((30, 512), (1, 1)))),
    Case("rows, in replicas", (Replicate(), Shard(0)), (((97, 130), (1, 1)), ((7, 300), (1, 1)))),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, nargs="+", default=list(MESHES), choices=MESHES)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--output", default=RESULTS, help="the results file")
    args = parser.parse_args()
    rows: list[dict] = []
    for processes in args.processes:
        print(f"== {processes} processes")
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.start_processes(
                work,
                (processes, args.steps, folder),
                nprocs=processes,
                start_method="fork",  # a fork need not import everything again
            )
            rows += torch.load(Path(folder, "rows.pt"), weights_only=True)
    results = {"environment": environment("cpu"), "steps": args.steps, "comparisons": rows}
    write_json(args.output, results)
    print(render(results))


def work(rank: int, processes: int, steps: int, folder: str) -> None:
    """Runs in each process; the first one writes the differences into ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=processes,
        timeout=timedelta(minutes=5),
    )
    mesh = init_device_mesh("cpu", MESHES[processes])
    cases = [case for case in CASES if len(case.placements) == mesh.ndim]
    rows = []
    runs = [(dtype, backend) for dtype in MOMENTUM_DTYPES for backend in BACKENDS]
    for momentum_dtype, backend in tqdm(runs, disable=rank > 0):
        for case in cases:
            differences = compare(case, mesh, momentum_dtype, backend, steps)
            kind = {"sharding": case.name, "exact": case.exact, "processes": processes}
            rows.append({**kind, "momentum": momentum_dtype, "backend": backend, **differences})
    if rank == 0:
        torch.save(rows, Path(folder, "rows.pt"))
    dist.barrier()  # gloo aborts if a process ends while another one still sends to it
    dist.destroy_process_group()


def compare(
    case: Case, mesh: DeviceMesh, momentum_dtype: str, backend: str, steps: int
) -> dict[str, float]:
    """Steps a case's parameters sharded, and in the first process also whole.

    Returns:
        The largest differences, in the first process only. ``parameters``: between elements,
        relative to the parameter's largest element. ``stripes``: the relative difference.
        ``codes``: the share of momentum codes that differ.
    """
    generator = torch.Generator().manual_seed(1)
    whole = [nn.Parameter(torch.randn(shape, generator=generator)) for shape, _ in case.parameters]
    sharded = []
    for p in whole:
        placements = [Replicate() if too_flat(p, each) else each for each in case.placements]
        sharded.append(nn.Parameter(shard(p.detach().clone(), mesh, placements)))
    optimizers = [
        StripedAdamW(
            [{"params": ps, "blocks": [blocks for _, blocks in case.parameters]}],
            lr=1e-2,
            # the digits of averages would soon be too many for exact sums in float32
            betas=(0.9, 0.0) if case.exact else (0.9, 0.99),
            momentum_dtype=momentum_dtype,
            backend=backend,
        )
        for ps in (whole, sharded)
    ]
    for step in range(steps):
        for i, (p, q) in enumerate(zip(whole, sharded, strict=True)):
            if i == 1 and step % 5 == 3:  # some parameters have no gradient in some steps
                p.grad = q.grad = None
                continue
            p.grad = gradient(p.shape, generator, case.exact)
            q.grad = shard(p.grad, mesh, q.placements)
        for optimizer in optimizers if dist.get_rank() == 0 else optimizers[1:]:
            optimizer.step()
    return largest_differences(*optimizers)


def largest_differences(whole: StripedAdamW, sharded: StripedAdamW) -> dict[str, float]:
    """Compares the parameters and the states of two optimizers; see ``compare``."""
    differences = {"parameters": 0.0, "stripes": 0.0, "codes": 0.0}
    pairs = zip(*(each.param_groups[0]["params"] for each in (whole, sharded)), strict=True)
    for p, q in pairs:
        stepped = gathered(q.detach())
        state = {key: gathered(value) for key, value in sharded.state[q].items()}
        if dist.get_rank() > 0:
            continue
        note(differences, "parameters", (stepped - p.detach()).abs().max() / p.detach().abs().max())
        assert state.keys() == whole.state[p].keys()
        for key, value in whole.state[p].items():
            if key.startswith("exp_avg_sq"):
                off = (state[key] - value).abs() / value
                note(differences, "stripes", off.nan_to_num().max())
            elif value.dtype in (torch.int8, torch.uint8):
                note(differences, "codes", (state[key] != value).float().mean())
    return differences


def shard(x: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """Shards a tensor that every process has whole, without communication."""
    return distribute_tensor(x, mesh, placements, src_data_rank=None)


def too_flat(p: Tensor, placement: Placement) -> bool:
    return isinstance(placement, Shard) and placement.dim >= p.dim()


def gradient(shape: torch.Size, generator: torch.Generator, exact: bool) -> Tensor:
    """Draws a gradient; an exact one has powers of two, whose squares add up without rounding."""
    if not exact:
        return torch.randn(shape, generator=generator)
    signs = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1
    return signs * 2.0 ** torch.randint(0, 2, (shape[0], 1), generator=generator)


def gathered(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def note(differences: dict[str, float], key: str, value: Tensor) -> None:
    value = float(value)
    differences[key] = math.nan if math.isnan(value) else max(differences[key], value)


def render(results: dict) -> str:
    """Makes the Markdown table of a results file, with the larger difference of both backends."""
    header = ("sharded", "processes", *MOMENTUM_DTYPES, "stripes", "codes")
    rows = []
    kinds = dict.fromkeys((row["sharding"], row["processes"]) for row in results["comparisons"])
    for sharding, processes in kinds:
        same = [
            row
            for row in results["comparisons"]
            if (row["sharding"], row["processes"]) == (sharding, processes)
        ]
        cells = [
            max(row["parameters"] for row in same if row["momentum"] == momentum_dtype)
            for momentum_dtype in MOMENTUM_DTYPES
        ]
        cells += [max(row[key] for row in same) for key in ("stripes", "codes")]
        texts = [f"{cell:.1e}" if cell else "0" for cell in cells]
        rows.append((sharding, str(processes), *texts))
    return markdown_table(header, rows)


if __name__ == "__main__":
    main()
