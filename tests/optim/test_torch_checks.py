"""The checks of torch's test suite for any optimizer, written again from their purpose."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from optim_checks import FORMATS, assert_same_bits, assert_same_snapshot, parameter, snapshot
from torch.optim import lr_scheduler as schedulers

from striped_hf import StripedAdamW

INPUTS: dict[str, dict[str, Any]] = {
    "default": {},
    "lr": {"lr": 0.01},
    "tensor lr": {"lr": torch.tensor(0.01)},
    "weight decay": {"weight_decay": 0.1},
    "maximize": {"weight_decay": 0.1, "maximize": True},
    "nesterov": {"nesterov": True},
    "bfloat16": {"momentum_dtype": "bfloat16"},
    "int8": {"momentum_dtype": "int8"},
    "int4": {"momentum_dtype": "int4"},
}

every_input = pytest.mark.parametrize("kwargs", INPUTS.values(), ids=INPUTS)


def make(ps: Any, kwargs: dict[str, Any]) -> StripedAdamW:
    return StripedAdamW(ps, **copy.deepcopy(kwargs))


# ---------------------------------------------------------------------------------------------
# the loss falls
# ---------------------------------------------------------------------------------------------

SCHEDULES = {
    "constant": lambda o: [],
    "StepLR": lambda o: [schedulers.StepLR(o, gamma=0.9, step_size=10)],
    "LinearLR and ExponentialLR": lambda o: [
        schedulers.LinearLR(o, start_factor=0.4, total_iters=4),
        schedulers.ExponentialLR(o, gamma=0.99),
    ],
    "PolynomialLR and ReduceLROnPlateau": lambda o: [
        schedulers.PolynomialLR(o, power=0.9, total_iters=40),
        schedulers.ReduceLROnPlateau(o),
    ],
}


@every_input
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_goes_in_the_right_direction(
    contiguous: bool, schedule: Any, kwargs: dict[str, Any]
) -> None:
    if contiguous:
        weight, bias = parameter(torch.randn(10, 5)), parameter(torch.randn(10))
    else:
        weight = torch.nn.Parameter(torch.randn(10, 5, 2)[..., 0])
        bias = torch.nn.Parameter(torch.randn(10, 2)[..., 0])
    x = torch.randn(5)
    groups = [{"params": [weight]}, {"params": [bias], "lr": torch.tensor(0.01)}]
    optimizer = make(groups, kwargs)
    running = schedule(optimizer)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).pow(2).sum()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(20):
        loss = optimizer.step(closure)
        for one in running:
            if isinstance(one, schedulers.ReduceLROnPlateau):
                one.step(loss.item())
            else:
                one.step()
    last = closure().item()
    assert last > first if kwargs.get("maximize") else last < first


def test_groups_with_a_learning_rate_of_zero_do_not_move() -> None:
    still, moving = parameter(torch.randn(10, 5)), parameter(torch.randn(10, 5))
    before = still.detach().clone()
    optimizer = StripedAdamW([{"params": [still], "lr": 0.0}, {"params": [moving]}], lr=0.01)
    start = moving.detach().norm()
    for _ in range(20):
        optimizer.zero_grad()
        (still.pow(2) + moving.pow(2)).sum().backward()
        optimizer.step()
    assert_same_bits(still, before)
    assert moving.norm() < start


# ---------------------------------------------------------------------------------------------
# steps that do nothing
# ---------------------------------------------------------------------------------------------


@every_input
def test_step_is_noop_when_params_have_no_grad(kwargs: dict[str, Any]) -> None:
    ps = [parameter(torch.randn(2, 3), requires_grad=False) for _ in range(2)]
    before = [p.detach().clone() for p in ps]
    make(ps, kwargs).step()
    for p, b in zip(ps, before, strict=True):
        assert_same_bits(p, b)


@every_input
def test_step_is_noop_for_zero_grads(kwargs: dict[str, Any]) -> None:
    ps = [parameter(torch.randn(shape)) for shape in [(5, 1), (5,), (4, 6)]]
    before = [p.detach().clone() for p in ps]
    optimizer = make(ps, {**kwargs, "weight_decay": 0.0})
    for _ in range(3):
        for p in ps:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for p, b in zip(ps, before, strict=True):
        assert_same_bits(p, b)
    assert all(float(state["step"]) == 3 for state in optimizer.state.values())


@every_input
def test_step_is_noop_for_empty_tensors(kwargs: dict[str, Any]) -> None:
    empty, other = parameter(torch.empty(0, 5)), parameter(torch.randn(3, 5))
    optimizer = make([empty, other], kwargs)
    before = other.detach().clone()
    for _ in range(2):
        empty.grad, other.grad = torch.empty(0, 5), torch.randn(3, 5)
        optimizer.step()
    assert empty.shape == (0, 5)
    assert (other != before).any()


# ---------------------------------------------------------------------------------------------
# state dicts
# ---------------------------------------------------------------------------------------------


def a_run(kwargs: dict[str, Any], seed: int = 0) -> tuple[list[Any], StripedAdamW, Any]:
    torch.manual_seed(seed)
    weight, bias, x = parameter(torch.randn(2, 3)), parameter(torch.randn(2)), torch.randn(3)
    optimizer = make([weight, bias], kwargs)

    def forward_and_backward() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).pow(2).sum()
        loss.backward()
        return loss

    return [weight, bias], optimizer, forward_and_backward


@every_input
def test_state_dict_is_deterministic(kwargs: dict[str, Any]) -> None:
    """A copy of the parameters with the loaded state takes the same steps."""
    ps, optimizer, closure = a_run(kwargs)
    for _ in range(3):
        optimizer.step(closure)
    others, again, other_closure = a_run(kwargs)
    with torch.no_grad():
        for p, q in zip(ps, others, strict=True):
            q.copy_(p)
    saved = copy.deepcopy(optimizer.state_dict())
    again.load_state_dict(saved)
    # the order of the parameters is by group, not the order of the dict
    assert again.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    for _ in range(3):
        optimizer.step(closure)
        again.step(other_closure)
        for p, q in zip(ps, others, strict=True):
            assert_same_bits(p, q)
    assert_same_snapshot(snapshot(optimizer), snapshot(again))


@every_input
@pytest.mark.parametrize("number", [float, int])
def test_can_load_a_step_that_is_a_number(number: type, kwargs: dict[str, Any]) -> None:
    """AdamW's state dicts from torch before 1.12 have such steps."""
    ps, optimizer, closure = a_run(kwargs)
    for _ in range(2):
        optimizer.step(closure)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = number(state["step"].item())
    optimizer.load_state_dict(saved)
    optimizer.step(closure)
    for p in ps:
        assert torch.is_tensor(optimizer.state[p]["step"])
        assert float(optimizer.state[p]["step"]) == 3


@every_input
def test_save_load_equality_with_weights_only(kwargs: dict[str, Any]) -> None:
    _, optimizer, closure = a_run(kwargs)
    for _ in range(3):
        optimizer.step(closure)
    saved = optimizer.state_dict()
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded["param_groups"] == saved["param_groups"]
    for index, state in saved["state"].items():
        assert state.keys() == loaded["state"][index].keys()
        for key, value in state.items():
            assert_same_bits(loaded["state"][index][key], value, key)


# ---------------------------------------------------------------------------------------------
# the object
# ---------------------------------------------------------------------------------------------


@every_input
def test_deepcopy_copies_all_public_attributes(kwargs: dict[str, Any]) -> None:
    optimizer = make([parameter(torch.randn(2, 3))], kwargs)
    copied = copy.deepcopy(optimizer)

    def public(o: Any) -> set[str]:
        return {name for name in dir(o) if not name.startswith("_")}

    assert public(copied) == public(optimizer)
    for name in public(optimizer):
        value = getattr(optimizer, name)
        if isinstance(value, str | int | float | tuple | type(None)):
            assert getattr(copied, name) == value


@every_input
def test_no_state_is_left_empty(kwargs: dict[str, Any]) -> None:
    ps, optimizer, closure = a_run(kwargs)
    optimizer.step(closure)
    assert all(optimizer.state[p] for p in ps)


@every_input
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_default_dtype_has_no_effect(dtype: torch.dtype, kwargs: dict[str, Any]) -> None:
    """The default dtype is often another one while models are built and stepped."""
    before = torch.get_default_dtype()
    results = []
    for default in (before, dtype):
        _, optimizer, closure = a_run(kwargs)
        torch.set_default_dtype(default)
        try:
            for _ in range(3):
                optimizer.step(closure)
        finally:
            torch.set_default_dtype(before)
        results.append(snapshot(optimizer))
    assert_same_snapshot(results[1], results[0])


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_mixed_dtypes_in_one_group(device: str, momentum_dtype: str) -> None:
    """Each parameter steps as in a separate optimizer."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.bfloat16]
    values = [torch.randn(4, 130) for _ in dtypes]
    grads = [[torch.randn(4, 130) for _ in dtypes] for _ in range(3)]
    mixed = [parameter(v, dtype, device=device) for v, dtype in zip(values, dtypes, strict=True)]
    optimizer = StripedAdamW(mixed, lr=0.1, momentum_dtype=momentum_dtype)
    for at_step in grads:
        for p, g in zip(mixed, at_step, strict=True):
            p.grad = g.to(device, p.dtype)
        optimizer.step()
    for i, dtype in enumerate(dtypes):
        alone = parameter(values[i], dtype, device=device)
        optimizer = StripedAdamW([alone], lr=0.1, momentum_dtype=momentum_dtype)
        for at_step in grads:
            alone.grad = at_step[i].to(device, dtype)
            optimizer.step()
        assert_same_bits(mixed[i], alone)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_a_state_dict_of_the_cpu_loads_on_a_gpu(momentum_dtype: str) -> None:
    """Everything follows the parameter's device but ``step``, which stays on the CPU."""
    p = parameter(torch.randn(4, 130))
    source = StripedAdamW([p], lr=0.1, momentum_dtype=momentum_dtype)
    p.grad = torch.randn(4, 130)
    source.step()
    q = parameter(p.detach(), device="cuda")
    target = StripedAdamW([q], momentum_dtype=momentum_dtype)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    for key, value in source.state[p].items():
        loaded = target.state[q][key]
        assert loaded.device.type == ("cpu" if key == "step" else "cuda")
        assert_same_bits(loaded.cpu(), value, key)
    p.grad = torch.randn(4, 130)
    q.grad = p.grad.cuda()
    source.step()
    target.step()
    torch.testing.assert_close(q.detach().cpu(), p.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_parameters_on_two_devices_in_one_group() -> None:
    ps = [parameter(torch.ones(3, 4), device=device) for device in ("cpu", "cuda", "cpu", "cuda")]
    optimizer = StripedAdamW(ps, lr=0.1)
    g = torch.randn(3, 4)
    for p in ps:
        p.grad = g.to(p.device)
    optimizer.step()
    for p in ps[1:]:
        torch.testing.assert_close(p.detach().cpu(), ps[0].detach(), rtol=1e-6, atol=1e-6)
