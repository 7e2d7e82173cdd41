"""Processes that step different parameters: one function per case, which every process calls.

All processes must raise each error. It must name the difference, and no tensor may have changed.
The step after it, without the difference, must be the step of whole parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded_model import ROUNDING, assert_near, gathered
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

from striped_hf.optim import StripedAdamW

ROWS: tuple[Placement, ...] = (Shard(0),)
COLUMNS: tuple[Placement, ...] = (Shard(1),)
WHOLE: tuple[Placement, ...] = (Replicate(),)


def values(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def distribute(value: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """Shards a tensor that every process has, without communication."""
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


class Training:
    """Sharded parameters, and the same whole ones in every process."""

    def __init__(
        self,
        mesh: DeviceMesh,
        shapes: Sequence[Sequence[int]],
        placements: Sequence[Placement] = ROWS,
        **arguments: Any,
    ) -> None:
        self.whole = [nn.Parameter(values(shape, i)) for i, shape in enumerate(shapes)]
        self.sharded = [nn.Parameter(distribute(p.detach(), mesh, placements)) for p in self.whole]
        self.arguments = {"lr": 1e-2, **arguments}
        self.follower = StripedAdamW(self.whole, **self.arguments)
        self.steps = 0

    def optimizer(self, order: Sequence[int] | None = None, named: bool = True) -> StripedAdamW:
        """Returns an optimizer of the sharded parameters, in some order."""
        order = range(len(self.sharded)) if order is None else order
        names = [(f"layer.{i}", self.sharded[i]) for i in order]
        return StripedAdamW(names if named else [p for _, p in names], **self.arguments)

    def set_gradients(self) -> None:
        for i, (p, whole) in enumerate(zip(self.sharded, self.whole, strict=True)):
            whole.grad = values(whole.shape, 100 + 10 * self.steps + i)
            p.grad = distribute(whole.grad, p.device_mesh, p.placements)

    def step(self, optimizer: StripedAdamW) -> None:
        """Steps the sharded and the whole parameters, and compares them."""
        optimizer.step()
        self.follower.step()
        self.steps += 1
        for i, (p, whole) in enumerate(zip(self.sharded, self.whole, strict=True)):
            assert_near(gathered(p), whole.detach(), ROUNDING, f"parameter {i}")

    def train(self, optimizer: StripedAdamW, steps: int) -> None:
        for _ in range(steps):
            self.set_gradients()
            self.step(optimizer)


def local_bytes(optimizer: StripedAdamW) -> list[bytes]:
    """Returns this process's bytes of all parameters and states."""
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    for state in optimizer.state.values():
        tensors += state.values()
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return [t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in local]


def assert_refused(optimizer: StripedAdamW, *expected: str) -> None:
    """Asserts that a step raises RuntimeError with these texts, and changes nothing."""
    before = local_bytes(optimizer)
    with pytest.raises(RuntimeError) as raised:
        optimizer.step()
    message = str(raised.value)
    assert all(text in message for text in expected), message
    assert local_bytes(optimizer) == before


def another_order(mesh: DeviceMesh, folder: Path) -> None:
    """Gives one process another order: equal shapes with names, other shapes with or without."""
    last = mesh.get_rank() == mesh.size() - 1
    for shapes, named in (
        (((64, 32), (64, 32), (64, 32)), True),
        (((64, 32), (48, 16), (16, 48)), True),
        (((64, 32), (48, 16), (16, 48)), False),
    ):
        training = Training(mesh, shapes)
        training.set_gradients()
        different = training.optimizer([0, 2, 1] if last else [0, 1, 2], named)
        names = ("'layer.1'", "'layer.2'") if named else (str(shapes[1]), str(shapes[2]))
        assert_refused(different, "parameter 1", *names, f"process {mesh.size() - 1}")
        assert not different.state
        training.train(training.optimizer(named=named), 2)


def another_number(mesh: DeviceMesh, folder: Path) -> None:
    """Gives one process one more matrix, or other blocks."""
    first = mesh.get_rank() == 0
    training = Training(mesh, [(64, 32), (32, 64)], momentum_dtype="int8")
    training.set_gradients()
    assert_refused(training.optimizer([0, 1] if first else [0]), "'layer.1'", "no further one")
    other_blocks = training.optimizer()
    other_blocks.param_groups[0]["blocks"] = (2, 1) if first else (1, 1)
    assert_refused(other_blocks, "'layer.0'", "blocks=(2, 1)", "blocks=(1, 1)")
    training.train(training.optimizer(), 2)


def a_change_after_some_steps(mesh: DeviceMesh, folder: Path) -> None:
    """Reverses, drops or freezes parameters of one process between two steps."""
    first = mesh.get_rank() == 0
    for momentum_dtype in ("float32", "int8"):
        training = Training(mesh, [(64, 256), (64, 256)], momentum_dtype=momentum_dtype)
        optimizer = training.optimizer()
        training.train(optimizer, 2)
        [group] = optimizer.param_groups
        for params in (group["params"][::-1], group["params"][:1]):
            kept = {key: group[key] for key in ("params", "param_names")}
            if first:
                names = {id(p): name for p, name in zip(*kept.values(), strict=True)}
                group.update(params=params, param_names=[names[id(p)] for p in params])
            training.set_gradients()
            assert_refused(optimizer, "process 0", "'layer.")
            group.update(kept)
            training.train(optimizer, 2)
        frozen = training.sharded[1]
        training.set_gradients()
        if first:
            frozen.requires_grad_(False).grad = None
        assert_refused(optimizer, "'layer.1'", "no further one")
        frozen.requires_grad_(True)
        training.train(optimizer, 2)


def a_change_on_all(mesh: DeviceMesh, folder: Path) -> None:
    """Freezes a matrix, adds a group and reorders in all processes, so that they agree anew."""
    training = Training(mesh, [(64, 32), (48, 16), (16, 48)])
    optimizer = StripedAdamW(training.sharded[:2], lr=1e-2)
    for p in (training.sharded[2], training.whole[2]):
        p.requires_grad_(False)
    for change in ("none", "unfreeze", "reorder", "freeze"):
        if change == "unfreeze":
            optimizer.add_param_group({"params": [training.sharded[2]]})
        if change == "reorder":
            optimizer.param_groups[0]["params"].reverse()
        if change in ("unfreeze", "freeze"):
            for p in (training.sharded[2], training.whole[2]):
                p.requires_grad_(change == "unfreeze")
        for _ in range(2):
            training.set_gradients()
            for p in (training.sharded[2], training.whole[2]):
                p.grad = p.grad if p.requires_grad else None
            training.step(optimizer)


def gradients_on_some(mesh: DeviceMesh, folder: Path) -> None:
    """Tests a gradient that one process lacks, an error, and one that all lack, no step."""
    first = mesh.get_rank() == 0
    for arguments in ({}, {"lagged": True, "momentum_dtype": "int8"}):
        training = Training(mesh, [(64, 256), (64, 256), (32, 128)], **arguments)
        optimizer = training.optimizer()
        for step in range(3):
            for without in ((0,), (2,), (0, 1, 2)):
                training.set_gradients()
                for i in without:
                    training.sharded[i].grad = None if first else training.sharded[i].grad
                assert_refused(optimizer, f"'layer.{without[0]}'", "zeros_like")
            training.set_gradients()  # crosswise: each process has as many gradients of one shape
            training.sharded[0 if first else 1].grad = None
            assert_refused(optimizer, "'layer.0'", "zeros_like")
            training.set_gradients()
            if step == 0:  # no process has used it yet
                training.sharded[1].grad = training.whole[1].grad = None
            training.step(optimizer)
            assert (training.sharded[1] in optimizer.state) == (step > 0)


def no_gradient_of_an_empty_part(mesh: DeviceMesh, folder: Path) -> None:
    """Steps with a process whose part is empty, with and without a gradient there."""
    training = Training(mesh, [(1, 6), (mesh.size() - 1, 32), (64, 32)])
    optimizer = training.optimizer()
    for _ in range(3):
        training.set_gradients()
        for p in training.sharded:
            p.grad = p.grad if p.to_local().numel() else None
        training.step(optimizer)


def sharded_again(mesh: DeviceMesh, folder: Path) -> None:
    """Shards a matrix in another way between steps, in all processes, as ``module.to`` swaps it."""
    for momentum_dtype in ("float32", "int8", "int4"):
        for before, after in (
            (ROWS, WHOLE),
            (ROWS, COLUMNS),
            (COLUMNS, ROWS),
            (WHOLE, ROWS),
            (WHOLE, COLUMNS),
        ):
            arguments = {"momentum_dtype": momentum_dtype}
            has_columns = COLUMNS in (before, after)
            shapes = [(64, 256), (5, 7), (7, 5) if has_columns else (9,)]
            training = Training(mesh, shapes, before, **arguments)
            optimizer = training.optimizer()
            training.train(optimizer, 2)
            for p in training.sharded:
                p.grad = None
                other = nn.Parameter(p.detach().redistribute(placements=after))
                torch.utils.swap_tensors(p, other)
                del other
            training.train(optimizer, 2)


def sharded_again_on_one(mesh: DeviceMesh, folder: Path) -> None:
    """Shards a matrix in another way in one process, with and without an exchange after it."""
    for after in (WHOLE, COLUMNS):
        training = Training(mesh, [(64, 256), (64, 32)])
        optimizer = training.optimizer()
        training.train(optimizer, 2)
        changed = training.sharded[0]
        kept = changed.detach()
        part = distribute(gathered(changed), mesh, after)
        training.set_gradients()
        if mesh.get_rank() == 0:
            changed.grad = None
            swap(changed, part)
            changed.grad = distribute(training.whole[0].grad, mesh, after)
        assert_refused(optimizer, "'layer.0'", "process 0")
        if mesh.get_rank() == 0:
            changed.grad = None
            swap(changed, kept)
        training.train(optimizer, 2)


def swap(param: nn.Parameter, value: Tensor) -> None:
    other = nn.Parameter(value)
    torch.utils.swap_tensors(param, other)


def one_cannot_step(mesh: DeviceMesh, folder: Path) -> None:
    """Refuses a step in one process: an error in all, at the first step and at a later step."""
    training = Training(mesh, [(64, 32), (32, 64)])
    optimizer = training.optimizer()
    extra = nn.Parameter(torch.zeros(3, 3))
    optimizer.add_param_group({"params": [("extra", extra)]})
    for _ in range(2):
        training.set_gradients()
        extra.grad = torch.zeros(3, 3)
        if mesh.get_rank() == 0:
            extra.grad = extra.grad.to_sparse()
        where = () if mesh.get_rank() == 0 else ("process 0 cannot step",)
        assert_refused(optimizer, "'extra'", "sparse", *where)
        extra.grad = torch.zeros(3, 3)
        training.step(optimizer)


def rows_of_cut_columns(mesh: DeviceMesh, folder: Path) -> None:
    """Steps matrices whose columns are exchanged for rows, which must wait for the check."""
    first = mesh.get_rank() == 0
    training = Training(mesh, [(64, 96), (64, 96)], COLUMNS, momentum_dtype="int4")
    optimizer = training.optimizer()
    training.set_gradients()
    assert_refused(training.optimizer([1, 0] if first else [0, 1]), "'layer.0'", "'layer.1'")
    for step in range(2):
        training.set_gradients()
        training.sharded[1].grad = None if first else training.sharded[1].grad
        assert_refused(optimizer, "'layer.1'", "zeros_like")
        training.set_gradients()
        if step == 0:
            training.sharded[1].grad = training.whole[1].grad = None
        training.step(optimizer)
        assert (training.sharded[1] in optimizer.state) == (step > 0)
    training.set_gradients()
    [group] = optimizer.param_groups
    if first:
        group.update({key: group[key][::-1] for key in ("params", "param_names")})
    assert_refused(optimizer, "'layer.0'", "'layer.1'")


def gradients_that_are_partial(mesh: DeviceMesh, folder: Path) -> None:
    """Steps matrices and vectors with Partial gradients; then only one process has one."""
    training = Training(mesh, [(64, 32), (64,)])
    optimizer = training.optimizer()
    for one in (False, True):
        training.set_gradients()
        for p, whole in zip(training.sharded, training.whole, strict=True):
            if not one or mesh.get_rank() == 0:
                share = whole.grad / mesh.size()
                p.grad = DTensor.from_local(share, mesh, [Partial()], run_check=False)
        if one:
            assert_refused(optimizer, "'layer.0'", "Partial")
        else:
            training.step(optimizer)


def two_dimensions(mesh: DeviceMesh, folder: Path) -> None:
    """Shards rows and columns over two dimensions of a mesh, with a difference in one process."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    last = dist.get_rank() == 3
    for placements in ((Shard(0), Shard(1)), (Shard(1), Shard(0)), (Shard(0), Shard(0))):
        training = Training(mesh, [(64, 256), (64, 256)], placements)
        training.set_gradients()
        optimizer = training.optimizer()
        assert_refused(training.optimizer([1, 0] if last else [0, 1]))
        training.train(optimizer, 2)
        training.set_gradients()
        training.sharded[0].grad = None if last else training.sharded[0].grad
        assert_refused(optimizer, "'layer.0'", "zeros_like")
        training.train(optimizer, 2)


def two_meshes(mesh: DeviceMesh, folder: Path) -> None:
    """Shards matrices over each mesh dimension: a difference in one must not block the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    first = dist.get_rank() == 0
    data = Training(mesh["data"], [(64, 32), (64, 32)])
    tensor = Training(mesh["tensor"], [(48, 16), (48, 16)])

    def optimizer_of(data_order: Sequence[int], tensor_order: Sequence[int]) -> StripedAdamW:
        optimizer = data.optimizer(data_order)
        [group] = tensor.optimizer(tensor_order).param_groups
        names = [f"tensor.{i}" for i in tensor_order]
        group = {"params": list(zip(names, group["params"], strict=True))}
        optimizer.add_param_group(group)
        return optimizer

    same, other = (0, 1), (1, 0) if first else (0, 1)
    cases = (((other, same), "layer", (0, 2)), ((same, other), "tensor", (0, 1)))
    for orders, name, others in cases:
        data.set_gradients()
        tensor.set_gradients()
        optimizer = optimizer_of(*orders)
        message = ""
        try:
            optimizer.step()
        except RuntimeError as error:
            message = str(error)
        # a process of the other groups may continue, or learn it from one that exchanges with both
        assert f"'{name}.0'" in message or dist.get_rank() not in others, message
    dist.barrier()


def refused_placements(mesh: DeviceMesh, folder: Path) -> None:
    """Refuses Partial parameters, and local shards whose shapes contradict the placements."""
    summand = DTensor.from_local(torch.ones(64, 32), mesh, [Partial()], run_check=False)
    p = nn.Parameter(summand)
    p.grad = DTensor.from_local(torch.ones(64, 32), mesh, [Partial()], run_check=False)
    with pytest.raises(ValueError, match="Partial"):
        StripedAdamW([p])
    p.requires_grad_(False)
    assert_refused(StripedAdamW([p]), "Partial")

    rows = 4 if mesh.get_rank() == 0 else 2  # torch would give each process three
    uneven = [
        DTensor.from_local(
            torch.ones(rows, 32), mesh, ROWS, run_check=False, shape=(6, 32), stride=(32, 1)
        )
        for _ in range(2)
    ]
    p = nn.Parameter(uneven[0])
    p.grad = uneven[1]
    assert_refused(StripedAdamW([p]), "local shard")


def a_mesh_of_others(mesh: DeviceMesh, folder: Path) -> None:
    """Skips a parameter on a mesh of other processes, and loads the checkpoint that they saved."""
    inner = DeviceMesh("cpu", list(range(mesh.size() - 1)))
    training = Training(inner, [(64, 32)]) if inner.get_coordinate() is not None else None
    p = nn.Parameter(distribute(values((64, 32), 0), inner, ROWS))
    everywhere = nn.Parameter(distribute(values((64, 32), 1), mesh, ROWS))
    optimizer = StripedAdamW([p, everywhere])
    for _ in range(2):
        p.grad = distribute(values((64, 32), 2), inner, ROWS)
        everywhere.grad = distribute(values((64, 32), 3), mesh, ROWS)
        optimizer.step()
    assert (p in optimizer.state) == (training is not None)
    assert everywhere in optimizer.state
    whole = [nn.Parameter(values((64, 32), i)) for i in range(2)]
    for loaded in (
        copy.deepcopy(optimizer.state_dict()),
        trained(StripedAdamW(whole)).state_dict(),
        trained(torch.optim.AdamW(whole)).state_dict(),
    ):
        optimizer.load_state_dict(loaded)
        assert (p in optimizer.state) == (training is not None)
        assert everywhere in optimizer.state


def trained(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Takes one step."""
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def optimizers_in_another_order(mesh: DeviceMesh, folder: Path) -> None:
    """Steps two optimizers of equal shapes in another order in one process."""
    trainings = [Training(mesh, [(64, 32)]) for _ in range(2)]
    optimizers = [
        StripedAdamW([(f"{name}.weight", t.sharded[0])], lr=1e-2)
        for name, t in zip(("encoder", "decoder"), trainings, strict=True)
    ]
    for training, optimizer in zip(trainings, optimizers, strict=True):
        training.train(optimizer, 2)
        training.set_gradients()
    which = 0 if mesh.get_rank() == 0 else 1
    assert_refused(optimizers[which], "encoder.weight", "decoder.weight")
