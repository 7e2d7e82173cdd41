"""A run that began with ``torch.optim.AdamW`` continues with StripedAdamW."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_checks import (
    CODED,
    FORMATS,
    assert_same_bits,
    assert_same_snapshot,
    code_bound,
    expected_format,
    parameter,
    parameters,
    snapshot,
    stored_momentum,
    to_numpy,
)
from torch.nn import functional

from striped_hf import StripedAdamW

ERRORS = (ValueError, RuntimeError)
GROUP_KEYS = {
    "params",
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "maximize",
    "momentum_dtype",
    "blocks",
    "stochastic_rounding",
    "master_bits",
    "nesterov",
    "lagged",
}
SHAPES = [(6, 10), (10,), (2, 3, 4), (), (4, 1), (5, 131)]


def make_parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Any]:
    return [parameter(torch.randn(shape), dtype) for shape in shapes]


def adamw_after(ps: list[Any], steps: int = 3, **settings: Any) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(ps, **settings)
    for _ in range(steps):
        for p in parameters(optimizer):
            p.grad = torch.randn_like(p) * 10 ** torch.randn(p.shape).to(p.dtype)
        optimizer.step()
    return optimizer


def assert_converted(
    state: dict[str, Any], adamw: dict[str, Any], blocks: tuple[int, int], momentum_dtype: str
) -> None:
    """The stripes are the block means of the second moment; the momentum is AdamW's, in codes."""
    m, v = adamw["exp_avg"].double(), adamw["exp_avg_sq"].double()
    assert_same_bits(state["step"], adamw["step"])
    if m.ndim < 2:
        assert set(state) - {"param_low_bits"} == {"step", "exp_avg", "exp_avg_sq"}
        assert_same_bits(state["exp_avg_sq"], adamw["exp_avg_sq"].float())
        assert_same_bits(state["exp_avg"], adamw["exp_avg"].float())
        return
    *batch, R, C = v.shape
    br, bc = blocks
    row = v.reshape(*batch, R, bc, C // bc).mean(-1)
    col = v.reshape(*batch, br, R // br, C).mean(-2)
    assert "exp_avg_sq" not in state
    torch.testing.assert_close(state["exp_avg_sq_row"], row.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(state["exp_avg_sq_col"], col.float(), rtol=1e-6, atol=0)
    stored, name = stored_momentum(state, C)
    assert name == expected_format(v.shape, momentum_dtype)
    error = abs(stored - to_numpy(m))
    if name in CODED:
        assert (error <= code_bound(to_numpy(m), name)).all()
    else:
        expected = adamw["exp_avg"].to(torch.bfloat16 if name == "bfloat16" else torch.float32)
        assert_same_bits(state["exp_avg"], expected)


@pytest.mark.parametrize("momentum_dtype", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_groups(dtype: torch.dtype, momentum_dtype: str, tmp_path: Path) -> None:
    """Through a file, into the same groups: settings, stripes, coded momentum, step."""
    ps = make_parameters(SHAPES, dtype)
    groups = [{"params": ps[:3], "weight_decay": 0.3}, {"params": ps[3:]}]
    adamw = adamw_after(groups, lr=0.07, betas=(0.8, 0.95), eps=1e-6)
    torch.save(adamw.state_dict(), tmp_path / "optimizer.pt")
    saved = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    kept = copy.deepcopy(saved)

    groups = [{"params": ps[:3]}, {"params": ps[3:]}]
    optimizer = StripedAdamW(groups, momentum_dtype=momentum_dtype)
    optimizer.load_state_dict(saved)
    for p in ps:
        assert_converted(optimizer.state[p], adamw.state[p], (1, 1), momentum_dtype)
    for group, weight_decay in zip(optimizer.param_groups, (0.3, 0.01), strict=True):
        assert (group["lr"], group["betas"], group["eps"]) == (0.07, (0.8, 0.95), 1e-6)
        assert group["weight_decay"] == weight_decay
        assert group["momentum_dtype"] == momentum_dtype
        assert group["blocks"] == (1, 1)
        assert set(group) == GROUP_KEYS  # no key of AdamW alone is left
    for index, state in kept["state"].items():
        for key, value in state.items():
            assert_same_bits(saved["state"][index][key], value, key)

    for p in ps:
        p.grad = torch.randn_like(p)
    optimizer.step()
    again = StripedAdamW(groups, momentum_dtype=momentum_dtype)
    # and the state dict is a StripedAdamW's now
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same_snapshot(snapshot(again), snapshot(optimizer))


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_blocks(momentum_dtype: str) -> None:
    ps = make_parameters([(6, 12), (2, 4, 6), (6,)])
    adamw = adamw_after(ps)
    optimizer = StripedAdamW(
        [{"params": ps, "blocks": (2, 3)}], momentum_dtype=momentum_dtype, lr=0.5
    )
    optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
    for p in ps:
        assert_converted(optimizer.state[p], adamw.state[p], (2, 3), momentum_dtype)


def gpt2_like() -> list[tuple[str, Any]]:
    shapes = {
        "wte": (11, 4),
        "h.0.ln.weight": (4,),
        "h.0.attn.weight": (4, 12),
        "h.0.attn.bias": (12,),
        "h.0.proj.weight": (4, 4),
        "h.0.proj.bias": (4,),
        "h.1.ln.weight": (4,),
        "h.1.attn.weight": (4, 12),
        "h.1.attn.bias": (12,),
        "h.1.proj.weight": (4, 4),
        "h.1.proj.bias": (4,),
    }
    return [(name, parameter(torch.randn(shape))) for name, shape in shapes.items()]


def split(
    named: list[tuple[str, Any]], packed_apart: bool, with_names: bool
) -> list[dict[str, Any]]:
    """Trainer's two groups, or three groups with the packed projections in a separate one."""

    def some(condition: Any) -> list[Any]:
        chosen = [(name, p) for name, p in named if condition(name)]
        return chosen if with_names else [p for _, p in chosen]

    vectors = {"params": some(lambda n: "ln" in n or "bias" in n), "weight_decay": 0.0}
    if not packed_apart:
        return [{"params": some(lambda n: not ("ln" in n or "bias" in n))}, vectors]
    packed = {"params": some(lambda n: "attn.weight" in n), "blocks": (1, 3)}
    rest = {"params": some(lambda n: "wte" in n or "proj.weight" in n)}
    return [rest, packed, vectors]


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_groups_split_for_blocks(momentum_dtype: str) -> None:
    """AdamW's two groups become three groups, with the parameters in another order."""
    named = gpt2_like()
    adamw = adamw_after(
        split(named, packed_apart=False, with_names=True), lr=0.03, weight_decay=0.2
    )
    optimizer = StripedAdamW(
        split(named, packed_apart=True, with_names=True), momentum_dtype=momentum_dtype
    )
    optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
    for name, p in named:
        blocks = (1, 3) if "attn.weight" in name else (1, 1)
        assert_converted(optimizer.state[p], adamw.state[p], blocks, momentum_dtype)
    assert [group["blocks"] for group in optimizer.param_groups] == [(1, 1), (1, 3), (1, 1)]
    assert [group["lr"] for group in optimizer.param_groups] == [0.03] * 3
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.2, 0.0]
    for p in parameters(optimizer):
        p.grad = torch.randn_like(p)
    optimizer.step()


def test_parameters_in_another_order_are_matched_by_name() -> None:
    named = gpt2_like()
    adamw = adamw_after(split(named, packed_apart=False, with_names=True))
    optimizer = StripedAdamW(split(named[::-1], packed_apart=True, with_names=True))
    optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
    for name, p in named:
        blocks = (1, 3) if "attn.weight" in name else (1, 1)
        assert_converted(optimizer.state[p], adamw.state[p], blocks, "float32")


def refused(adamw: torch.optim.AdamW | dict[str, Any], optimizer: StripedAdamW) -> str:
    saved = copy.deepcopy(adamw if isinstance(adamw, dict) else adamw.state_dict())
    before = snapshot(optimizer)
    with pytest.raises(ERRORS) as caught:
        optimizer.load_state_dict(saved)
    assert_same_snapshot(snapshot(optimizer), before)
    return str(caught.value)


@pytest.mark.parametrize("sizes", [(2, 4), (3, 3)], ids=["same sizes", "other sizes"])
def test_another_order_without_names_is_an_error(sizes: tuple[int, int]) -> None:
    ps = make_parameters(SHAPES)
    adamw = adamw_after([{"params": ps[:2]}, {"params": ps[2:]}])
    shuffled = [ps[i] for i in (5, 0, 3, 2, 4, 1)]
    optimizer = StripedAdamW([{"params": shuffled[: sizes[0]]}, {"params": shuffled[sizes[0] :]}])
    assert "parameter" in refused(adamw, optimizer)


def test_amsgrad_is_an_error() -> None:
    ps = make_parameters(SHAPES)
    assert "amsgrad" in refused(adamw_after(ps, amsgrad=True), StripedAdamW(ps))


def test_the_state_of_another_model_is_an_error() -> None:
    ps = make_parameters([(6, 10), (4, 4)])
    message = refused(adamw_after(make_parameters([(6, 10), (4, 5)])), StripedAdamW(ps))
    assert "(4, 4)" in message or "(4, 5)" in message
    refused(adamw_after(make_parameters([(6, 10)])), StripedAdamW(ps))
    refused(adamw_after(make_parameters([(6, 10), (4, 4), (4, 4)])), StripedAdamW(ps))


def test_other_groups_without_names_are_an_error() -> None:
    a, b, c = make_parameters([(4, 4), (4, 4), (4, 4)])
    adamw = adamw_after([{"params": [a, b, c]}])
    message = refused(adamw, StripedAdamW([{"params": [c, a]}, {"params": [b], "blocks": (1, 2)}]))
    assert "[3]" in message
    assert "[2, 1]" in message


def test_lists_of_blocks_work_with_adamws_groups() -> None:
    named = gpt2_like()
    adamw = adamw_after(split(named, packed_apart=False, with_names=False))
    groups = split(named, packed_apart=False, with_names=False)
    blocks_of = {p: (1, 3) if "attn.weight" in name else (1, 1) for name, p in named}
    for group in groups:
        group["blocks"] = [blocks_of[p] for p in group["params"]]
    optimizer = StripedAdamW(groups)
    optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
    for _, p in named:
        assert_converted(optimizer.state[p], adamw.state[p], blocks_of[p], "float32")


def test_other_names_are_an_error() -> None:
    named = gpt2_like()
    adamw = adamw_after(split(named, packed_apart=False, with_names=True))
    renamed = [(name.replace("h.1", "h.2"), p) for name, p in named]
    message = refused(adamw, StripedAdamW(split(renamed, packed_apart=True, with_names=True)))
    assert "h.2" in message or "h.1" in message


def test_an_unused_adamw_loads() -> None:
    ps = make_parameters(SHAPES)
    optimizer = StripedAdamW(ps)
    optimizer.load_state_dict(torch.optim.AdamW(ps, lr=0.3).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert not any(optimizer.state.values())


def test_a_partly_filled_adamw_loads() -> None:
    ps = make_parameters([(3, 4), (3, 4), (5,)])
    adamw = torch.optim.AdamW(ps)
    ps[1].grad, ps[2].grad = torch.randn(3, 4), torch.randn(5)
    adamw.step()
    optimizer = StripedAdamW(ps)
    optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
    assert ps[0] not in optimizer.state
    assert_converted(optimizer.state[ps[1]], adamw.state[ps[1]], (1, 1), "float32")
    for p in ps:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in ps] == [1, 2, 2]


@pytest.mark.parametrize("settings", [{"fused": True}, {"foreach": True}, {"maximize": True}])
def test_adamws_own_settings(settings: dict[str, Any]) -> None:
    ps = make_parameters(SHAPES)
    adamw = adamw_after(ps, **settings)
    optimizer = StripedAdamW(ps)
    optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
    assert optimizer.param_groups[0]["maximize"] == settings.get("maximize", False)
    for p in ps:
        assert_converted(optimizer.state[p], adamw.state[p], (1, 1), "float32")


# ---------------------------------------------------------------------------------------------
# a run that changes its optimizer
# ---------------------------------------------------------------------------------------------


def loss_of(model: torch.nn.Module, batch: int) -> torch.Tensor:
    """The loss of learning the class that a fixed random network gives to each input."""
    generator = torch.Generator().manual_seed(99)
    teacher = torch.randn(20, 5, generator=generator)
    x = torch.randn(64, 20, generator=torch.Generator().manual_seed(batch))
    return functional.cross_entropy(model(x), (x @ teacher).argmax(-1))


def held_out(model: torch.nn.Module) -> float:
    with torch.no_grad():
        return sum(loss_of(model, batch).item() for batch in range(5000, 5040)) / 40


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: range) -> None:
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_a_run_that_began_with_adamw_continues_at_the_same_loss(momentum_dtype: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh()
    )
    model.append(torch.nn.Linear(64, 5))
    adamw = torch.optim.AdamW(model.parameters(), lr=3e-3)
    train(model, adamw, range(150))
    at_change = held_out(model)
    going_on = copy.deepcopy((model, adamw))

    striped = StripedAdamW(model.parameters(), momentum_dtype=momentum_dtype)
    striped.load_state_dict(adamw.state_dict())
    assert striped.param_groups[0]["lr"] == 3e-3

    # no jump after the change (a fresh optimizer's first steps would raise the loss)
    train(model, striped, range(150, 155))
    assert held_out(model) < at_change + 0.01
    train(model, striped, range(155, 400))
    train(going_on[0], going_on[1], range(150, 400))
    ours, theirs = held_out(model), held_out(going_on[0])
    assert theirs < 0.8 * at_change
    assert abs(ours - theirs) < 0.1 * theirs
