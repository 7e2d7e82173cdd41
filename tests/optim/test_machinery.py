"""The optimizer with other parts of torch: loss scaling, autocast, distributed checkpoints."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
from optim_checks import FORMATS, assert_same_bits, assert_same_snapshot, parameter, snapshot
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from striped_hf import StripedAdamW
from striped_hf.optim import backends


def small_model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 130), torch.nn.Tanh(), torch.nn.Linear(130, 3))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for t in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_loss_scaling_skips_a_step_that_overflows() -> None:
    """A GradScaler unscales the gradients, and skips the step if they are infinite."""
    p, q = parameter(torch.ones(3, 4)), parameter(torch.ones(3, 4))
    scaled, plain = StripedAdamW([p], lr=0.1), StripedAdamW([q], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (1.0, math.inf, 2.0):
        scaled.zero_grad()
        scaler.scale((p * p * factor).sum()).backward()
        scaler.step(scaled)
        scaler.update()
        if math.isfinite(factor):
            plain.zero_grad()
            (q * q * factor).sum().backward()
            plain.step()
    assert_same_bits(p, q)
    assert float(scaled.state[p]["step"]) == 2
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("flatten", [False, True], ids=["by name", "flattened"])
@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_state_dicts_of_distributed_checkpoints(momentum_dtype: str, flatten: bool) -> None:
    """Loading begins with a step on zero gradients at a learning rate of zero, and is by name."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = small_model(0)
    optimizer = StripedAdamW(model.parameters(), lr=0.01, momentum_dtype=momentum_dtype)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))

    other = small_model(1)
    other.load_state_dict(model.state_dict())
    resumed = StripedAdamW(other.parameters(), lr=0.5, momentum_dtype=momentum_dtype)
    set_optimizer_state_dict(other, resumed, saved, options=options)
    assert_same_snapshot(snapshot(resumed), snapshot(optimizer))
    train(model, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    assert_same_snapshot(snapshot(resumed), snapshot(optimizer))


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_training_under_autocast(momentum_dtype: str) -> None:
    """bf16 autocast keeps fp32 parameters and gradients; the loss falls."""
    model = small_model(0)
    optimizer = StripedAdamW(model.parameters(), lr=0.01, momentum_dtype=momentum_dtype)
    x = torch.randn(64, 6)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(x) - x[:, :3]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_a_named_backend_that_cannot_run_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only ``auto`` falls back. The error comes before any parameter changes."""
    # as if it could not be imported
    monkeypatch.setitem(sys.modules, "striped_hf.optim.backends.triton.backend", None)
    backends.resolve.cache_clear()
    p = parameter(torch.ones(2, 3))
    p.grad = torch.ones(2, 3)
    optimizer = StripedAdamW([p], backend="triton")
    with pytest.raises(RuntimeError, match="triton"):
        optimizer.step()
    assert (p == 1).all()
    backends.resolve.cache_clear()


def test_auto_chooses_a_backend_that_runs() -> None:
    moved = []
    for backend in ("auto", "reference"):
        p = parameter(torch.ones(2, 3))
        p.grad = torch.tensor([[1.0, 2, 3], [-4, 5, 6]])
        StripedAdamW([p], backend=backend, lr=0.1).step()
        moved.append(p.detach())
    torch.testing.assert_close(*moved)


def test_parameters_that_fsdp1_flattens_after_construction() -> None:
    p = parameter(torch.randn(24))
    optimizer = StripedAdamW([("flat", p)])
    p._fsdp_flattened = True  # type: ignore[attr-defined]
    p.grad = torch.randn(24)
    before = p.detach().clone()
    with pytest.raises((ValueError, RuntimeError), match="fully_shard") as caught:
        optimizer.step()
    assert "flat" in str(caught.value)
    assert_same_bits(p, before)


def test_empty_parameters_come_back_from_every_state_dict() -> None:
    shapes = [(0, 5), (5, 0), (0,), (3, 4)]
    for cls in (torch.optim.AdamW, StripedAdamW):
        ps = [parameter(torch.randn(shape)) for shape in shapes]
        source = cls(ps)
        for p in ps:
            p.grad = torch.randn_like(p)
        source.step()
        for momentum_dtype in FORMATS if cls is torch.optim.AdamW else ("float32",):
            target = StripedAdamW(ps, momentum_dtype=momentum_dtype)
            target.load_state_dict(copy.deepcopy(source.state_dict()))
            target.step()
            assert all(float(state["step"]) == 2 for state in target.state.values())
            assert all(value.isfinite().all() for value in target.state[ps[-1]].values())
