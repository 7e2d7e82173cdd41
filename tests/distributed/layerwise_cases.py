"""LayerwiseStripedAdamW under FSDP2: one function per case, which every process of a mesh calls.

All processes train on the same batches, so that the mean gradient is that of one process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sharded_model import ROUNDING, assert_near, gathered
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from striped_hf import losses
from striped_hf.optim import LayerwiseStripedAdamW, StripedAdamW
from striped_hf.optim.momentum import MOMENTUM_DTYPES


class Model(nn.Module):
    """A model with matrices whose gradients are freed, one packed, with uneven shards of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Linear(256, 513), nn.Linear(513, 256), nn.Linear(256, 3 * 259)]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


def new_model(mesh: DeviceMesh | None = None) -> Model:
    torch.manual_seed(0)
    model = Model()
    if mesh is None:
        return model
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def new_optimizer(
    model: Model, cls: type[StripedAdamW] = LayerwiseStripedAdamW, **options: Any
) -> Any:
    packed = model.layers[-1].weight
    others = [p for p in model.parameters() if p is not packed]
    groups = [{"params": [packed], "blocks": (3, 1)}, {"params": others}]
    return cls(groups, lr=1e-2, **options)


def backward(model: Model, step: int, part: int = 0, parts: int = 1) -> None:
    generator = torch.Generator().manual_seed(10 * step + part)
    x = torch.randn(16, 256, generator=generator).to(model.layers[0].weight.dtype)
    (model(x) / parts).backward()


def train(model: Model, optimizer: Any, steps: range, parts: int = 1) -> list[float]:
    """Trains; returns the norms of the gradients before clipping."""
    norms = []
    for step in steps:
        for part in range(parts):
            backward(model, step, part, parts)
        if isinstance(optimizer, LayerwiseStripedAdamW):
            assert all(p.grad is None for p in model.parameters() if p.dim() == 2)
            norms.append(optimizer.grad_norm().item())
        else:
            grads = [p.grad for p in model.parameters()]
            norms.append(nn.utils.get_total_norm(grads).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms


def assert_same_model(actual: Model, expected: Model, tolerance: float) -> None:
    for (name, p), q in zip(actual.named_parameters(), expected.parameters(), strict=True):
        assert isinstance(p, DTensor)
        assert_near(gathered(p), gathered(q), tolerance, name)


def float32_momentum(mesh: DeviceMesh, folder: Path) -> None:
    """Compares with one process and the ordinary optimizer; uneven shards, a packed matrix."""
    for backend in ("reference", "cpu"):
        whole, model = new_model(), new_model(mesh)
        ordinary = new_optimizer(whole, StripedAdamW, backend=backend)
        expected = train(whole, ordinary, range(4))
        norms = train(model, new_optimizer(model, backend=backend), range(4))
        torch.testing.assert_close(norms, expected, rtol=1e-5, atol=0)
        assert_same_model(model, whole, 2 * ROUNDING)  # over four steps


def every_format(mesh: DeviceMesh, folder: Path) -> None:
    """Compares the state after one step with the ordinary optimizer's, code by code."""
    for momentum_dtype in MOMENTUM_DTYPES:
        states = []
        for cls in (StripedAdamW, LayerwiseStripedAdamW):
            model = new_model(mesh)
            optimizer = new_optimizer(model, cls, momentum_dtype=momentum_dtype)
            train(model, optimizer, range(1))
            states.append([optimizer.state[p] for p in model.parameters()])
        for ordinary, layerwise in zip(*states, strict=True):
            assert layerwise.keys() == ordinary.keys()
            for key, value in ordinary.items():
                assert torch.equal(gathered(layerwise[key]), gathered(value)), key


def master_bits(mesh: DeviceMesh, folder: Path) -> None:
    """Keeps 8 more bits of bfloat16 parameters; the steps equal the ordinary optimizer's."""
    snapshots = []
    for cls in (StripedAdamW, LayerwiseStripedAdamW):
        model = new_model(mesh).bfloat16()
        optimizer = new_optimizer(model, cls, master_bits=24)
        train(model, optimizer, range(3))
        tensors = [(p, optimizer.state[p]["param_low_bits"]) for p in model.parameters()]
        snapshots.append([gathered(x) for pair in tensors for x in pair])
    assert torch.int8 in {x.dtype for x in snapshots[0]}
    for ordinary, layerwise in zip(*snapshots, strict=True):
        assert torch.equal(layerwise, ordinary)


def accumulation(mesh: DeviceMesh, folder: Path) -> None:
    """Runs several passes before a step, reduced after each pass or only after the last."""
    whole = new_model()
    ordinary = new_optimizer(whole, StripedAdamW)
    expected = train(whole, ordinary, range(1), parts=4)
    for momentum_dtype in ("float32", "int4"):
        model = new_model(mesh)
        options = {"momentum_dtype": momentum_dtype, "gradient_accumulation": True}
        optimizer = new_optimizer(model, **options)
        norms = train(model, optimizer, range(1), parts=4)
        # an estimate, from 5,000 squares: sqrt(2 / 5000) / 2 is 1%, and this four times that
        torch.testing.assert_close(norms, expected, rtol=0.04, atol=0)
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            if p.dim() == 2 and momentum_dtype == "float32":
                m, exact = optimizer.state[p]["exp_avg"], ordinary.state[q]["exp_avg"]
                assert_near(gathered(m), exact, 1e-5, "exp_avg")

    model = new_model(mesh)
    optimizer = new_optimizer(model)
    for part in range(4):
        model.set_requires_gradient_sync(part == 3)
        for layer in model.layers:
            layer.set_requires_gradient_sync(part == 3)
        backward(model, 0, part, 4)
    # only one gradient has arrived: the sum of all passes
    torch.testing.assert_close([optimizer.grad_norm().item()], expected, rtol=1e-5, atol=0)
    optimizer.step()
    assert_same_model(model, whole, ROUNDING)


def clipping(mesh: DeviceMesh, folder: Path) -> None:
    """Clips in all processes by the norm of the whole gradient."""
    whole, model = new_model(), new_model(mesh)
    ordinary = new_optimizer(whole, StripedAdamW, eps=1e-3)
    optimizer = new_optimizer(model, eps=1e-3, max_grad_norm=1e-3)
    backward(whole, 0)
    norm = nn.utils.clip_grad_norm_(whole.parameters(), 1e-3).item()
    assert norm > 3e-3
    ordinary.step()
    norms = train(model, optimizer, range(1))
    torch.testing.assert_close(norms, [norm], rtol=1e-5, atol=0)
    assert_same_model(model, whole, 2 * ROUNDING)


def loss_in_chunks(mesh: DeviceMesh, folder: Path) -> None:
    """The output layer's gradient is of the gathered weight: it arrives as a whole."""
    losses._CHUNK_LOGITS = 16 * 100
    torch.manual_seed(0)
    hidden, labels = torch.randn(16, 256), torch.randint(513, (16,))
    heads = []
    for is_sharded in (False, True):
        torch.manual_seed(1)
        head = nn.Linear(256, 513, bias=False)
        if is_sharded:
            fully_shard(head, mesh=mesh)
        optimizer = LayerwiseStripedAdamW(head.parameters(), lr=1e-2)
        for _ in range(2):
            weight = losses.whole_weight(head)
            losses.linear_cross_entropy(hidden, weight, labels, untied=True).backward()
            # whole parameters of several processes keep their gradients
            assert (head.weight.grad is None) == is_sharded
            optimizer.step()
            optimizer.zero_grad()
        heads.append(head)
    whole, sharded = (head.weight for head in heads)
    assert isinstance(sharded, DTensor)
    assert_near(gathered(sharded), gathered(whole), 4 * ROUNDING, "weight")


def resuming(mesh: DeviceMesh, folder: Path) -> None:
    """Resumes from torch's sharded state dicts, to the bit."""
    options = {"momentum_dtype": "int8", "max_grad_norm": 0.01}
    whole = new_model(mesh)
    train(whole, new_optimizer(whole, **options), range(4))
    model = new_model(mesh)
    optimizer = new_optimizer(model, **options)
    train(model, optimizer, range(2))
    saved = get_optimizer_state_dict(model, optimizer)
    resumed = new_optimizer(model, **options)
    set_optimizer_state_dict(model, resumed, saved)
    optimizer.remove_hooks()
    train(model, resumed, range(2, 4))
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(gathered(p), gathered(q))
