"""Compute the state and the communication of StripedAdamW on many devices, and of AdamW.

    python -m benchmarks.sharding_scale     # arithmetic, and GPT-2 on 2 and 3 processes; 3 minutes

Parameters are float32 and sharded by rows over all N devices, as in FSDP2. For a matrix of R rows
and C columns in br x bc blocks, the device with the most rows keeps

    momentum      ceil(R / N) rows, with 4, 2, 1.03 or 0.53 bytes per element
    row stripe    4 ceil(R / N) bc bytes
    col stripe    4 br C bytes: the same on every device

and for a vector of n elements 8 ceil(n / N) bytes. The all-reduce of a step sums, over all
matrices,

    S = 33 + sum of (br C + br bc + 2) numbers of 4 bytes

33 numbers show that all devices exchange the same, and 2 show which of them have a gradient.

A ring all-reduce sends 2 (N - 1) / N x 4 S bytes from each device. The reduce-scatter of the
gradients sends (N - 1) / N x 4 P bytes for P parameters. AdamW keeps 8 bytes per element and sends
nothing more.

The benchmark compares the formula with the bytes that gloo's processes write to their sockets.
"""

import math
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from benchmarks.model_shapes import Weight, allocate, meta_model, meta_weights
from striped_hf.optim import StripedAdamW
from striped_hf.optim.momentum import MOMENTUM_DTYPES
from striped_hf.optim.state import init_state
from striped_hf.results import environment, markdown_table, write_json

RESULTS = "benchmarks/results/sharding_scale.json"
MODELS = ("gpt2-xl", "llama-8b", "llama-70b", "llama-405b")
DEVICES = (8, 64, 512, 4096)
MEASURED, STEPS = "gpt2", 5


def main() -> None:
    models = []
    for name in MODELS:
        weights = meta_weights(meta_model(name))
        parameters = sum(weight.param.numel() for weight in weights)
        scales = [
            {
                "devices": devices,
                "adamw": sum(8 * local_elements(weight, devices) for weight in weights),
                **{d: sum(local_state(w, d, devices) for w in weights) for d in MOMENTUM_DTYPES},
                "stripes_sent": ring(2 * 4 * exchanged(weights), devices),
                "gradients_sent": ring(4 * parameters, devices),
            }
            for devices in DEVICES
        ]
        models.append({"name": name, "parameters": parameters, "scales": scales})
    formula = {n: ring(2 * 4 * exchanged(meta_weights(meta_model(MEASURED))), n) for n in (2, 3)}
    measured = [
        {"processes": n, "formula": expected, "sent": measure(n)} for n, expected in formula.items()
    ]
    results = {"environment": environment("cpu"), "models": models, "measured": measured}
    write_json(RESULTS, results)
    print(render(results))


def local_elements(weight: Weight, devices: int) -> int:
    """Returns how many elements of a parameter are on the device with the most of them."""
    rows, *rest = weight.param.shape or (1,)
    return -(-rows // devices) * math.prod(rest)


def local_state(weight: Weight, momentum_dtype: str, devices: int) -> int:
    """Returns the bytes of a parameter's state on the device with the most of them."""
    rows, *rest = weight.param.shape or (1,)
    part = torch.empty(-(-rows // devices), *rest, device="meta")
    row_blocks, col_blocks = weight.blocks
    state = init_state(part, momentum_dtype, (1, col_blocks))
    size = sum(value.nbytes for value in state.values())
    return size + (row_blocks - 1) * state["exp_avg_sq_col"].nbytes if rest else size


def exchanged(weights: list[Weight]) -> int:
    """Returns how many numbers a step's all-reduce adds up."""
    return 33 + sum(
        weight.blocks[0] * (weight.param.shape[-1] + weight.blocks[1]) + 2
        for weight in weights
        if weight.param.dim() >= 2
    )


def ring(size: int, devices: int) -> float:
    """Returns the bytes that a ring sends from each device for each pass over ``size`` bytes."""
    return size * (devices - 1) / devices


def measure(processes: int) -> float:
    """Returns the mean bytes that a process writes to its sockets in a step on ``MEASURED``."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (processes, folder), nprocs=processes)
        written = [int(path.read_text()) for path in Path(folder).glob("written-*")]
    return sum(written) / len(written) / STEPS


def work(rank: int, processes: int, folder: str) -> None:
    """Runs in each process: steps on its shards, and counts the bytes that it writes meanwhile."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    mesh = init_device_mesh("cpu", (processes,))
    params, blocks = [], []
    weights = meta_weights(meta_model(MEASURED))
    for weight in allocate(weights, torch.device("cpu"), torch.float32):
        tensors = (weight.param.detach(), weight.param.grad)
        # every process drew the same values: none need be sent
        param, grad = (
            distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None) for tensor in tensors
        )
        params.append(nn.Parameter(param))
        params[-1].grad = grad
        blocks.append(weight.blocks)
    optimizer = StripedAdamW([{"params": params, "blocks": blocks}], momentum_dtype="int8")
    optimizer.step()
    before = written_bytes()
    for _ in range(STEPS):
        optimizer.step()
    written = written_bytes() - before
    dist.barrier()
    Path(folder, f"written-{rank}").write_text(str(written))
    dist.destroy_process_group()


def written_bytes() -> int:
    """Returns the bytes that this process has written so far, to sockets and files."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


def render(results: dict) -> str:
    """Makes the Markdown tables of a results file."""
    header = (
        *("model", "devices", "AdamW", *(f"striped, {d}" for d in MOMENTUM_DTYPES)),
        *("stripes sent", "gradients sent"),
    )
    rows = [
        (
            f"`{model['name']}`",
            f"{scale['devices']:,}",
            *(mebibytes(scale[key]) for key in ("adamw", *MOMENTUM_DTYPES)),
            *(mebibytes(scale[key]) for key in ("stripes_sent", "gradients_sent")),
        )
        for model in results["models"]
        for scale in model["scales"]
    ]
    sent = [
        f"{row['sent'] / 1e6:.3f} MB from each of {row['processes']} ({row['formula'] / 1e6:.3f})"
        for row in results["measured"]
    ]
    return (
        f"{markdown_table(header, rows)}\n\n"
        f"MiB on each device, and in each step from each device. Measured on `{MEASURED}`, and by "
        f"the formula: {'; '.join(sent)}."
    )


def mebibytes(size: float) -> str:
    return f"{size / 2**20:,.1f}" if size < 100 * 2**20 else f"{size / 2**20:,.0f}"


if __name__ == "__main__":
    main()
