"""Parameters that AdamW accepts but never steps, and steps without values."""

from __future__ import annotations

from collections import UserList
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from optim_checks import FORMATS, assert_same_bits, parameter
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from striped_hf import StripedAdamW

FROZEN: dict[str, Callable[[], torch.Tensor]] = {
    "uint8": lambda: torch.zeros(70, 1, dtype=torch.uint8),
    "int32": lambda: torch.zeros(5, 7, dtype=torch.int32),
    "bool": lambda: torch.ones(3, dtype=torch.bool),
    "float8": lambda: torch.ones(4, 5).to(torch.float8_e4m3fn),
    "float64": lambda: torch.ones(4, 5, dtype=torch.float64),
    "complex64": lambda: torch.ones(4, 5, dtype=torch.complex64),
}


@pytest.mark.parametrize("kind", FROZEN)
@pytest.mark.parametrize("blocks", [(1, 1), (1, 3)], ids=str)
def test_frozen_parameters_are_left_alone(kind: str, blocks: tuple[int, int]) -> None:
    frozen, trained = nn.Parameter(FROZEN[kind](), requires_grad=False), parameter(torch.ones(2, 6))
    optimizer = StripedAdamW([("frozen", frozen), ("trained", trained)], blocks=blocks)
    before = frozen.detach().clone()
    trained.grad = torch.ones(2, 6)
    optimizer.step()
    assert torch.equal(frozen, before)
    assert frozen not in optimizer.state
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()


def test_a_frozen_parameter_is_checked_at_its_first_gradient() -> None:
    frozen = nn.Parameter(torch.ones(4, 6, dtype=torch.float64), requires_grad=False)
    optimizer = StripedAdamW([("thawed", frozen)])
    frozen.requires_grad_(True)
    frozen.grad = torch.ones(4, 6, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"thawed.*float64.*float32"):
        optimizer.step()
    frozen.grad = None
    frozen.data = frozen.data.float()
    frozen.grad = torch.ones(4, 6)
    optimizer.step()
    assert (frozen < 1).all()


def lazy_model() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.LazyConv1d(4, 1), nn.LazyLinear(1))


def test_lazy_parameters_are_checked_when_they_are_initialized() -> None:
    torch.manual_seed(0)
    model = lazy_model()
    optimizer = StripedAdamW(model.named_parameters(), lr=1e-2)
    assert not optimizer.state
    optimizer.load_state_dict(optimizer.state_dict())
    losses = []
    x = torch.randn(8, 3, 5)
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert optimizer.state[model[0].weight]["exp_avg_sq_col"].shape == (1, 5)


def test_blocks_of_a_lazy_parameter_are_checked_at_its_first_gradient() -> None:
    model = nn.LazyLinear(6)
    optimizer = StripedAdamW(model.named_parameters(), blocks=(1, 3))
    model(torch.randn(2, 5)).sum().backward()
    with pytest.raises(RuntimeError, match=r"weight.*\(6, 5\).*blocks=\(1, 3\)"):
        optimizer.step()


PAIRS: dict[str, Any] = {
    "list": [0.5, 0.75],
    "user list": UserList([0.5, 0.75]),
    "array": np.array([0.5, 0.75]),
    "array of float32": np.array([0.5, 0.75], dtype=np.float32),
    "tensor": torch.tensor([0.5, 0.75]),
    "tensors": (torch.tensor(0.5), torch.tensor(0.75)),
}


@pytest.mark.parametrize("betas", PAIRS.values(), ids=PAIRS)
def test_betas_may_be_any_sequence_of_two_numbers(betas: Any) -> None:
    moved = []
    for given in ((0.5, 0.75), betas):
        p = parameter(torch.ones(3, 5))
        optimizer = StripedAdamW([{"params": [p], "betas": given}], betas=given)
        assert optimizer.state_dict()["param_groups"][0]["betas"] == (0.5, 0.75)
        for t in range(2):
            p.grad = torch.full((3, 5), t + 0.5)
            optimizer.step()
        moved.append(p)
    assert_same_bits(*moved)


@pytest.mark.parametrize("betas", ["01", {0.5: 1, 0.6: 2}, np.array([[0.5], [0.6]]), [None, 0.5]])
def test_betas_that_are_not_two_numbers_are_an_error(betas: Any) -> None:
    with pytest.raises(ValueError, match="betas"):
        StripedAdamW([parameter(torch.ones(2))], betas=betas)


def train(momentum_dtype: str, dtype: torch.dtype, device: str, **settings: Any) -> StripedAdamW:
    kind: Any = {"device": device, "dtype": dtype}
    layers = [nn.Linear(130, 64, **kind), nn.LayerNorm(64, **kind), nn.Linear(64, 3, **kind)]
    model = nn.Sequential(*layers)
    optimizer = StripedAdamW(model.parameters(), momentum_dtype=momentum_dtype, **settings)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 130, **kind)).sum().backward()
        optimizer.step()
    return optimizer


def shapes_of_state(optimizer: StripedAdamW) -> list[Any]:
    return [
        {key: (value.shape, value.dtype) for key, value in state.items()}
        for state in optimizer.state.values()
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"lagged": True, "nesterov": True}], ids=str)
@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_steps_without_values(
    momentum_dtype: str, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    """Memory estimators take such steps: the state has the shapes and dtypes of a real one."""
    real = train(momentum_dtype, dtype, "cpu", **settings)
    meta = train(momentum_dtype, dtype, "meta", **settings)
    with FakeTensorMode():
        fake = train(momentum_dtype, dtype, "cpu", **settings)
        assert shapes_of_state(fake) == shapes_of_state(real)
    assert shapes_of_state(meta) == shapes_of_state(real)
    assert all(value.is_meta for state in meta.state.values() for value in state.values())
