"""Sharded convolutions and stacks of matrices: one function per case, which every process calls."""

from __future__ import annotations

from pathlib import Path

import torch
from sharded_model import Follower, gathered
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from striped_hf import StripedAdamW
from striped_hf.optim import adamw_state_dict

MOMENTUM_DTYPES = ("float32", "bfloat16", "int8", "int4")


class Convolutions(nn.Module):
    """Convolutions with rows that no process count divides, or fewer rows than processes."""

    def __init__(self) -> None:
        super().__init__()
        self.regular = nn.Conv2d(6, 7, 3)
        self.pointwise = nn.Conv2d(6, 4, 1)
        self.depthwise = nn.Conv1d(13, 13, 5, groups=13)
        self.one_output = nn.Conv2d(6, 1, 3)
        self.scale = nn.Parameter(torch.randn(5, 1, 1))
        self.stack = nn.Parameter(torch.randn(3, 16, 20))


def new_model() -> Convolutions:
    torch.manual_seed(0)
    return Convolutions()


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        grad = torch.randn(p.shape, generator=generator)
        if isinstance(p, DTensor):
            grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
        p.grad = grad


def by_rows(mesh: DeviceMesh, folder: Path) -> None:
    """Shards as ``fully_shard`` does by default."""
    for momentum_dtype in MOMENTUM_DTYPES:
        model = fully_shard(new_model(), mesh=mesh)
        follow(model, momentum_dtype)


def by_inputs(mesh: DeviceMesh, folder: Path) -> None:
    """Shards another dimension than the first: a part of it is not one range of columns."""
    for momentum_dtype in MOMENTUM_DTYPES:
        for dim in (1, 2):
            model = new_model()
            for module in (model.regular, model.depthwise):
                placed = distribute_tensor(module.weight.detach(), mesh, [Shard(dim)])
                module.weight = nn.Parameter(placed)
            follow(model, momentum_dtype)


def follow(model: nn.Module, momentum_dtype: str) -> None:
    optimizer = StripedAdamW(model.parameters(), lr=1e-2, momentum_dtype=momentum_dtype)
    follower = Follower(model, optimizer)
    for seed in range(3):
        set_gradients(model, seed)
        follower.step()


def state_dicts(mesh: DeviceMesh, folder: Path) -> None:
    """Exchanges state dicts between sharded and whole: AdamW's, one of stacks, and an export."""
    for momentum_dtype in MOMENTUM_DTYPES:
        whole, sharded = new_model(), fully_shard(new_model(), mesh=mesh)
        adamw = torch.optim.AdamW(whole.parameters())
        set_gradients(whole, 0)
        adamw.step()
        ours, theirs = (
            StripedAdamW(model.parameters(), momentum_dtype=momentum_dtype)
            for model in (sharded, whole)
        )
        ours.load_state_dict(adamw.state_dict())
        theirs.load_state_dict(adamw.state_dict())
        assert_same(ours, theirs)

        stacks = StripedAdamW(whole.parameters(), momentum_dtype=momentum_dtype, blocks="stack")
        set_gradients(whole, 1)
        stacks.step()
        ours.load_state_dict(stacks.state_dict())
        theirs.load_state_dict(stacks.state_dict())
        assert_same(ours, theirs)

        kept = fully_shard(new_model(), mesh=mesh)
        of_stacks = StripedAdamW(kept.parameters(), momentum_dtype=momentum_dtype, blocks="stack")
        of_stacks.load_state_dict(stacks.state_dict())
        ours.load_state_dict(of_stacks.state_dict())
        assert_same(ours, theirs)

        sharded_adamw = torch.optim.AdamW(sharded.parameters())
        sharded_adamw.load_state_dict(adamw_state_dict(ours))
        ours.load_state_dict(sharded_adamw.state_dict())
        theirs.load_state_dict(adamw_state_dict(theirs))
        assert_same(ours, theirs)


def assert_same(ours: StripedAdamW, theirs: StripedAdamW) -> None:
    for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        for key, value in theirs.state[q].items():
            torch.testing.assert_close(gathered(ours.state[p][key]), value, msg=key)
