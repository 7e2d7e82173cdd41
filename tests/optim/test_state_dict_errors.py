"""State dicts that do not fit: the error, its message, and that nothing changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from error_checks import ERRORS, assert_names, matrix, optimizer_with_history
from optim_checks import (
    assert_same_snapshot,
    parameter,
    snapshot,
)


def saved_state(named: bool = True, **settings: Any) -> dict[str, Any]:
    optimizer, _ = optimizer_with_history(named, **settings)
    return copy.deepcopy(optimizer.state_dict())


class BadState(NamedTuple):
    source: dict[str, Any]
    target: dict[str, Any]
    change: Callable[[dict[str, Any]], Any]
    words: tuple[str, ...]


def set_state(key: str, value: torch.Tensor) -> Callable[[dict[str, Any]], Any]:
    return lambda saved: saved["state"][2].__setitem__(key, value)


BAD_STATES: dict[str, BadState] = {
    "int8 into float32": BadState(
        {"momentum_dtype": "int8"}, {}, lambda s: None, ("momentum_dtype", "int8", "float32")
    ),
    "float32 into int8": BadState(
        {}, {"momentum_dtype": "int8"}, lambda s: None, ("momentum_dtype", "int8", "float32")
    ),
    "int4 into int8": BadState(
        {"momentum_dtype": "int4"},
        {"momentum_dtype": "int8"},
        lambda s: None,
        ("momentum_dtype", "int4", "int8"),
    ),
    "bfloat16 into float32": BadState(
        {"momentum_dtype": "bfloat16"}, {}, lambda s: None, ("momentum_dtype", "bfloat16")
    ),
    "other blocks": BadState(
        {"blocks": (1, 3)}, {"blocks": (2, 1)}, lambda s: None, ("blocks", "(1, 3)", "(2, 1)")
    ),
    "blocks into none": BadState({"blocks": (2, 2)}, {}, lambda s: None, ("blocks", "(2, 2)")),
    "master_bits into none": BadState(
        {"master_bits": 24},
        {},
        lambda s: None,
        ("third.weight", "master_bits=24", "param_low_bits"),
    ),
    "momentum of another format than its group says": BadState(
        {"momentum_dtype": "int8"},
        {"momentum_dtype": "int8"},
        set_state("exp_avg", torch.zeros(4, 6)),
        ("second.weight", "exp_avg", "float32", "int8"),
    ),
    "row of another length": BadState(
        {}, {}, set_state("exp_avg_sq_row", torch.zeros(5, 1)), ("second.weight", "exp_avg_sq_row")
    ),
    "col of another length": BadState(
        {}, {}, set_state("exp_avg_sq_col", torch.zeros(1, 7)), ("second.weight", "exp_avg_sq_col")
    ),
    "momentum of another shape": BadState(
        {}, {}, set_state("exp_avg", torch.zeros(6, 4)), ("second.weight", "exp_avg", "(6, 4)")
    ),
    "scale of another shape": BadState(
        {"momentum_dtype": "int8"},
        {"momentum_dtype": "int8"},
        set_state("exp_avg_scale", torch.zeros(4, 2)),
        ("second.weight", "exp_avg_scale", "(4, 2)"),
    ),
    "no row": BadState(
        {}, {}, lambda s: s["state"][2].pop("exp_avg_sq_row"), ("second.weight", "exp_avg_sq_row")
    ),
    "no step": BadState({}, {}, lambda s: s["state"][2].pop("step"), ("second.weight", "step")),
    "no momentum": BadState(
        {}, {}, lambda s: s["state"][2].pop("exp_avg"), ("second.weight", "exp_avg")
    ),
    "no scale": BadState(
        {"momentum_dtype": "int4"},
        {"momentum_dtype": "int4"},
        lambda s: s["state"][2].pop("exp_avg_scale"),
        ("second.weight", "exp_avg_scale"),
    ),
    "no second moment of a vector": BadState(
        {}, {}, lambda s: s["state"][1].pop("exp_avg_sq"), ("first.bias", "exp_avg_sq")
    ),
    "another group": BadState(
        {},
        {},
        lambda s: s["param_groups"].append({**s["param_groups"][0], "params": []}),
        ("group",),
    ),
    "a parameter less": BadState(
        {}, {}, lambda s: s["param_groups"][0]["params"].pop(), ("group",)
    ),
    "not a state dict": BadState({}, {}, lambda s: s.pop("param_groups"), ("param_groups",)),
}


@pytest.mark.parametrize("bad", BAD_STATES.values(), ids=BAD_STATES)
def test_a_state_dict_that_does_not_fit_changes_nothing(bad: BadState) -> None:
    saved = saved_state(**bad.source)
    bad.change(saved)
    optimizer, ps = optimizer_with_history(named=True, **bad.target)
    before = snapshot(optimizer)
    with pytest.raises((*ERRORS, KeyError)) as caught:
        optimizer.load_state_dict(saved)
    assert_names(caught.value, *bad.words)
    assert_same_snapshot(snapshot(optimizer), before)
    for p in ps:
        p.grad = torch.randn_like(p)
    optimizer.step()


def test_the_error_of_a_run_without_names_has_the_index() -> None:
    saved = saved_state(named=False)
    saved["state"][2]["exp_avg_sq_row"] = torch.zeros(5, 1)
    optimizer, _ = optimizer_with_history(named=False)
    with pytest.raises(ERRORS) as caught:
        optimizer.load_state_dict(saved)
    assert_names(caught.value, "2", "exp_avg_sq_row")


def test_a_state_dict_of_another_optimizer_is_an_error() -> None:
    ps = [matrix(), parameter(torch.randn(5)), matrix(), matrix(dtype=torch.bfloat16)]
    for other in (torch.optim.SGD(ps, lr=0.1, momentum=0.9), torch.optim.RMSprop(ps)):
        for p in ps:
            p.grad = torch.randn_like(p)
        other.step()
        optimizer, _ = optimizer_with_history(named=False)
        before = snapshot(optimizer)
        with pytest.raises(ERRORS):
            optimizer.load_state_dict(other.state_dict())
        assert_same_snapshot(snapshot(optimizer), before)
