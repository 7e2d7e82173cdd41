"""Tensors that no longer fit each other, and tensors that are not plain."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_checks import (
    FORMATS,
    Follower,
    assert_same_bits,
    assert_same_snapshot,
    parameter,
    snapshot,
)
from torch.testing._internal.two_tensor import TwoTensor

from striped_hf import StripedAdamW

pytestmark = pytest.mark.usefixtures("every_backend")


def stepped(named: bool = True, **settings: Any) -> tuple[StripedAdamW, list[torch.nn.Parameter]]:
    """An optimizer after two steps; the tests change the parameter in the middle."""
    ps = [parameter(torch.randn(shape)) for shape in [(6, 8), (12, 130), (9,)]]
    names = ["first", "the.bad.one", "last"]
    optimizer = StripedAdamW(list(zip(names, ps, strict=True)) if named else ps, **settings)
    for _ in range(2):
        give_gradients(ps)
        optimizer.step()
    return optimizer, ps


def give_gradients(ps: list[torch.nn.Parameter]) -> None:
    for p in ps:
        p.grad = None
        p.grad = torch.randn_like(p)


def assert_refused(optimizer: StripedAdamW, *words: str) -> None:
    """The step's error names the cause, and nothing has changed."""
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert_same_snapshot(snapshot(optimizer), before)


# ---------------------------------------------------------------------------------------------
# misfits
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum_dtype", FORMATS)
@pytest.mark.parametrize("shape", [(5000, 130), (3, 130), (12, 131), (2, 6, 130), (1560,), (0, 5)])
def test_a_parameter_of_another_shape(shape: tuple[int, ...], momentum_dtype: str) -> None:
    optimizer, ps = stepped(momentum_dtype=momentum_dtype)
    ps[1].grad = None
    ps[1].data = torch.randn(shape)
    give_gradients(ps)
    assert_refused(optimizer, "the.bad.one", "exp_avg", str(shape), "state.pop")
    optimizer.state.pop(ps[1])
    optimizer.step()  # the fix that the message names


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_a_parameter_of_another_shape_whose_state_fits(momentum_dtype: str) -> None:
    """A kernel [12, 1, 130] is stepped as a matrix [12, 130], the shape from before."""
    optimizer, ps = stepped(momentum_dtype=momentum_dtype)
    ps[1].grad = None
    ps[1].data = torch.randn(12, 1, 130)
    give_gradients(ps)
    assert_refused(optimizer, "the.bad.one", "had shape (12, 130)", "state.pop")
    optimizer.state.pop(ps[1])
    optimizer.step()


def change_dtype(state: dict[str, torch.Tensor]) -> str:
    state["exp_avg_sq_row"] = state["exp_avg_sq_row"].bfloat16()
    return "exp_avg_sq_row"


def change_step(state: dict[str, torch.Tensor]) -> str:
    state["step"] = state["step"].bfloat16()
    return "step"


def change_device(state: dict[str, torch.Tensor]) -> str:
    state["exp_avg_sq_col"] = state["exp_avg_sq_col"].to("meta")
    return "exp_avg_sq_col"


def change_shape(state: dict[str, torch.Tensor]) -> str:
    state["exp_avg_sq_col"] = state["exp_avg_sq_col"][..., :-1].contiguous()
    return "exp_avg_sq_col"


def shrink_in_place(state: dict[str, torch.Tensor]) -> str:
    state["exp_avg"].resize_(3)  # the same object
    return "exp_avg"


def remove(state: dict[str, torch.Tensor]) -> str:
    del state["exp_avg"]
    return "exp_avg"


def replace_by_a_number(state: dict[str, Any]) -> str:
    state["exp_avg_sq_row"] = 1.0
    return "exp_avg_sq_row"


def make_sparse(state: dict[str, torch.Tensor]) -> str:
    state["exp_avg_sq_row"] = state["exp_avg_sq_row"].to_sparse()
    return "exp_avg_sq_row"


def negate_lazily(state: dict[str, torch.Tensor]) -> str:
    state["exp_avg_sq_row"] = torch._neg_view(state["exp_avg_sq_row"])
    return "exp_avg_sq_row"


def wrap(state: dict[str, torch.Tensor]) -> str:
    state["exp_avg_sq_row"] = TwoTensor(state["exp_avg_sq_row"], state["exp_avg_sq_row"])
    return "exp_avg_sq_row"


def free(state: dict[str, torch.Tensor]) -> str:
    state["exp_avg"].untyped_storage().resize_(0)
    return "exp_avg"


def shrink_memory(state: dict[str, torch.Tensor]) -> str:
    storage = state["exp_avg_sq_row"].untyped_storage()
    storage.resize_(storage.nbytes() - 4)  # the tensor's shape stays
    return "exp_avg_sq_row"


def expand(state: dict[str, torch.Tensor]) -> str:
    state["exp_avg"] = state["exp_avg"][:1].expand(12, -1)
    return "exp_avg"


def replace_by_zeros(state: dict[str, torch.Tensor]) -> str:
    state["exp_avg_sq_col"] = torch._efficientzerotensor((1, 130))
    return "exp_avg_sq_col"


STATE_CHANGES = [
    shrink_memory,
    expand,
    replace_by_zeros,
    change_dtype,
    change_step,
    change_device,
    change_shape,
    shrink_in_place,
    remove,
    replace_by_a_number,
    make_sparse,
    negate_lazily,
    wrap,
    free,
]


@pytest.mark.parametrize("named", [True, False], ids=["named", "by index"])
@pytest.mark.parametrize("change", STATE_CHANGES, ids=lambda change: change.__name__)
def test_a_state_that_other_code_changed(
    change: Callable[[dict[str, torch.Tensor]], str], named: bool
) -> None:
    optimizer, ps = stepped(named)
    key = change(optimizer.state[ps[1]])
    give_gradients(ps)
    others = [p.detach().clone() for p in ps]
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    for word in (
        "the.bad.one" if named else "parameter 1 of param group 0",
        repr(key),
        "(12, 130)",
    ):
        assert word in str(caught.value)
    for p, before in zip(ps, others, strict=True):
        assert_same_bits(p, before)
    assert float(optimizer.state[ps[0]]["step"]) == 2


@pytest.mark.parametrize("new", FORMATS)
@pytest.mark.parametrize("old", FORMATS)
def test_a_momentum_format_changed_after_a_step(old: str, new: str) -> None:
    optimizer, ps = stepped(momentum_dtype=old)
    optimizer.param_groups[0]["momentum_dtype"] = new
    give_gradients(ps)
    if old == new:
        optimizer.step()
    else:
        assert_refused(optimizer, "momentum_dtype", new, "exp_avg")


def test_a_pair_of_blocks_changed_after_a_step() -> None:
    optimizer, ps = stepped()
    optimizer.param_groups[0]["blocks"] = (2, 2)
    give_gradients(ps)
    assert_refused(optimizer, "blocks", "(2, 2)", "(1, 1)", "param group 0")
    optimizer.param_groups[0]["blocks"] = (1, 1)
    optimizer.step()


def test_a_gradient_of_another_shape() -> None:
    optimizer, ps = stepped()
    ps[1].data = torch.randn(12, 4)  # it still has the old parameter's gradient
    assert_refused(optimizer, "the.bad.one", "gradient")


def test_a_parameter_whose_memory_was_freed() -> None:
    optimizer, ps = stepped()
    give_gradients(ps)
    kept = ps[1].detach().clone()
    storage = ps[1].untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    with pytest.raises(RuntimeError, match=r"the\.bad\.one.*no memory"):
        optimizer.step()
    storage.resize_(size)
    ps[1].data.copy_(kept)
    optimizer.step()


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p[:1].expand(12, -1),
        lambda p: torch._efficientzerotensor(p.shape),
    ],
    ids=["expanded", "a zero tensor"],
)
def test_a_parameter_that_cannot_be_written(
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    optimizer, ps = stepped()
    give_gradients(ps)
    grad, ps[1].grad = ps[1].grad, None
    ps[1].data = change(ps[1].data)
    ps[1].grad = grad
    assert_refused(optimizer, "the.bad.one")


@pytest.mark.parametrize("where", ["parameter", "gradient"])
def test_memory_made_smaller(where: str) -> None:
    optimizer, ps = stepped()
    give_gradients(ps)
    tensor = ps[1].data if where == "parameter" else ps[1].grad
    before, storage = ps[0].detach().clone(), tensor.untyped_storage()
    storage.resize_(storage.nbytes() - 4)
    with pytest.raises(RuntimeError, match=r"the\.bad\.one.*no memory"):
        optimizer.step()
    assert_same_bits(ps[0], before)


def unaligned(values: torch.Tensor) -> torch.Tensor:
    """The same values at an address that is no multiple of their size."""
    memory = bytearray(values.nbytes + 1)
    return torch.frombuffer(memory, dtype=values.dtype, offset=1).view(values.shape).copy_(values)


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_unaligned_memory(momentum_dtype: str) -> None:
    """As ``torch.frombuffer`` makes it from a file read at any offset."""
    shapes = [(12, 130), (9,)]
    ours = [parameter(unaligned(torch.randn(shape))) for shape in shapes]
    theirs = [parameter(p.detach().clone()) for p in ours]
    optimizers = [StripedAdamW(ps, momentum_dtype=momentum_dtype) for ps in (ours, theirs)]
    for t in range(3):
        for p, q in zip(ours, theirs, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = unaligned(q.grad)
            if t == 2:
                optimizers[0].state[p]["exp_avg"] = unaligned(optimizers[0].state[p]["exp_avg"])
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_harmless_changes_are_accepted() -> None:
    """Another dtype of the parameter, a step on another device, an entry of another library."""
    optimizer, ps = stepped()
    ps[1].grad = None
    ps[1].data = ps[1].data.bfloat16()
    optimizer.state[ps[1]]["of_another"] = torch.ones(3)
    optimizer.state[ps[2]]["note"] = "text"
    give_gradients(ps)
    optimizer.step()
    assert ps[1].isfinite().all()
    assert float(optimizer.state[ps[1]]["step"]) == 3


# ---------------------------------------------------------------------------------------------
# lazy bits, zero tensors, wrappers
# ---------------------------------------------------------------------------------------------


def conjugate_part(g: torch.Tensor) -> torch.Tensor:
    """-g in the lazy form that autograd makes: the imaginary part of a conjugate."""
    return torch.complex(torch.zeros_like(g), g).conj().imag


LAZY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "negative view": torch._neg_view,
    "imaginary part of a conjugate": conjugate_part,
    "zero tensor": lambda g: torch._efficientzerotensor(g.shape),
}


@pytest.mark.parametrize("kind", LAZY)
@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_a_lazy_gradient_equals_its_values(momentum_dtype: str, kind: str) -> None:
    shapes = [(5, 7), (5, 7), (11,), (2, 3, 130)]
    lazy = [parameter(torch.ones(shape)) for shape in shapes]
    plain = [parameter(torch.ones(shape)) for shape in shapes]
    optimizers = [StripedAdamW(ps, momentum_dtype=momentum_dtype) for ps in (lazy, plain)]
    for t in range(3):
        for p, q in zip(lazy, plain, strict=True):
            p.grad = LAZY[kind](torch.randn_like(p))
            if t == 1:  # with a history of values
                p.grad = torch.randn_like(p)
            q.grad = (p.grad + 0).contiguous()
        for optimizer in optimizers:
            optimizer.step()
    assert_same_snapshot(snapshot(optimizers[0]), snapshot(optimizers[1]))


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_a_lazily_negated_parameter(momentum_dtype: str) -> None:
    values, g = torch.randn(4, 130), torch.randn(4, 130)
    lazy, plain = parameter(torch.zeros(4, 130)), parameter(-values)
    lazy.data = torch._neg_view(values)
    for p in (lazy, plain):
        optimizer = StripedAdamW([p], lr=0.1, momentum_dtype=momentum_dtype)
        p.grad = g.clone()
        optimizer.step()
    torch.testing.assert_close(lazy.resolve_neg(), plain, rtol=0, atol=0)


class Wrapper(torch.Tensor):
    """A wrapper around another tensor, as in quantized training."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        kwargs = {"dtype": inner.dtype, "device": inner.device}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), **kwargs)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(x: Any) -> Any:
            return x.inner if isinstance(x, Wrapper) else x

        out = func(*map(unwrap, args), **{k: unwrap(v) for k, v in (kwargs or {}).items()})
        if func is torch.ops.aten.copy_.default:
            return args[0]
        return cls(out) if func is torch.ops.aten.detach.default else out


@pytest.mark.parametrize("wrap_gradient", [False, True])
@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_a_wrapper_is_stepped_like_its_tensor(momentum_dtype: str, wrap_gradient: bool) -> None:
    values = [torch.randn(6, 130), torch.randn(7)]
    wrapped = [torch.nn.Parameter(Wrapper(value.clone())) for value in values]
    plain = [parameter(value.clone()) for value in values]
    optimizers = [StripedAdamW(ps, momentum_dtype=momentum_dtype) for ps in (wrapped, plain)]
    for _ in range(3):
        for p, q in zip(wrapped, plain, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = Wrapper(q.grad.clone()) if wrap_gradient else q.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(wrapped, plain, strict=True):
        assert_same_bits(p.inner, q)


def test_a_wrapper_of_two_tensors_is_an_error() -> None:
    p = torch.nn.Parameter(TwoTensor(torch.randn(4, 6), torch.randn(4, 6)))
    optimizer = StripedAdamW([("the.bad.one", p)])
    p.grad = TwoTensor(torch.randn(4, 6), torch.randn(4, 6))
    before = p.a.clone()
    with pytest.raises(RuntimeError, match=r"the\.bad\.one.*TwoTensor"):
        optimizer.step()
    assert_same_bits(p.a, before)
    assert not optimizer.state


class Tagged(torch.nn.Parameter):
    """A subclass with ordinary memory."""


def test_a_subclass_without_a_dispatch_of_its_own_is_stepped_in_place() -> None:
    p = Tagged(torch.randn(4, 6))
    address = p.data_ptr()
    follower = Follower(StripedAdamW([p]), rtol=4e-6)
    for _ in range(3):
        p.grad = torch.randn(4, 6)
        follower.step()
    assert p.data_ptr() == address


# ---------------------------------------------------------------------------------------------
# loading that fails
# ---------------------------------------------------------------------------------------------


BAD_LOADS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "on meta": lambda s: s["state"][1].update(exp_avg=s["state"][1]["exp_avg"].to("meta")),
    "sparse": lambda s: s["state"][1].update(
        exp_avg_sq_col=s["state"][1]["exp_avg_sq_col"].to_sparse()
    ),
    "a step below zero": lambda s: s["state"][2].update(step=torch.tensor(-3.0)),
    "half a step": lambda s: s["state"][2].update(step=torch.tensor(1.5)),
    "a step that is NaN": lambda s: s["state"][2].update(step=torch.tensor(torch.nan)),
    "an infinite scale": lambda s: s["state"][1]["exp_avg_scale"].fill_(torch.inf),
    "a negative scale": lambda s: s["state"][1]["exp_avg_scale"].neg_(),
    "beta1 = 1": lambda s: s["param_groups"][0].update(betas=(1.0, 0.9)),
    "one beta": lambda s: s["param_groups"][0].update(betas=(0.5,)),
    "lr = inf": lambda s: s["param_groups"][0].update(lr=float("inf")),
    "eps < 0": lambda s: s["param_groups"][0].update(eps=-1e-8),
    "weight_decay = NaN": lambda s: s["param_groups"][0].update(weight_decay=float("nan")),
    "maximize = 2": lambda s: s["param_groups"][0].update(maximize=2),
}


@pytest.mark.parametrize("damage", BAD_LOADS.values(), ids=BAD_LOADS)
def test_a_load_that_fails_changes_nothing(damage: Callable[[dict[str, Any]], Any]) -> None:
    optimizer, ps = stepped(momentum_dtype="int8")
    saved = copy.deepcopy(optimizer.state_dict())
    give_gradients(ps)
    optimizer.step()
    saved["param_groups"][0]["lr"] = 0.5
    damage(saved)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="state dict"):
        optimizer.load_state_dict(saved)
    assert_same_snapshot(snapshot(optimizer), before)
    optimizer.step()


@pytest.mark.parametrize("copies", range(10))
def test_a_load_without_memory_changes_nothing(
    copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, ps = stepped(momentum_dtype="int8")
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.5
    give_gradients(ps)
    optimizer.step()
    before = snapshot(optimizer)
    made, real = [], torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(self)
        if len(made) > copies:
            raise MemoryError("no memory")
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", to)
        with pytest.raises(MemoryError):
            optimizer.load_state_dict(saved)
    assert_same_snapshot(snapshot(optimizer), before)


def test_codes_of_another_adamw_are_not_loaded_as_numbers() -> None:
    p = parameter(torch.randn(4, 130))
    adamw = torch.optim.AdamW([p])
    p.grad = torch.randn(4, 130)
    adamw.step()
    for key in ("exp_avg", "exp_avg_sq"):
        saved = copy.deepcopy(adamw.state_dict())
        saved["state"][0][key] = saved["state"][0][key].to(torch.int8)
        optimizer = StripedAdamW([p], momentum_dtype="int8")
        with pytest.raises(ValueError, match=f"{key}.*int8.*float32"):
            optimizer.load_state_dict(saved)
        assert not optimizer.state
