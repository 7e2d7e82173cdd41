"""Marked parameters in groups whose author does not know of blocks."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from striped_hf import StripedAdamW
from striped_hf.optim.blocks import mark_blocks

PACKED, TALL, PLAIN, BIAS = 0, 1, 2, 3


def marked_parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in ((4, 6), (2, 8, 5), (4, 6), (6,))]
    mark_blocks(params[PACKED], (1, 3))
    mark_blocks(params[TALL], (4, 1))
    return params


def step(optimizer: StripedAdamW, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()


def stripes(optimizer: StripedAdamW, param: nn.Parameter) -> tuple[torch.Size, torch.Size]:
    state = optimizer.state[param]
    return state["exp_avg_sq_row"].shape, state["exp_avg_sq_col"].shape


def test_marked_parameters_step_as_with_blocks_of_their_group() -> None:
    marked = marked_parameters()
    plain = [nn.Parameter(param.detach().clone()) for param in marked]
    one = StripedAdamW([{"params": marked[:2], "lr": 0.1}, {"params": marked[2:]}])
    two = StripedAdamW(
        [{"params": plain[:2], "lr": 0.1, "blocks": [(1, 3), (4, 1)]}, {"params": plain[2:]}]
    )
    for seed in range(3):
        step(one, seed)
        step(two, seed)
    assert stripes(one, marked[PACKED]) == ((4, 3), (1, 6))
    assert stripes(one, marked[TALL]) == ((2, 8, 1), (2, 4, 5))
    assert stripes(one, marked[PLAIN]) == ((4, 1), (1, 6))
    for p, q in zip(marked, plain, strict=True):
        assert torch.equal(p, q)


def test_a_state_dict_records_them_and_a_copy_keeps_them() -> None:
    params = marked_parameters()
    optimizer = StripedAdamW(params)
    step(optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    # load into an optimizer with blocks in its groups, as older checkpoints have them
    others = [nn.Parameter(param.detach().clone()) for param in params]
    by_group = StripedAdamW(
        [{"params": others, "blocks": [(1, 3), (4, 1), (1, 1), (1, 1)]}],
    )
    by_group.load_state_dict(saved)
    unmarked = StripedAdamW([nn.Parameter(param.detach().clone()) for param in params])
    with pytest.raises(ValueError, match=r"blocks=\(1, 3\)"):
        unmarked.load_state_dict(saved)
    copied_params, copied = copy.deepcopy((params, optimizer))
    for other in (by_group, copied):
        step(other, 1)
    step(optimizer, 1)
    for p, q, r in zip(params, others, copied_params, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


@pytest.mark.parametrize(
    ("group", "arguments"), [({"blocks": (2, 2)}, {}), ({}, {"blocks": (2, 2)})]
)
def test_given_blocks_take_precedence_over_marks(
    group: dict[str, Any], arguments: dict[str, Any]
) -> None:
    param = marked_parameters()[PACKED]
    optimizer = StripedAdamW([{"params": [param], **group}], **arguments)
    step(optimizer)
    assert stripes(optimizer, param) == ((4, 2), (2, 6))


def test_a_mark_that_no_longer_divides_is_ignored() -> None:
    params = marked_parameters()
    params[PACKED].data = torch.randn(4, 7)
    params[TALL].data = torch.randn(80)
    optimizer = StripedAdamW(params)
    step(optimizer)
    assert stripes(optimizer, params[PACKED]) == ((4, 1), (1, 7))


def test_parameters_that_join_later() -> None:
    params = marked_parameters()
    optimizer = StripedAdamW(params[PLAIN:])
    optimizer.add_param_group({"params": params[:PLAIN]})
    step(optimizer)
    assert stripes(optimizer, params[PACKED]) == ((4, 3), (1, 6))
    assert stripes(optimizer, params[TALL]) == ((2, 8, 1), (2, 4, 5))
