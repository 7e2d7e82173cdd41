"""Steps that recognize the tensors of the step before do what the full check would do."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_checks import assert_same_snapshot, parameters, snapshot

from striped_hf import StripedAdamW
from striped_hf.optim import backends, known

BF16 = torch.bfloat16
SHAPES = [(6, 8), (12, 130), (9,), (4, 3, 3, 3), (12, 130)]
BAD = 1  # the parameter that the changes change


@pytest.fixture(scope="module", params=["reference", "cpu", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    try:
        backends.resolve(request.param, "cpu")
    except RuntimeError as error:
        pytest.skip(str(error))
    return request.param


def optimizer_of(backend: str, **options: Any) -> StripedAdamW:
    draw = torch.Generator().manual_seed(1)
    ps = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]
    groups = [{"params": ps[:3]}, {"params": ps[3:], "weight_decay": 0.0}]
    return StripedAdamW(groups, 0.01, momentum_dtype="int8", backend=backend, **options)


def give_gradients(optimizer: StripedAdamW, t: int) -> None:
    draw = torch.Generator().manual_seed(t)
    for p in parameters(optimizer):
        p.grad = None
        p.grad = torch.randn(p.shape, generator=draw).to(p.dtype)


def forget(optimizer: StripedAdamW) -> None:
    optimizer._known.forget()


def try_step(optimizer: StripedAdamW) -> str:
    try:
        optimizer.step()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


# ---------------------------------------------------------------------------------------------
# changes between two steps, of a parameter, its gradient, its state or the groups
# ---------------------------------------------------------------------------------------------

Change = Callable[[StripedAdamW, torch.nn.Parameter], Any]


def of_data(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Replaces the memory of a parameter, whose gradient has the new shape and dtype."""

    def apply(_: StripedAdamW, p: torch.nn.Parameter) -> None:
        grad, p.grad = p.grad, None
        p.data = change(p.data)
        fits = p.numel() == grad.numel()
        p.grad = (grad.reshape(p.shape) if fits else torch.ones_like(p)).to(p.dtype)

    return apply


def of_grad(change: Callable[[torch.Tensor], torch.Tensor | None]) -> Change:
    def apply(_: StripedAdamW, p: torch.nn.Parameter) -> None:
        if p.grad is not None:
            p.grad = change(p.grad)

    return apply


def of_state(key: str, change: Callable[[torch.Tensor], Any]) -> Change:
    """Replaces a tensor of the state, or changes it in place if ``change`` returns None."""

    def apply(optimizer: StripedAdamW, p: torch.nn.Parameter) -> None:
        state = optimizer.state[p]
        changed = change(state[key])
        if changed is not None:
            state[key] = changed

    return apply


def in_place(change: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], None]:
    def apply(tensor: torch.Tensor) -> None:
        change(tensor)

    return apply


def of_group(**options: Any) -> Change:
    return lambda optimizer, _: optimizer.param_groups[0].update(options)


def shrink(tensor: torch.Tensor) -> None:
    """Makes the storage four bytes smaller, for which torch allocates other memory."""
    storage = tensor.untyped_storage()
    before = storage.data_ptr()
    storage.resize_(storage.nbytes() - 4)
    assert storage.data_ptr() != before  # known.py reads the sizes of storages that have moved


def free(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().resize_(0)


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    buffer = torch.empty(tensor.numel() + 1)
    buffer[1:] = tensor.flatten()
    return buffer[1:].view(tensor.shape)


def in_half_of_a_buffer(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a view of a storage that is then made as small as the tensor's own."""
    buffer = torch.zeros(2 * tensor.numel())
    view = buffer[tensor.numel() :].view(tensor.shape)
    buffer.untyped_storage().resize_(tensor.nbytes)
    return view


def flatten(p: torch.nn.Parameter) -> None:
    """Moves a parameter into the middle of a larger tensor, and marks it, as FSDP1 does."""
    flat = torch.zeros(p.numel() + 64)
    p.data = flat[64:].view(p.shape).copy_(p.detach())
    p._fsdp_flattened = True


def give_dtype(p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    p.grad_dtype = None
    return p.grad.to(dtype)


def swap(optimizer: StripedAdamW, p: torch.nn.Parameter) -> None:
    grad, p.grad = p.grad, None
    torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach() + 1))
    p.grad = grad


def remove_parameter(optimizer: StripedAdamW, _: torch.nn.Parameter) -> None:
    del optimizer.param_groups[0]["params"][0]


def add_parameter(optimizer: StripedAdamW, _: torch.nn.Parameter) -> None:
    added = torch.nn.Parameter(torch.ones(5, 7))
    added.grad = torch.ones(5, 7)
    optimizer.param_groups[0]["params"].insert(0, added)


def load(optimizer: StripedAdamW, _: torch.nn.Parameter) -> None:
    state_dict = optimizer.state_dict()
    for state in state_dict["state"].values():
        state["step"] += 5
    optimizer.load_state_dict(state_dict)


CHANGES: dict[str, Change] = {
    "nothing": lambda *_: None,
    "param: other memory": of_data(lambda x: x + 1),
    "param: unaligned": of_data(unaligned),
    "param: bfloat16": of_data(lambda x: x.bfloat16()),
    "param: float64": of_data(lambda x: x.double()),
    "param: other shape": of_data(lambda x: x[:5].clone()),
    "param: same memory, other shape": of_data(lambda x: x.view(130, 12)),
    "param: same memory, one dimension": of_data(lambda x: x.view(-1)),
    "param: other strides": of_data(lambda x: x.T.contiguous().T),
    "param: negative view": of_data(lambda x: torch._neg_view(x)),
    "param: expanded": of_data(lambda x: x[:1].expand(12, -1)),
    "param: freed": lambda _, p: free(p),
    "param: shrunk": lambda _, p: shrink(p),
    "param: empty": of_data(lambda x: x[:0]),
    "param: flattened by FSDP1": lambda _, p: flatten(p),
    "param: frozen": lambda _, p: p.requires_grad_(False),
    "param: swapped": swap,
    "grad: none": of_grad(lambda _: None),
    "grad: other strides": of_grad(lambda g: g.T.contiguous().T),
    "grad: expanded": of_grad(lambda g: g[:1].expand(12, -1)),
    "grad: unaligned": of_grad(unaligned),
    "grad: sparse": of_grad(lambda g: g.to_sparse()),
    "grad: negative view": of_grad(lambda g: torch._neg_view(g)),
    "grad: zero tensor": of_grad(lambda g: torch._efficientzerotensor(g.shape)),
    "grad: freed": lambda _, p: p.grad is not None and free(p.grad),
    "grad: shrunk": lambda _, p: p.grad is not None and shrink(p.grad),
    "grad: beyond its storage": of_grad(in_half_of_a_buffer),
    "state: copied": of_state("exp_avg", torch.clone),
    "state: other dtype": of_state("exp_avg_sq_row", lambda x: x.bfloat16()),
    "state: other shape": of_state("exp_avg_sq_col", lambda x: x[..., :-1].contiguous()),
    "state: resized": of_state("exp_avg", in_place(lambda x: x.resize_(3))),
    "state: squeezed": of_state("exp_avg_sq_row", in_place(lambda x: x.squeeze_())),
    "state: transposed": of_state("exp_avg", in_place(lambda x: x.t_())),
    "state: other strides": of_state("exp_avg", lambda x: x.T.contiguous().T),
    "state: lazily negative": of_state("exp_avg_sq_row", lambda x: torch._neg_view(x)),
    "state: lazily negative in place": of_state(
        "exp_avg_sq_row", lambda x: setattr(x, "data", torch._neg_view(x.data))
    ),
    "state: freed": of_state("exp_avg", free),
    "state: shrunk": of_state("exp_avg_scale", shrink),
    "state: a number": of_state("exp_avg_sq_row", lambda _: 1.0),
    "state: on another device": of_state("exp_avg_sq_row", lambda x: x.to("meta")),
    "state: one tensor missing": lambda o, p: o.state[p].pop("exp_avg"),
    "state: one entry more": lambda o, p: o.state[p].update(more=torch.ones(2)),
    "state: another name": lambda o, p: o.state[p].update(more=o.state[p].pop("exp_avg")),
    "state: dropped": lambda o, p: o.state.pop(p),
    "state: emptied": lambda o, p: o.state[p].clear(),
    "state: all dropped": lambda o, _: o.state.clear(),
    "state: another order": lambda o, p: o.state.update(
        {p: dict(reversed(list(o.state[p].items())))}
    ),
    "step: other value": of_state("step", lambda x: x + 7),
    "step: changed in place": of_state("step", in_place(lambda x: x.fill_(9))),
    "step: first": of_state("step", torch.zeros_like),
    "step: other dtype": of_state("step", lambda x: x.bfloat16()),
    "step: a list": of_state("step", lambda x: x.view(1)),
    "step: a number": of_state("step", lambda _: 3),
    "group: lr": of_group(lr=0.5),
    "group: lr as a tensor": of_group(lr=torch.tensor(0.5)),
    "group: betas": of_group(betas=(0.5, 0.9)),
    "group: lagged": of_group(lagged=True),
    "group: maximize": of_group(maximize=True),
    "group: momentum_dtype": of_group(momentum_dtype="int4"),
    "group: blocks": of_group(blocks=(2, 2)),
    "group: a list of blocks": of_group(blocks=[(1, 1)] * 3),
    "group: an option missing": lambda o, _: o.param_groups[0].pop("nesterov"),
    "group: reversed": lambda o, _: o.param_groups[0]["params"].reverse(),
    "group: a parameter removed": remove_parameter,
    "group: a parameter added": add_parameter,
    "group: swapped groups": lambda o, _: o.param_groups.reverse(),
    "group: merged": lambda o, _: o.param_groups[0]["params"].extend(
        o.param_groups.pop()["params"]
    ),
    "optimizer: loaded": load,
    "optimizer: other backend": lambda o, _: setattr(o, "backend", "reference"),
}


# of these, the Triton backend keeps something; its interpreter is too slow for all changes
OF_TRITON = (
    "nothing",
    "param: other memory",
    "param: unaligned",
    "param: bfloat16",
    "param: other strides",
    "grad: none",
    "grad: unaligned",
    "grad: other strides",
    "state: copied",
    "step: other value",
    "step: first",
    "group: lagged",
    "group: reversed",
    "group: merged",
    "optimizer: loaded",
)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_between_two_steps(name: str, backend: str) -> None:
    """Both optimizers see the same change, and only one of them recognizes tensors."""
    if backend == "triton" and name not in OF_TRITON:
        pytest.skip("the Triton backend keeps nothing that depends on it")
    check_a_change(CHANGES[name], backend)


def check_a_change(change: Change, backend: str) -> None:
    outcomes = []
    for recognizes in (True, False):
        optimizer = optimizer_of(backend)
        p = parameters(optimizer)[BAD]
        for t in range(4):
            give_gradients(optimizer, t)
            optimizer.step()
        assert len(optimizer._known) == 2
        give_gradients(optimizer, 4)
        before = snapshot_of(optimizer)
        change(optimizer, p)
        changed = snapshot_of(optimizer)
        found = []
        for t in range(3):
            if not recognizes:
                forget(optimizer)
            found.append(try_step(optimizer))
            if found[-1] == "no error":
                give_gradients(optimizer, 5 + t)
        outcomes.append((found, snapshot_of(optimizer)))
        if found[-1] != "no error" and before is not None and changed is not None:
            assert_same_snapshot(outcomes[-1][1], changed)  # a refused step changes nothing
    (found, ours), (expected, theirs) = outcomes
    assert found == expected
    if ours is not None:
        assert_same_snapshot(ours, theirs)


def snapshot_of(optimizer: StripedAdamW) -> Any:
    """A snapshot; None if a tensor has no values, or no memory, to copy."""
    tensors = [*parameters(optimizer)]
    tensors += [v for state in optimizer.state.values() for v in state.values()]
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta or tensor.is_sparse:
            return None
        end = tensor.storage_offset() + tensor.numel()
        if tensor.untyped_storage().nbytes() < end * tensor.itemsize:
            return None
    return snapshot(optimizer)


def test_changes_of_the_gradients_dtype(backend: str) -> None:
    results = []
    for recognizes in (True, False):
        optimizer = optimizer_of(backend)
        for t in range(8):
            give_gradients(optimizer, t)
            for p in parameters(optimizer) if t in (4, 5, 6) else ():
                grad, p.grad = p.grad, None
                p.grad_dtype = None
                p.grad = grad.to(BF16)
            if not recognizes:
                forget(optimizer)
            optimizer.step()
        results.append(snapshot(optimizer))
    assert_same_snapshot(*results)


@pytest.mark.parametrize("has_guards", [True, False], ids=["torch's guards", "without them"])
def test_recognized_steps_build_no_entries(
    has_guards: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain loop is recognized from the third step on, with or without torch's private guards."""
    if not has_guards:
        monkeypatch.setattr(known, "_TensorGuards", None)
    optimizer = optimizer_of("reference")
    recognized = []
    check = type(optimizer)._check

    def watched(self: StripedAdamW, found: list[Any]) -> Any:
        recognized.append([each is not None for each in found])
        return check(self, found)

    monkeypatch.setattr(type(optimizer), "_check", watched)
    for t in range(6):
        give_gradients(optimizer, t)
        optimizer.param_groups[0]["lr"] = 0.01 / (1 + t)
        if t == 4:
            parameters(optimizer)[0].grad = None
        optimizer.step()
    # the kernel is stepped in another shape, but in its own memory
    both, neither = [True, True], [False, False]
    assert recognized == [neither, neither, both, both, [False, True], [False, True]]


@pytest.mark.parametrize("has_guards", [True, False], ids=["torch's guards", "without them"])
def test_changes_without_torchs_guards(has_guards: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_guards:
        monkeypatch.setattr(known, "_TensorGuards", None)
    for name, change in CHANGES.items():
        if name.startswith(("param", "grad", "state")):
            check_a_change(change, "reference")


def test_nothing_keeps_gradients_or_state_alive(backend: str) -> None:
    optimizer = optimizer_of(backend)
    for t in range(5):
        give_gradients(optimizer, t)
        optimizer.step()
    assert optimizer._known
    p = parameters(optimizer)[BAD]
    gone = [weakref.ref(p.grad), *map(weakref.ref, optimizer.state[p].values())]
    p.grad = None
    del optimizer.state[p]
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)


def test_steps_at_the_end_of_float32s_integers() -> None:
    """A step of 2^24 stays, as it does in torch's optimizers."""
    optimizer = optimizer_of("reference")
    for t in range(6):
        give_gradients(optimizer, t)
        optimizer.step()
        for state in optimizer.state.values():
            assert float(state["step"]) == (t + 1 if t < 4 else 2.0**24)
            if t >= 3:
                state["step"].fill_(2**24 - 1 + (t > 3))
