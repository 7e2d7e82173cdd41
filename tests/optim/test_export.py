"""AdamW and every StripedAdamW continue from the state dict that ``adamw_state_dict`` exports."""

from typing import Any

import oracle
import pytest
import torch
from optim_checks import FORMATS, assert_same_bits
from torch import Tensor, nn

from striped_hf import StripedAdamW
from striped_hf.optim import adamw_state_dict

SHAPES = [(6, 12), (4, 9, 258), (5,), (), (300, 2)]
BLOCKS = [(2, 3), (3, 2), (1, 1), (1, 1), (1, 1)]


def make_params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]


def set_gradients(params: list[nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        grad = scale * torch.randn(param.shape, generator=generator)
        param.grad = grad.to(param.dtype)


def striped(params: list[nn.Parameter], scale: float = 1.0, **arguments: Any) -> StripedAdamW:
    groups = [
        {"params": params[:2], "blocks": BLOCKS[:2], "weight_decay": 0.3},
        {"params": params[2:], "lr": 0.01},
    ]
    optimizer = StripedAdamW(groups, **{"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-7} | arguments)
    for seed in range(3):
        set_gradients(params, seed, scale)
        optimizer.step()
    return optimizer


def whole_moment(row: Tensor, col: Tensor, blocks: tuple[int, int]) -> Tensor:
    """The rank-one matrix of each block, by loops, in float64."""
    (rows, bc), (br, columns) = row.shape[-2:], col.shape[-2:]
    assert (br, bc) == blocks
    height, width = rows // br, columns // bc
    result = torch.empty(*row.shape[:-1], columns, dtype=torch.float64)
    for r in range(br):
        for c in range(bc):
            a = row[..., r * height : (r + 1) * height, c].double()
            b = col[..., r, c * width : (c + 1) * width].double()
            block = a.unsqueeze(-1) * b.unsqueeze(-2) / a.mean(-1)[..., None, None]
            result[..., r * height : (r + 1) * height, c * width : (c + 1) * width] = block
    return result


@pytest.mark.parametrize("scale", [1.0, 1e-12])  # products of their squares underflow
@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_adamw_continues_from_the_export(momentum_dtype: str, scale: float) -> None:
    params = make_params()
    optimizer = striped(params, scale, momentum_dtype=momentum_dtype)
    exported = adamw_state_dict(optimizer)
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    adamw = torch.optim.AdamW([{"params": copies[:2]}, {"params": copies[2:]}])
    adamw.load_state_dict(exported)
    for group, lr, weight_decay in zip(adamw.param_groups, (0.1, 0.01), (0.3, 0.01), strict=True):
        assert (group["lr"], group["weight_decay"]) == (lr, weight_decay)
        assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-7)
    assert set(adamw.param_groups[0]) == set(torch.optim.AdamW(copies).param_groups[0])

    for param, copy, blocks in zip(params, copies, BLOCKS, strict=True):
        ours, theirs = optimizer.state[param], adamw.state[copy]
        assert set(theirs) == {"step", "exp_avg", "exp_avg_sq"}
        assert theirs["step"] == 3
        if param.dim() < 2:
            assert_same_bits(theirs["exp_avg"], ours["exp_avg"])
            assert_same_bits(theirs["exp_avg_sq"], ours["exp_avg_sq"])
            continue
        expected = whole_moment(ours["exp_avg_sq_row"], ours["exp_avg_sq_col"], blocks)
        torch.testing.assert_close(theirs["exp_avg_sq"].double(), expected, rtol=1e-5, atol=1e-42)

    # with a gradient of zeros both divide the same momentum by the same roots, above the floor
    set_gradients(params, 3, 0.0)
    set_gradients(copies, 3, 0.0)
    before = [param.detach().clone() for param in params]
    optimizer.step()
    adamw.step()
    for param, copy, old in zip(params, copies, before, strict=True):
        theirs = adamw.state[copy]
        root = (theirs["exp_avg_sq"] / (1 - 0.95**4)).sqrt()
        floor = oracle.u(4, 0.8, 0.95, nesterov=False) ** 0.5 * theirs["exp_avg"].abs()
        above = (root > floor) | torch.tensor(param.dim() < 2)
        assert above.float().mean() > 0.9
        torch.testing.assert_close((copy - old)[above], (param - old)[above], rtol=1e-4, atol=3e-6)


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_the_export_shares_no_memory(momentum_dtype: str) -> None:
    params = make_params()
    optimizer = striped(params, momentum_dtype=momentum_dtype)
    before = {
        (i, key): value.clone()
        for i, param in enumerate(params)
        for key, value in optimizer.state[param].items()
    }
    for state in adamw_state_dict(optimizer)["state"].values():
        for value in state.values():
            value.fill_(7)
    for (i, key), value in before.items():
        assert_same_bits(optimizer.state[params[i]][key], value)


@pytest.mark.parametrize(("old", "new"), [("float32", "int8"), ("int8", "int4"), ("int4", "int8")])
def test_another_format_continues_only_through_the_export(old: str, new: str) -> None:
    params = make_params()
    optimizer = striped(params, momentum_dtype=old)
    groups = [{"params": params[:2], "blocks": BLOCKS[:2]}, {"params": params[2:]}]
    other = StripedAdamW(groups, momentum_dtype=new)
    with pytest.raises(ValueError, match=f"momentum_dtype='{old}'.*momentum_dtype='{new}'"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state

    exported = adamw_state_dict(optimizer)
    other.load_state_dict(exported)
    again = StripedAdamW([{"params": params[:2], "blocks": BLOCKS[:2]}, {"params": params[2:]}])
    again.load_state_dict(exported)  # in float32, for comparison
    for i, param in enumerate(params):
        assert other.param_groups[0]["momentum_dtype"] == new
        ours, theirs = optimizer.state[param], other.state[param]
        for key in ours.keys() & {"exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "step"}:
            torch.testing.assert_close(theirs[key], ours[key], rtol=1e-5, atol=0)
        assert_same_bits(again.state[param]["exp_avg"], exported["state"][i]["exp_avg"])


def test_names_schedules_and_parameters_without_state() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    optimizer = StripedAdamW(model.named_parameters(), lr=0.5)
    torch.optim.lr_scheduler.LinearLR(optimizer)
    model[1](torch.randn(3, 6)).sum().backward()
    optimizer.step()
    exported = adamw_state_dict(optimizer)
    (group,) = exported["param_groups"]
    assert group["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert group["initial_lr"] == 0.5
    assert group["params"] == [0, 1, 2, 3]
    assert set(exported["state"]) == {2, 3}
    adamw = torch.optim.AdamW(model.named_parameters())
    adamw.load_state_dict(exported)
    model(torch.randn(3, 4)).sum().backward()
    adamw.step()


def test_low_precision_parameters() -> None:
    params = make_params(torch.bfloat16)
    optimizer = striped(params, momentum_dtype="int8")
    for state in adamw_state_dict(optimizer)["state"].values():
        assert {value.dtype for value in state.values()} == {torch.float32}


def test_rows_of_zeros_stay_zero() -> None:
    param = nn.Parameter(torch.randn(4, 6))
    optimizer = StripedAdamW([{"params": [param], "blocks": (2, 1)}])
    param.grad = torch.zeros(4, 6)
    param.grad[3, 1:4] = 2.0
    optimizer.step()
    state = adamw_state_dict(optimizer)["state"][0]
    assert_same_bits(state["exp_avg_sq"] > 0, param.grad > 0)


def test_the_export_of_another_optimizer_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"AdamW has no momentum_dtype.*pass a StripedAdamW"):
        adamw_state_dict(torch.optim.AdamW([nn.Parameter(torch.zeros(2))]))
