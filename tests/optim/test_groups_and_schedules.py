"""StripedAdamW as a torch optimizer: groups, schedulers, closures, missing gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_checks import FORMATS, Follower, assert_same_bits, parameter, parameters
from torch.optim import lr_scheduler as schedulers

import striped_hf.optim
from striped_hf import StripedAdamW


def small_parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    torch.manual_seed(1)
    return [parameter(torch.randn(shape), dtype) for shape in [(6, 10), (10,), (2, 3, 4), ()]]


def give_gradients(ps: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in ps:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


# ---------------------------------------------------------------------------------------------
# construction
# ---------------------------------------------------------------------------------------------


def test_defaults() -> None:
    optimizer = StripedAdamW(small_parameters())
    expected = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 1e-2,
        "maximize": False,
        "momentum_dtype": "float32",
        "blocks": (1, 1),
        "stochastic_rounding": None,
        "master_bits": None,
        "nesterov": False,
        "lagged": False,
    }
    assert optimizer.defaults == expected
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == expected


def test_is_an_optimizer_of_torch() -> None:
    assert issubclass(StripedAdamW, torch.optim.Optimizer)
    assert striped_hf.optim.StripedAdamW is StripedAdamW


def test_only_the_documented_arguments_are_positional() -> None:
    optimizer = StripedAdamW(small_parameters(), 0.1, (0.5, 0.6), 1e-3, 0.2)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (
        0.1,
        (0.5, 0.6),
        1e-3,
        0.2,
    )
    with pytest.raises(TypeError):
        StripedAdamW(small_parameters(), 0.1, (0.5, 0.6), 1e-3, 0.2, True)


def test_no_state_before_the_first_step() -> None:
    """Sharding swaps parameters after the optimizer's construction."""
    ps = small_parameters()
    optimizer = StripedAdamW(ps)
    assert len(optimizer.state) == 0
    swapped = [parameter(torch.randn_like(p)) for p in ps]
    optimizer.param_groups[0]["params"] = swapped
    give_gradients(swapped, 0)
    before = [p.detach().clone() for p in swapped]
    optimizer.step()
    assert all((p != b).all() for p, b in zip(swapped, before, strict=True))
    assert set(optimizer.state) == set(swapped)


# ---------------------------------------------------------------------------------------------
# missing gradients
# ---------------------------------------------------------------------------------------------


def test_a_parameter_without_gradient_is_left_alone() -> None:
    ps = small_parameters()
    optimizer = StripedAdamW(ps, weight_decay=0.5)
    give_gradients(ps, 0)
    ps[0].grad = ps[1].grad = None
    before = [p.detach().clone() for p in ps]
    optimizer.step()
    assert_same_bits(ps[0], before[0])
    assert_same_bits(ps[1], before[1])
    assert ps[0] not in optimizer.state
    assert (ps[2] != before[2]).all()


def test_a_frozen_parameter_is_left_alone_and_wakes() -> None:
    ps = small_parameters()
    ps[0].requires_grad_(False)
    optimizer = StripedAdamW(ps, lr=0.1)
    before = ps[0].detach().clone()
    follower = Follower(optimizer, rtol=4e-6)
    for _ in range(2):
        optimizer.zero_grad()
        sum((p**2).sum() for p in ps).backward()
        follower.step()
    assert_same_bits(ps[0], before)
    assert ps[0] not in optimizer.state
    ps[0].requires_grad_(True)
    optimizer.zero_grad()
    sum((p**2).sum() for p in ps).backward()
    follower.step()
    assert (ps[0] != before).any()
    # each parameter counts its own steps: the late one's bias correction starts at 1
    assert [float(optimizer.state[p]["step"]) for p in ps] == [1, 3, 3, 3]


def test_no_gradient_at_all_is_no_step() -> None:
    optimizer = StripedAdamW(small_parameters())
    before = [p.detach().clone() for p in parameters(optimizer)]
    assert optimizer.step() is None
    for p, b in zip(parameters(optimizer), before, strict=True):
        assert_same_bits(p, b)
    assert len(optimizer.state) == 0


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    ps = small_parameters()
    optimizer = StripedAdamW(ps)
    give_gradients(ps, 0)
    optimizer.zero_grad(set_to_none=set_to_none)
    for p in ps:
        assert p.grad is None if set_to_none else (p.grad == 0).all()


def test_the_step_leaves_autograd_alone() -> None:
    """The parameter stays a leaf, grad mode stays on, and the version counter counts the write."""
    # two of each shape, which a backend may step together
    ps = [*small_parameters(), *small_parameters()]
    optimizer = StripedAdamW(ps)
    give_gradients(ps, 0)
    versions = [p._version for p in ps]
    storages = [p.data_ptr() for p in ps]
    optimizer.step()
    assert torch.is_grad_enabled()
    for p, version, storage in zip(ps, versions, storages, strict=True):
        assert p.is_leaf
        assert p.requires_grad
        assert p.grad_fn is None
        assert p._version > version
        assert p.data_ptr() == storage  # in place: views and tied weights see the step
    for state in optimizer.state.values():
        assert not any(value.requires_grad for value in state.values())


def test_a_backward_pass_through_a_changed_parameter_is_an_error() -> None:
    p = parameter(torch.randn(3, 4))
    optimizer = StripedAdamW([p])
    loss = (p * p * 2).sum()
    p.grad = torch.ones(3, 4)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---------------------------------------------------------------------------------------------
# closures
# ---------------------------------------------------------------------------------------------


def test_closure() -> None:
    """It runs once, before the update, with grad mode on; its loss is returned."""
    ps, others = small_parameters(), small_parameters()
    optimizer, plain = StripedAdamW(ps, lr=0.1), StripedAdamW(others, lr=0.1)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum(((p - 1) ** 2).sum() for p in ps)
        loss.backward()
        return loss

    for _ in range(3):
        expected = sum(((p - 1) ** 2).sum() for p in others)
        plain.zero_grad()
        expected.backward()
        plain.step()
        assert_same_bits(optimizer.step(closure), expected)
    assert calls == [True] * 3
    for p, q in zip(ps, others, strict=True):
        assert_same_bits(p, q)


def test_closure_has_grad_mode_on_inside_no_grad() -> None:
    p = parameter(torch.ones(2, 3))
    optimizer = StripedAdamW([p])

    def closure() -> torch.Tensor:
        loss = (p**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert loss.item() == 6.0
    assert (p != 1).all()


# ---------------------------------------------------------------------------------------------
# groups
# ---------------------------------------------------------------------------------------------


def test_add_param_group_in_the_middle_of_a_run() -> None:
    ps = small_parameters()
    optimizer = StripedAdamW(ps[:2], lr=0.1)
    follower = Follower(optimizer, rtol=4e-6)
    give_gradients(ps, 0)
    follower.step()
    optimizer.add_param_group({"params": ps[2:], "lr": 0.01, "momentum_dtype": "int8"})
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.999)
    for t in range(1, 4):
        give_gradients(ps, t)
        follower.step()
    assert [float(optimizer.state[p]["step"]) for p in ps] == [4, 4, 3, 3]
    assert optimizer.state[ps[2]]["exp_avg"].dtype == torch.int8


def test_a_parameter_in_two_groups_is_an_error() -> None:
    ps = small_parameters()
    with pytest.raises(ValueError, match="more than one parameter group"):
        StripedAdamW([{"params": ps}, {"params": ps[:1]}])
    with pytest.raises(ValueError, match="empty parameter list"):
        StripedAdamW([])


@pytest.mark.parametrize("blocks", [[1, 2], (1, 2)], ids=["list", "tuple"])
def test_blocks_may_come_as_a_list(blocks: Any) -> None:
    """Blocks from a JSON or YAML file are lists."""
    p = parameter(torch.randn(4, 6))
    optimizer = StripedAdamW([{"params": [p], "blocks": blocks}])
    p.grad = torch.randn(4, 6)
    optimizer.step()
    assert optimizer.state[p]["exp_avg_sq_row"].shape == (4, 2)


def test_named_parameters() -> None:
    model = torch.nn.Linear(5, 3)
    optimizer = StripedAdamW(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    model(torch.randn(2, 5)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["param_names"] == ["weight", "bias"]
    again = StripedAdamW(model.named_parameters())
    again.load_state_dict(saved)
    groups = [
        {"params": [("weight", model.weight)], "lr": 0.1},
        {"params": [("bias", model.bias)]},
    ]
    optimizer = StripedAdamW(groups)
    assert [group["param_names"] for group in optimizer.param_groups] == [["weight"], ["bias"]]


@pytest.mark.parametrize("cls", [torch.optim.AdamW, StripedAdamW])
def test_loaded_names_replace_those_of_the_optimizer(cls: type[torch.optim.Optimizer]) -> None:
    """torch documents this. It also holds for a state dict of AdamW."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 3))

    def groups(prefix: str | None) -> list[dict[str, Any]]:
        named = [(f"{prefix}{name}", param) for name, param in model.named_parameters()]
        params = named if prefix is not None else list(model.parameters())
        return [{"params": params[:1]}, {"params": params[1:]}]

    saver = cls(groups("saved."))
    model(torch.randn(2, 5)).sum().backward()
    saver.step()
    saved = saver.state_dict()
    names = [["saved.0.weight"], ["saved.0.bias", "saved.1.weight", "saved.1.bias"]]
    loaders = {None: names, "saved.": names}
    if cls is StripedAdamW:  # a state dict of AdamW's is matched by name
        loaders["other."] = names
    for prefix, expected in loaders.items():
        optimizer = StripedAdamW(groups(prefix))
        optimizer.load_state_dict(saved)
        assert [group["param_names"] for group in optimizer.param_groups] == expected
        again = optimizer.state_dict()["param_groups"]
        assert [group["param_names"] for group in again] == expected

    # the optimizer's names stay if the state dict has none
    unnamed = cls(groups(None))
    unnamed.step()
    named = StripedAdamW(groups("kept."))
    named.load_state_dict(unnamed.state_dict())
    assert named.param_groups[0]["param_names"] == ["kept.0.weight"]

    # names of other parameters than the group's are an error
    saved["param_groups"][1]["param_names"].pop()
    with pytest.raises(ValueError, match="2 param_names for 3 parameters"):
        StripedAdamW(groups(None)).load_state_dict(saved)


def test_settings_changed_between_steps_take_effect() -> None:
    ps = small_parameters()
    optimizer = StripedAdamW(ps, lr=0.1)
    follower = Follower(optimizer, rtol=4e-6)
    changes: list[dict[str, Any]] = [
        {"lr": 0.01},
        {"betas": (0.8, 0.9)},
        {"eps": 0.1},
        {"weight_decay": 0.7},
        {"maximize": True},
        {"nesterov": True},
        {"lr": 0.0},
    ]
    for t, change in enumerate(changes):
        optimizer.param_groups[0].update(change)
        if "betas" in change:  # averages with other betas have another history: start again
            follower = Follower(optimizer, rtol=4e-6)
            optimizer.state.clear()
        give_gradients(ps, t)
        follower.step()


# ---------------------------------------------------------------------------------------------
# learning rates
# ---------------------------------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda t: 1 / (1 + t)),
    "StepLR": lambda o: schedulers.StepLR(o, 2, 0.1),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 8),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, 1.0, 4),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.7),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.01, 1.0, 3), schedulers.CosineAnnealingLR(o, 5)], [3]
    ),
    # these two schedulers also change beta1
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=10),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1, factor=0.3),
}


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_a_scheduler_equals_rates_set_by_hand(make: Callable[..., Any]) -> None:
    ps, by_hand = small_parameters(), small_parameters()
    optimizer = StripedAdamW(
        [{"params": ps[:2], "lr": 0.1}, {"params": ps[2:], "lr": 0.02, "momentum_dtype": "int8"}]
    )
    scheduler = make(optimizer)
    history = []
    for t in range(8):
        give_gradients(ps, t)
        history.append([(group["lr"], group["betas"]) for group in optimizer.param_groups])
        optimizer.step()
        if isinstance(scheduler, schedulers.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
    assert len({rates[0] for rates in history}) > 1

    groups = [{"params": by_hand[:2]}, {"params": by_hand[2:], "momentum_dtype": "int8"}]
    plain = StripedAdamW(groups)
    for t, rates in enumerate(history):
        give_gradients(by_hand, t)
        for group, (lr, betas) in zip(plain.param_groups, rates, strict=True):
            group["lr"], group["betas"] = lr, betas
        plain.step()
    for p, q in zip(ps, by_hand, strict=True):
        assert_same_bits(p, q)


@pytest.mark.parametrize("momentum_dtype", FORMATS)
@pytest.mark.parametrize("value", [torch.tensor(0.05), torch.tensor([0.05])], ids=["0-D", "1-D"])
def test_a_tensor_learning_rate_equals_its_number(value: torch.Tensor, momentum_dtype: str) -> None:
    ps, others = small_parameters(), small_parameters()
    one = StripedAdamW(ps, lr=value.clone(), momentum_dtype=momentum_dtype)
    other = StripedAdamW(others, lr=value.item(), momentum_dtype=momentum_dtype)
    for t in range(3):
        give_gradients(ps, t)
        give_gradients(others, t)
        one.step()
        other.step()
        one.param_groups[0]["lr"].mul_(0.5)
        other.param_groups[0]["lr"] *= 0.5
    for p, q in zip(ps, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
