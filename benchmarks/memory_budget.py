"""The memory of finetuning a model with each optimizer: ``benchmarks/optimizers.py --memory``.

    weights + gradients + optimizer state + the larger of two temporaries:
        activations     what the forward and backward passes hold at their peak
        step            what the optimizer's step allocates and frees

Weights and gradients are float32, and gradients stay allocated between accumulated passes. The peak
of the activations is computed operation by operation on fake tensors, which have shapes but no
memory. On a GPU this uses bfloat16 autocast. State and the step's temporaries are measured: each
optimizer steps on one tensor of each shape in the model, and again with a second tensor of each
shape that occurs more than once. Temporaries that the second tensors add grow with the model; the
others do not. The CUDA context and the allocator's fragmentation come on top.

``--devices 2 4 8`` also computes the bytes on each of several devices, without activations: they
are the same on every device.

    DDP      all of them, and the gradients a second time, in the buckets that are sent
    FSDP2    its shards, and the tensors that are gathered: parameters and gradients outside the
             transformer blocks, the parameters of two blocks (the current one and the next one),
             and the gradients of one block
"""

import argparse
import gc
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from benchmarks.measuring import temporary_bytes
from benchmarks.model_shapes import Weight, allocate, meta_model, meta_weights, slug
from benchmarks.optimizer_peers import Peer, states
from striped_hf.cli import one_line
from striped_hf.published_configs import load_config
from striped_hf.results import environment, markdown_table, write_json
from striped_hf.trainer.live_bytes import OTHER, LiveBytes
from striped_hf.trainer.memory import tensor_bytes

CARDS_GIB = (8, 12, 16, 24, 32, 40, 48, 80, 141)
CONTEXT_GIB = 1  # the memory of a card that CUDA and the kernels use


def activation_bytes(
    config: PretrainedConfig, device: torch.device, batch_size: int, block_size: int
) -> int:
    """Returns the peak of one forward and backward pass above weights and gradients, in bytes."""
    with FakeTensorMode():
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config).train()
            ids = torch.zeros(batch_size, block_size, dtype=torch.long)
        for _ in range(2):  # in the second pass the gradients exist already
            known = [ids, *model.parameters(), *model.buffers()]
            known += [param.grad for param in model.parameters() if param.grad is not None]
            with LiveBytes() as live:
                live.label("known", known)
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
            del loss
    return live.at_peak()[OTHER]


def optimizer_bytes(peer: Peer, shapes: list[Weight], device: torch.device) -> tuple[int, int]:
    """Measures the bytes of an optimizer's state and of its step's temporaries for all shapes."""
    kinds = Counter((w.param.shape, w.blocks, w.weight_decay, w.embedding) for w in shapes)
    samples = {(w.param.shape, w.blocks, w.weight_decay, w.embedding): w for w in shapes}
    ones = [samples[kind] for kind in kinds]
    twos = [samples[kind] for kind, count in kinds.items() if count > 1]

    state, elements, temporaries = 0, [], []
    for sample in (ones, ones + twos):
        weights = list(allocate(sample, device, torch.float32))
        optimizer = peer.build(weights)
        optimizer.step()
        if sample is ones:
            by_param = states(optimizer)
            state = sum(
                count * tensor_bytes(by_param[weight.param])
                for weight, count in zip(weights, kinds.values(), strict=True)
            )
            del by_param
        elements.append(sum(weight.param.numel() for weight in weights))
        temporaries.append(temporary_bytes(device, optimizer.step) or 0)
        del optimizer, weights
        gc.collect()
    if not twos:
        return state, temporaries[0]
    total = sum(weight.param.numel() for weight in shapes)
    growth = max(0, temporaries[1] - temporaries[0]) / (elements[1] - elements[0])
    return state, temporaries[0] + round(growth * (total - elements[0]))


def gathered_bytes(model: PreTrainedModel) -> int:
    """Returns the float32 bytes that FSDP2 gathers at a time, with each block wrapped."""
    names = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    sizes = [sum(param.numel() for param in block.parameters()) for block in blocks]
    outside = sum(param.numel() for param in model.parameters()) - sum(sizes)
    return 4 * (2 * outside + 3 * max(sizes, default=0))


def budget(
    name: str, peers: list[Peer], device: torch.device, batch_size: int, block_size: int
) -> dict[str, Any]:
    """Computes the memory of finetuning a model with each of the optimizers, in bytes."""
    model = meta_model(name)
    shapes = meta_weights(model)
    parameters = sum(weight.param.numel() for weight in shapes)
    weights = 4 * parameters + sum(buffer.nbytes for buffer in model.buffers())
    activations = activation_bytes(load_config(name), device, batch_size, block_size)
    rows: list[dict[str, Any]] = []
    for peer in peers:
        row: dict[str, Any] = {"name": peer.name}
        rows.append(row)
        try:
            row["state"], row["step"] = optimizer_bytes(peer, shapes, device)
        except Exception as error:  # any error of a peer is the reason in its row
            row["reason"] = one_line(error)
            continue
        row["peak"] = weights + 4 * parameters + row["state"] + max(activations, row["step"])
    return {
        "model": name,
        "parameters": parameters,
        "batch_size": batch_size,
        "block_size": block_size,
        "weights": weights,
        "gradients": 4 * parameters,
        "activations": activations,
        "gathered": gathered_bytes(model),
        "optimizers": rows,
    }


def smallest_card(peak: int) -> str:
    """Names the smallest card that has room for a peak and the CUDA context."""
    fitting = [card for card in CARDS_GIB if peak <= (card - CONTEXT_GIB) * 2**30]
    return f"{fitting[0]} GiB" if fitting else f"over {CARDS_GIB[-1]} GiB"


def render_memory(results: dict[str, Any]) -> str:
    """Makes the Markdown table of a budget, and the line under it."""
    header = (
        *("optimizer", "weights, MiB", "gradients, MiB", "state, MiB", "activations, MiB"),
        *("step, MiB", "peak, MiB", "smallest card"),
    )
    rows, skipped = [], []
    for row in results["optimizers"]:
        if "reason" in row:
            skipped.append(f"`{row['name']}` ({row['reason']})")
            continue
        sizes = (
            *(results["weights"], results["gradients"], row["state"]),
            *(results["activations"], row["step"], row["peak"]),
        )
        mib = (f"{size / 2**20:,.0f}" for size in sizes)
        rows.append((f"`{row['name']}`", *mib, smallest_card(row["peak"])))
    lines = [
        markdown_table(header, rows),
        "",
        f"`{results['model']}`, {results['parameters']:,} parameters, {results['batch_size']} x "
        f"{results['block_size']} tokens a pass; the larger of activations and step counts.",
    ]
    if skipped:
        lines.append(f"Not run: {'; '.join(skipped)}.")
    return "\n".join(lines)


def render_devices(results: dict[str, Any], devices: Sequence[int] = (2, 4, 8)) -> str:
    """Makes the Markdown table of the memory on each of several devices, from a budget."""
    header = ("optimizer", "one device", "DDP", *(f"FSDP2 over {n}" for n in devices))
    rows = []
    for row in results["optimizers"]:
        if "reason" in row:
            continue
        whole = results["weights"] + results["gradients"] + row["state"]
        sizes = [whole + row["step"], whole + results["gradients"] + row["step"]]
        # nothing is gathered while the optimizer steps
        sizes += [whole // n + max(results["gathered"], row["step"] // n) for n in devices]
        rows.append((f"`{row['name']}`", *(f"{size / 2**20:,.0f}" for size in sizes)))
    lines = [
        markdown_table(header, rows),
        "",
        f"MiB of weights, gradients and state on each device, in float32, of `{results['model']}`, "
        f"{results['parameters']:,} parameters; under FSDP2 with the "
        f"{results['gathered'] / 2**20:,.0f} that are gathered at a time. Activations come on top.",
    ]
    return "\n".join(lines)


def run_memory(args: argparse.Namespace, peers: list[Peer]) -> None:
    """Computes, prints and writes the budget that the command line asks for."""
    device = torch.device(args.device)
    results = budget(args.memory, peers, device, args.batch_size, args.block_size)
    results = {"environment": environment(args.device), **results}
    name = f"memory_{slug(args.memory)}_{args.device}.json"
    write_json(args.results or f"benchmarks/results/{name}", results)
    print(render_memory(results))
    if args.devices:
        print(f"\n{render_devices(results, args.devices)}")
