"""Sharded training: one function per case, which every process of a mesh calls.

Every case trains a model that ``fully_shard`` or ``parallelize_module`` has sharded.
"""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path

import torch
from sharded_model import (
    Follower,
    batch,
    gathered,
    loss_of,
    new_model,
    new_optimizer,
    shard,
    train,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from striped_hf.optim import StripedAdamW, adamw_state_dict
from striped_hf.optim.momentum import MOMENTUM_DTYPES

# The difference of losses in two trainings whose gradients were rounded differently: 5e-3 measured
# at one of 50 steps, most below 1e-3. If a gradient is only noise, AdamW's update has full size in
# either direction.
LOSSES = 2e-2


def even_columns(parameter: nn.Parameter, mesh: DeviceMesh) -> Shard | None:
    """Shards columns if every process gets the same number of them."""
    is_even = parameter.dim() == 2 and parameter.shape[1] % mesh.size() == 0
    return Shard(1) if is_even else None


def fsdp2(mesh: DeviceMesh, folder: Path) -> None:
    """Shards rows over all processes: uneven and empty shards, tied embeddings, clipping."""
    for momentum_dtype in MOMENTUM_DTYPES:
        for backend in ("reference", "cpu"):
            model = shard(new_model(), mesh)
            assert all(isinstance(p, DTensor) for p in model.parameters())
            optimizer = new_optimizer(model, momentum_dtype, backend=backend)
            train(
                model, Follower(model, optimizer, backend=backend).step, range(4), mesh.get_rank()
            )


def fifty_steps(mesh: DeviceMesh, folder: Path) -> None:
    """Compares the losses of one process on all data and of many processes on their parts."""
    single = new_model()
    optimizer = new_optimizer(single, "int8")
    expected = []
    for t in range(50):
        parts = [batch(t, 2 * (r + 1))[2 * r :] for r in range(mesh.size())]
        losses = [loss_of(single, part, t) for part in parts]
        (sum(losses) / len(losses)).backward()
        nn.utils.clip_grad_norm_(single.parameters(), 1.0)
        optimizer.step()
        single.zero_grad()
        expected.append(losses[mesh.get_rank()].item())
    model = shard(new_model(), mesh)
    actual = train(model, new_optimizer(model, "int8").step, range(50), mesh.get_rank())
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=LOSSES, atol=0)
    assert actual[-1] < actual[0]


def accumulation(mesh: DeviceMesh, folder: Path) -> None:
    """Adds up the gradients of several backward passes, exchanged after the last pass."""
    model = shard(new_model(), mesh)
    follower = Follower(model, new_optimizer(model, "int8"))
    for t in range(4):
        for micro in range(3):
            model.set_requires_gradient_sync(micro == 2)
            loss_of(model, batch(10 * t + micro, 2), 0).backward()
        follower.step()
        model.zero_grad()


def mixed_precision(mesh: DeviceMesh, folder: Path) -> None:
    """Uses bfloat16 in forward, backward and the gradients' exchange; float32 parameters."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    model = shard(new_model(), mesh, mp_policy=policy)
    train(model, Follower(model, new_optimizer(model, "int8")).step, range(4), mesh.get_rank())


def low_precision(mesh: DeviceMesh, folder: Path) -> None:
    """Rounds bfloat16 parameters stochastically, by the same bits as whole parameters."""
    model = shard(new_model().bfloat16(), mesh)
    train(model, Follower(model, new_optimizer(model, "int8")).step, range(4), mesh.get_rank())


def master_bits(mesh: DeviceMesh, folder: Path) -> None:
    """Keeps 8 more bits of bfloat16 parameters, which are sharded by rows or by columns."""

    def place(parameter: nn.Parameter) -> Shard | None:
        return even_columns(parameter, mesh)

    for momentum_dtype, placement in product(("float32", "int8"), (None, place)):
        model = shard(new_model().bfloat16(), mesh, shard_placement_fn=placement)
        optimizer = new_optimizer(model, momentum_dtype, master_bits=24)
        train(model, Follower(model, optimizer).step, range(3), mesh.get_rank())
        kept = [state.get("param_low_bits") for state in optimizer.state.values()]
        assert torch.int8 in {low.dtype for low in kept if low is not None}
        # a whole state dict gathers every tensor
        whole = StateDictOptions(full_state_dict=True)
        saved = get_optimizer_state_dict(model, optimizer, options=whole)
        set_optimizer_state_dict(model, optimizer, saved, options=whole)
        adamw_state_dict(optimizer)


def cpu_offload(mesh: DeviceMesh, folder: Path) -> None:
    """Keeps the parameters on the CPU, which therefore computes the step."""
    model = shard(new_model(), mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    train(model, Follower(model, new_optimizer(model, "int4")).step, range(4), mesh.get_rank())


def by_columns(mesh: DeviceMesh, folder: Path) -> None:
    """Shards columns by a placement function of ``fully_shard``, if they divide evenly."""

    def place(parameter: nn.Parameter) -> Shard | None:
        return even_columns(parameter, mesh)

    for momentum_dtype in ("float32", "int4"):
        model = shard(new_model(), mesh, shard_placement_fn=place)
        follower = Follower(model, new_optimizer(model, momentum_dtype))
        train(model, follower.step, range(4), mesh.get_rank())


def export_to_adamw(mesh: DeviceMesh, folder: Path) -> None:
    """Exports by ``adamw_state_dict``: sharded like the parameters, and equal to a whole export."""

    def place(parameter: nn.Parameter) -> Shard | None:
        return even_columns(parameter, mesh)

    for momentum_dtype, placement in product(("float32", "int4"), (None, place)):
        model = shard(new_model(), mesh, shard_placement_fn=placement)
        optimizer = new_optimizer(model, momentum_dtype)
        train(model, optimizer.step, range(3))
        exported = adamw_state_dict(optimizer)

        everything = copy.deepcopy(optimizer.state_dict())
        for values in everything["state"].values():
            values.update({key: gathered(value) for key, value in values.items()})
        whole = new_optimizer(new_model(), momentum_dtype)
        whole.load_state_dict(everything)
        expected = adamw_state_dict(whole)
        assert exported["state"].keys() == expected["state"].keys()
        assert exported["param_groups"] == expected["param_groups"]
        for position, param in enumerate(model.parameters()):
            for key, value in exported["state"].get(position, {}).items():
                assert torch.equal(gathered(value), expected["state"][position][key]), key
                assert key == "step" or value.placements == param.placements, key

        adamw = torch.optim.AdamW(model.parameters())
        adamw.load_state_dict(exported)
        train(model, adamw.step, range(3, 6))
        again = new_optimizer(model, "int8")  # loads the export into another format
        again.load_state_dict(exported)
        train(model, again.step, range(6, 8))


def lagged(mesh: DeviceMesh, folder: Path) -> None:
    """Divides by the stripes of the step before."""
    model = shard(new_model(), mesh)
    optimizer = new_optimizer(model, "int8", lagged=True)
    train(model, Follower(model, optimizer, lagged=True).step, range(4), mesh.get_rank())


def hybrid(mesh: DeviceMesh, folder: Path) -> None:
    """Trains with HSDP: shards over one dimension of the mesh, replicas over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for momentum_dtype in ("float32", "int8"):
        model = shard(new_model(), mesh)
        follower = Follower(model, new_optimizer(model, momentum_dtype))
        train(model, follower.step, range(4), mesh.get_rank())


def tensor_parallel(mesh: DeviceMesh, folder: Path) -> None:
    """Uses ``parallelize_module`` in ``fully_shard``: rows of rows, and rows and columns."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for momentum_dtype in MOMENTUM_DTYPES:
        model = new_model()
        for block in model.blocks:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block, mesh["tensor"], plan)
        shard(model, mesh["data"])
        placements = {p.placements for p in model.blocks[0].parameters()}
        assert len(placements) == 4, placements  # with and without a tensor dimension
        follower = Follower(model, new_optimizer(model, momentum_dtype))
        train(model, follower.step, range(4), mesh["data"].get_local_rank(), clip=None)


def tensor_parallel_alone(mesh: DeviceMesh, folder: Path) -> None:
    """Shards only some parameters; the others are whole."""
    model = new_model()
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    assert {isinstance(p, DTensor) for p in model.parameters()} == {True, False}
    follower = Follower(model, new_optimizer(model, "int8"))
    train(model, follower.step, range(4), clip=None)


def one_exchange(mesh: DeviceMesh, folder: Path) -> None:
    """Counts one all-reduce of a step's sums, for all parameters and groups."""
    model = shard(new_model(), mesh)
    first, *others = model.parameters()
    optimizer = StripedAdamW([{"params": [first]}, {"params": others, "lr": 1e-4}])
    loss_of(model, batch(0, 2), 0).backward()
    optimizer.step()
    loss_of(model, batch(0, 2), 0).backward()
    with torch.profiler.profile() as profile:
        optimizer.step()
    names = [event.name for event in profile.events()]
    assert sum(name == "gloo:all_reduce" for name in names) == 1, sorted(set(names))
    assert not [name for name in names if "all_gather" in name or "all_to_all" in name]
