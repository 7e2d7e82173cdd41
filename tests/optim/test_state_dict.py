"""state_dict, load_state_dict, files, copies: a resumed run equals the run without a stop."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_checks import FORMATS, assert_same_bits, assert_same_snapshot, parameter, snapshot

from striped_hf import StripedAdamW

pytestmark = pytest.mark.usefixtures("every_backend")

SHAPES = [(6, 10), (10,), (2, 3, 4), (), (5, 131), (4, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [parameter(torch.randn(shape, generator=generator), dtype) for shape in SHAPES]


def make_optimizer(
    ps: list[torch.nn.Parameter], momentum_dtype: str = "float32", **settings: Any
) -> StripedAdamW:
    groups = [
        {"params": [ps[0], ps[4], ps[5]]},
        {"params": [ps[2]], "blocks": (1, 2), "weight_decay": 0.3},
        {"params": [ps[1], ps[3]], "weight_decay": 0.0},
    ]
    return StripedAdamW(groups, lr=0.05, momentum_dtype=momentum_dtype, **settings)


def train(optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Trains with gradients that depend on the parameters, so that one wrong bit spreads."""
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        for i, group in enumerate(optimizer.param_groups):
            for j, p in enumerate(group["params"]):
                g = torch.randn(p.shape, generator=generator) + 0.5 * p.detach().float()
                p.grad = None if (t + i + j) % 5 == 4 else g.to(p.dtype)
        optimizer.step()


# ---------------------------------------------------------------------------------------------
# the dict itself
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_the_dict_has_only_tensors_numbers_and_strings(momentum_dtype: str) -> None:
    """It has tensors, numbers, strings, None and containers of these, under torch's keys."""
    optimizer = make_optimizer(make_parameters(), momentum_dtype)
    train(optimizer, range(2))
    saved = optimizer.state_dict()
    assert set(saved) == {"state", "param_groups"}
    assert set(saved["state"]) == set(range(len(SHAPES)))
    assert [group["params"] for group in saved["param_groups"]] == [[0, 1, 2], [3], [4, 5]]

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(type(key) in (str, int) and plain(v) for key, v in value.items())
        if isinstance(value, list | tuple):
            return type(value) in (list, tuple) and all(map(plain, value))
        return type(value) in (torch.Tensor, int, float, bool, str, type(None))

    assert plain(saved)


def test_a_state_has_its_entries_in_one_order() -> None:
    """In every process: the order of a set of strings differs from process to process."""
    ps = [parameter(torch.randn(4, 6)), parameter(torch.randn(5))]
    optimizer = StripedAdamW(ps, momentum_dtype="int8")
    for p in ps:
        p.grad = torch.randn_like(p)
    optimizer.step()
    stripes = ["exp_avg_sq_row", "exp_avg_sq_col"]
    assert list(optimizer.state[ps[0]]) == ["step", "exp_avg", "exp_avg_scale", *stripes]
    assert list(optimizer.state[ps[1]]) == ["step", "exp_avg", "exp_avg_sq"]


def test_the_dict_refers_to_the_state_without_copying() -> None:
    """As in torch: saving a checkpoint needs no second copy in memory."""
    ps = make_parameters()
    optimizer = make_optimizer(ps)
    train(optimizer, range(1))
    saved = optimizer.state_dict()["state"][0]["exp_avg"]
    assert saved.data_ptr() == optimizer.state[ps[0]]["exp_avg"].data_ptr()


def test_an_unused_optimizer_saves_and_loads() -> None:
    optimizer = make_optimizer(make_parameters())
    again = make_optimizer(make_parameters())
    again.load_state_dict(optimizer.state_dict())
    assert len(again.state) == 0
    train(again, range(2))


# ---------------------------------------------------------------------------------------------
# resuming
# ---------------------------------------------------------------------------------------------


def through_memory(saved: dict[str, Any], folder: Path) -> dict[str, Any]:
    return copy.deepcopy(saved)


def through_file(saved: dict[str, Any], folder: Path) -> dict[str, Any]:
    torch.save(saved, folder / "optimizer.pt")
    return torch.load(folder / "optimizer.pt", weights_only=True)


def through_pickle(saved: dict[str, Any], folder: Path) -> dict[str, Any]:
    return pickle.loads(pickle.dumps(saved))


@pytest.mark.parametrize("momentum_dtype", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("carry", [through_memory, through_file, through_pickle])
def test_a_resumed_run_equals_the_run_without_a_stop(
    carry: Callable[..., dict[str, Any]], dtype: torch.dtype, momentum_dtype: str, tmp_path: Path
) -> None:
    """Parameters, state tensors with their dtypes, and groups are equal bit for bit."""
    for nesterov in (False, True):
        through = make_optimizer(make_parameters(dtype), momentum_dtype, nesterov=nesterov)
        train(through, range(4))
        stopped = snapshot(through)
        saved = carry(through.state_dict(), tmp_path)
        values = [p.detach().clone() for group in through.param_groups for p in group["params"]]
        train(through, range(4, 9))

        resumed = make_optimizer(make_parameters(dtype), momentum_dtype)
        for p, value in zip(
            (p for group in resumed.param_groups for p in group["params"]), values, strict=True
        ):
            p.data.copy_(value)
        resumed.load_state_dict(saved)
        assert_same_snapshot(snapshot(resumed), stopped)
        train(resumed, range(4, 9))
        assert_same_snapshot(snapshot(resumed), snapshot(through))


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_loading_into_a_used_optimizer_replaces_its_state(momentum_dtype: str) -> None:
    source = make_optimizer(make_parameters(), momentum_dtype)
    train(source, range(3))
    target = make_optimizer(make_parameters(), momentum_dtype)
    train(target, range(50, 57))
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    for mine, theirs in zip(target.state.values(), source.state.values(), strict=True):
        assert mine.keys() == theirs.keys()
    saved, again = source.state_dict(), target.state_dict()
    for index, state in saved["state"].items():
        for key, value in state.items():
            assert_same_bits(again["state"][index][key], value, key)


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_a_loaded_state_is_not_shared_with_its_source(momentum_dtype: str) -> None:
    """A step of one optimizer changes neither the other one nor the loaded dict."""
    source = make_optimizer(make_parameters(), momentum_dtype)
    train(source, range(3))
    saved = source.state_dict()
    kept = copy.deepcopy(saved)
    target = make_optimizer(make_parameters(), momentum_dtype)
    target.load_state_dict(saved)
    train(target, range(3, 6))
    for index, state in kept["state"].items():
        for key, value in state.items():
            assert_same_bits(saved["state"][index][key], value, f"{key} of {index}")


def test_loading_does_not_change_the_dict() -> None:
    source = make_optimizer(make_parameters(), "int8")
    train(source, range(2))
    saved = copy.deepcopy(source.state_dict())
    keys = [set(state) for state in saved["state"].values()]
    groups = copy.deepcopy(saved["param_groups"])
    make_optimizer(make_parameters(), "int8").load_state_dict(saved)
    assert [set(state) for state in saved["state"].values()] == keys
    assert saved["param_groups"] == groups


def test_a_partly_filled_state_loads() -> None:
    """Parameters that never had a gradient have no entry."""
    ps = make_parameters()
    source = make_optimizer(ps, "int4")
    ps[0].grad, ps[2].grad = torch.randn(6, 10), torch.randn(2, 3, 4)
    source.step()
    others = make_parameters()
    target = make_optimizer(others, "int4")
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert set(target.state) == {others[0], others[2]}
    train(target, range(2))


def test_names_that_other_code_left_are_not_saved() -> None:
    """A named parameter was frozen and taken out of its group before the first step."""
    named = [(f"layer.{i}", p) for i, p in enumerate(make_parameters()[:3])]
    optimizer = StripedAdamW(named)
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][1:]
    train(optimizer, range(2))
    saved = optimizer.state_dict()
    assert "param_names" not in saved["param_groups"][0]
    expected = snapshot(optimizer)
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert_same_snapshot(snapshot(optimizer), expected)


def test_loaded_settings_replace_the_constructors() -> None:
    """As with every torch optimizer, the settings come from the checkpoint's groups."""
    source = make_optimizer(make_parameters(), nesterov=True)
    source.param_groups[0]["lr"] = 0.123
    train(source, range(1))
    target = make_optimizer(make_parameters())
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert target.param_groups[0]["lr"] == 0.123
    assert target.param_groups[0]["nesterov"] is True


@pytest.mark.parametrize("key", ["nesterov", "stochastic_rounding", "maximize"])
def test_a_state_dict_from_before_a_setting_existed_loads(key: str) -> None:
    source = make_optimizer(make_parameters(), "int8")
    train(source, range(2))
    saved = copy.deepcopy(source.state_dict())
    for group in saved["param_groups"]:
        del group[key]
    target = make_optimizer(make_parameters(), "int8")
    target.load_state_dict(saved)
    assert target.param_groups[0][key] == target.defaults[key]
    train(target, range(2))


def test_parameters_in_another_dtype_than_when_saved() -> None:
    """A run that began in fp32 continues in bf16: the dtypes of the state stay."""
    source = make_optimizer(make_parameters(), "float32")
    train(source, range(2))
    ps = make_parameters(torch.bfloat16)
    target = make_optimizer(ps, "float32")
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    for state in target.state.values():
        low_bits = state.get("param_low_bits")  # of vectors in bf16 only, and none were saved
        assert low_bits is None or not low_bits.any()
        others = {value.dtype for key, value in state.items() if key != "param_low_bits"}
        assert others == {torch.float32}
    train(target, range(2))


# ---------------------------------------------------------------------------------------------
# hooks
# ---------------------------------------------------------------------------------------------


def test_step_hooks() -> None:
    ps = make_parameters()
    optimizer = make_optimizer(ps)
    seen: list[Any] = []

    def before(opt: Any, args: Any, kwargs: Any) -> None:
        seen.append(("pre", opt is optimizer, ps[0].detach().clone()))

    def after(opt: Any, args: Any, kwargs: Any) -> None:
        seen.append(("post", opt is optimizer, ps[0].detach().clone()))

    handles = [
        optimizer.register_step_pre_hook(before),
        optimizer.register_step_post_hook(after),
    ]
    start = ps[0].detach().clone()
    train(optimizer, range(1))
    assert [entry[:2] for entry in seen] == [("pre", True), ("post", True)]
    assert_same_bits(seen[0][2], start)
    assert_same_bits(seen[1][2], ps[0])
    assert (seen[1][2] != start).all()
    for handle in handles:
        handle.remove()
    train(optimizer, range(1))
    assert len(seen) == 2


def test_a_step_pre_hook_may_change_gradients_and_arguments() -> None:
    p = parameter(torch.ones(2, 3))
    optimizer = StripedAdamW([p], lr=0.1, weight_decay=0.0)

    def closure() -> float:
        p.grad = -torch.ones(2, 3)
        return 7.0

    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, closure), {}))
    assert optimizer.step() == 7.0
    torch.testing.assert_close(p.detach(), torch.full((2, 3), 1.1))


def test_state_dict_hooks() -> None:
    optimizer = make_optimizer(make_parameters(), "int8")
    train(optimizer, range(1))
    order = []
    optimizer.register_state_dict_pre_hook(lambda opt: order.append("pre"))

    def wrap(opt: Any, saved: dict[str, Any]) -> dict[str, Any]:
        order.append("post")
        return {"wrapped": saved}

    optimizer.register_state_dict_post_hook(wrap)
    saved = optimizer.state_dict()
    assert order == ["pre", "post"]
    assert set(saved) == {"wrapped"}


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_load_hooks(momentum_dtype: str) -> None:
    """The result of a pre hook is checked and loaded; a post hook sees the final state."""
    source = make_optimizer(make_parameters(torch.bfloat16), momentum_dtype)
    train(source, range(2))
    expected = snapshot(source)
    target = make_optimizer(make_parameters(torch.bfloat16), momentum_dtype)
    seen = []

    def unwrap(opt: Any, saved: dict[str, Any]) -> dict[str, Any]:
        inner = copy.deepcopy(saved["wrapped"])
        inner["param_groups"][0]["lr"] = 0.77
        return inner

    target.register_load_state_dict_pre_hook(unwrap)
    target.register_load_state_dict_post_hook(lambda opt: seen.append(snapshot(opt)))
    target.load_state_dict({"wrapped": source.state_dict()})
    assert target.param_groups[0]["lr"] == 0.77
    assert len(seen) == 1
    # every second entry for the parameters in a snapshot is a state
    for mine, theirs in zip(seen[0][1:12:2], expected[1:12:2], strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert_same_bits(mine[key], value, key)


# ---------------------------------------------------------------------------------------------
# copies
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum_dtype", FORMATS)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_independent(copied: Callable[[Any], Any], momentum_dtype: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        optimizer = make_optimizer(make_parameters(dtype), momentum_dtype)
        train(optimizer, range(3))
        before = snapshot(optimizer)
        other = copied(optimizer)
        assert type(other) is StripedAdamW
        assert_same_snapshot(snapshot(other), before)
        train(other, range(3, 6))
        assert_same_snapshot(snapshot(optimizer), before)  # the original did not move
        train(optimizer, range(3, 6))
        assert_same_snapshot(snapshot(other), snapshot(optimizer))


def test_a_copy_keeps_the_backend() -> None:
    optimizer = StripedAdamW(make_parameters(), backend="reference")
    assert optimizer.backend == "reference"
    assert copy.deepcopy(optimizer).backend == "reference"
    assert pickle.loads(pickle.dumps(optimizer)).backend == "reference"


def test_repr_names_the_settings() -> None:
    text = repr(make_optimizer(make_parameters(), "int4"))
    for word in ("StripedAdamW", "momentum_dtype: int4", "blocks: (1, 2)", "lr: 0.05"):
        assert word in text
