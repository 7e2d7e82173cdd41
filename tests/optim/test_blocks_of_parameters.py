"""Each parameter keeps its blocks when other code changes the groups and their lists."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_checks import FORMATS, assert_same_bits, parameter
from torch import nn

from striped_hf import StripedAdamW
from striped_hf.optim.blocks import mark_blocks

pytestmark = pytest.mark.usefixtures("every_backend")

SHAPES = [(6, 12), (12, 6), (6, 12), (7,), (4, 12), (2, 6, 12)]
BLOCKS = [(1, 1), (3, 1), (1, 3), (1, 1), (2, 2), (2, 3)]


def build(**settings: Any) -> tuple[StripedAdamW, list[nn.Parameter], dict[Any, Any]]:
    ps = [parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = StripedAdamW([{"params": list(ps), "blocks": list(BLOCKS)}], lr=0.1, **settings)
    return optimizer, ps, dict(zip(ps, BLOCKS, strict=True))


def step(optimizer: StripedAdamW, seed: int = 0) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            generator = torch.Generator().manual_seed(seed + p.numel())
            p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def assert_blocks(optimizer: StripedAdamW, expected: dict[Any, Any]) -> None:
    """The groups' lists match the parameters, and each state has its parameter's stripes."""
    for group in optimizer.param_groups:
        blocks = group["blocks"]
        listed = blocks if isinstance(blocks, list) else len(group["params"]) * [blocks]
        assert listed == [expected[p] for p in group["params"]]
        for p in group["params"]:
            if p.dim() >= 2:
                *leading, rows, columns = p.shape
                state, (row_blocks, column_blocks) = optimizer.state[p], expected[p]
                assert state["exp_avg_sq_row"].shape == (*leading, rows, column_blocks)
                assert state["exp_avg_sq_col"].shape == (*leading, row_blocks, columns)


def drop_first(groups: list[dict[str, Any]]) -> None:
    groups[0]["params"] = groups[0]["params"][1:]


def drop_in_place(groups: list[dict[str, Any]]) -> None:
    del groups[0]["params"][1:3]


def sort_by_size(groups: list[dict[str, Any]]) -> None:
    groups[0]["params"].sort(key=torch.numel)


def reverse(groups: list[dict[str, Any]]) -> None:
    groups[0]["params"] = groups[0]["params"][::-1]


def deal_out(groups: list[dict[str, Any]]) -> None:
    """Splits a group into two groups, each with the whole list of blocks."""
    params = groups[0]["params"]
    groups[:] = [{**groups[0], "params": params[i::2]} for i in range(2)]


EDITS = [drop_first, drop_in_place, sort_by_size, reverse, deal_out]


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_edited_groups_step_as_unedited_ones(
    momentum_dtype: str, edit: Callable[[list[dict[str, Any]]], None], steps_before: int
) -> None:
    torch.manual_seed(0)
    edited, ps, expected = build(momentum_dtype=momentum_dtype)
    torch.manual_seed(0)
    plain, qs, _ = build(momentum_dtype=momentum_dtype)
    for t in range(steps_before):
        step(edited, t)
        step(plain, t)
    edit(edited.param_groups)
    kept = [p for group in edited.param_groups for p in group["params"]]
    for t in range(2, 4):
        step(edited, t)
        step(plain, t)
    assert_blocks(edited, expected)
    for p, q in zip(ps, qs, strict=True):
        if any(p is each for each in kept):
            assert_same_bits(p, q)


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_an_edited_optimizer_saves_what_it_has(
    edit: Callable[[list[dict[str, Any]]], None],
) -> None:
    """It can be saved before the next step, and a copy and a pickle continue."""
    optimizer, _, expected = build()
    step(optimizer)
    edit(optimizer.param_groups)
    kept = {p for group in optimizer.param_groups for p in group["params"]}
    for p in expected.keys() - kept:
        del optimizer.state[p]  # otherwise torch would not know where to save it
    saved = copy.deepcopy(optimizer.state_dict())
    for group, of_group in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        assert group["blocks"] == [expected[p] for p in of_group["params"]]
    groups = [
        {
            "params": [parameter(p.detach().clone()) for p in group["params"]],
            "blocks": [expected[p] for p in group["params"]],
        }
        for group in optimizer.param_groups
    ]
    again = StripedAdamW(groups)
    again.load_state_dict(saved)
    others = [again, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    for each in (optimizer, *others):
        step(each, 5)
    for other in others:
        for group, of_group in zip(other.param_groups, optimizer.param_groups, strict=True):
            for p, q in zip(group["params"], of_group["params"], strict=True):
                assert_same_bits(p, q)


def test_a_list_of_blocks_that_does_not_fit_is_replaced_by_the_shapes_of_the_stripes() -> None:
    """Older versions saved such lists after other code had removed parameters."""
    optimizer, _, _ = build()
    drop_first(optimizer.param_groups)
    step(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["blocks"] = list(BLOCKS)
    optimizer.load_state_dict(saved)
    step(optimizer)
    assert optimizer.param_groups[0]["blocks"] == BLOCKS[1:]
    saved["state"][0]["exp_avg_sq_col"] = torch.zeros(1, 6)
    with pytest.raises(ValueError, match="exp_avg_sq_col"):
        optimizer.load_state_dict(saved)


def test_torchs_own_load_state_dict_keeps_each_parameters_blocks() -> None:
    """Libraries call the base class's method, which replaces the groups' dicts."""
    optimizer, _, expected = build()
    step(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    torch.optim.Optimizer.load_state_dict(optimizer, saved)
    reverse(optimizer.param_groups)
    step(optimizer)
    assert_blocks(optimizer, expected)


def test_groups_that_another_library_assigns() -> None:
    """Lightning does this when it resumes in a new process: all parameters are new."""
    ps = [parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = StripedAdamW(ps[:1], lr=0.1)
    optimizer.param_groups = [
        {**optimizer.param_groups[0], "params": ps[:3], "blocks": [list(b) for b in BLOCKS[:3]]},
        {"params": ps[3:5], "lr": 0.01},  # without StripedAdamW's keys
    ]
    step(optimizer)
    expected = dict(zip(ps, [*BLOCKS[:3], (1, 1), (1, 1)], strict=False))
    assert_blocks(optimizer, expected)
    assert optimizer.param_groups[1]["momentum_dtype"] == "float32"
    assert optimizer.param_groups[1]["lr"] == 0.01


def test_a_list_that_contradicts_known_blocks_is_not_used_for_a_new_parameter() -> None:
    optimizer, ps, expected = build()
    new = parameter(torch.randn(6, 12))
    optimizer.param_groups[0]["params"] = [*ps[1:], new]  # as long as the list
    step(optimizer)
    assert_blocks(optimizer, {**expected, new: (1, 1)})


def test_parameters_swapped_in_place_inherit_by_position() -> None:
    """accelerate swaps them for placeholders, and then for shards."""
    optimizer, ps, _ = build()
    group = optimizer.param_groups[0]
    for i, p in enumerate(ps):
        group["params"][i] = torch.empty(1, dtype=p.dtype)
    others = [parameter(torch.randn(shape)) for shape in SHAPES]
    group["params"] = others
    step(optimizer)
    assert_blocks(optimizer, dict(zip(others, BLOCKS, strict=True)))


def test_no_parameter_is_kept_in_memory() -> None:
    """Sharding must free the memory of a swapped parameter."""
    optimizer, ps, expected = build()
    references = [weakref.ref(p) for p in ps]
    optimizer.param_groups[0]["params"] = [parameter(torch.randn(s)) for s in SHAPES]
    ps.clear()
    expected.clear()
    gc.collect()
    assert all(reference() is None for reference in references)


def test_parameters_swapped_by_torch() -> None:
    """``module.to()`` does this if it is configured so; a weak reference would forbid it."""
    optimizer, ps, expected = build()
    step(optimizer)
    for p in ps:
        p.grad = None
        other = nn.Parameter(p.detach().clone())
        torch.utils.swap_tensors(p, other)
    step(optimizer)
    assert_blocks(optimizer, expected)


def test_a_pair_may_change_until_there_is_a_state() -> None:
    p = parameter(torch.randn(6, 12))
    optimizer = StripedAdamW([p], blocks=(1, 3))
    optimizer.param_groups[0]["blocks"] = (2, 4)
    step(optimizer)
    assert_blocks(optimizer, {p: (2, 4)})


@pytest.mark.parametrize("listed", [False, True])
def test_marked_parameters(listed: bool) -> None:
    """A mark holds in any group and for any list, also for a list in another order."""
    ps = [parameter(torch.randn(shape)) for shape in SHAPES]
    for p, blocks in zip(ps, BLOCKS, strict=True):
        mark_blocks(p, blocks)
    expected = dict(zip(ps, BLOCKS, strict=True))
    group: dict[str, Any] = {"params": ps[::-1]}
    if listed:
        group["blocks"] = list(BLOCKS)
    optimizer = StripedAdamW([group])
    step(optimizer)
    assert_blocks(optimizer, expected)
    half = StripedAdamW([{"params": ps[::2], "blocks": list(BLOCKS)}])
    step(half)
    assert_blocks(half, expected)


def test_another_pair_than_the_default_is_for_the_whole_group() -> None:
    p = parameter(torch.randn(6, 12))
    mark_blocks(p, (1, 3))
    optimizer = StripedAdamW([p], blocks=(2, 2))
    step(optimizer)
    assert_blocks(optimizer, {p: (2, 2)})


def test_blocks_that_do_not_divide_a_new_parameter() -> None:
    optimizer = StripedAdamW([parameter(torch.randn(6, 12))], blocks=(1, 3))
    optimizer.param_groups[0]["params"].append(parameter(torch.randn(6, 11)))
    with pytest.raises(RuntimeError, match=r"parameter 1.*blocks=\(1, 3\)"):
        step(optimizer)
    assert not optimizer.state


def test_edits_of_groups_without_blocks() -> None:
    """Remaining and new parameters are not taken for flattened buffers."""
    for edit in ("pop", "filter", "append"):
        weight, bias = parameter(torch.randn(4, 4)), parameter(torch.randn(4))
        optimizer = StripedAdamW([{"params": [weight]}, {"params": [bias]}])
        if edit == "pop":
            optimizer.param_groups.pop(0)
        elif edit == "filter":
            optimizer.param_groups[0]["params"] = [parameter(torch.randn(16))]
        else:
            group = {**optimizer.param_groups[0], "params": [parameter(torch.randn(3, 3))]}
            optimizer.param_groups.insert(0, group)
        step(optimizer)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        assert set(optimizer.state) == set(params)
