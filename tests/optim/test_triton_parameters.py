"""The Triton backend with several parameters in one step, and with other layouts."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from optim_checks import (
    assert_same_bits,
    assert_same_snapshot,
    lay_out,
    parameter,
    parameters,
    set_grad,
    snapshot,
)
from triton_specs import (
    BF16,
    DEVICE,
    F16,
    ON_GPU,
    SPECS,
    STRIPES,
    Spec,
    assert_agrees,
    entry_of,
    gradient_of,
    optimizer_of,
    synchronise,
    triton_backend,
)

from striped_hf import StripedAdamW
from striped_hf.optim.backends import reference
from striped_hf.optim.backends.triton import statistics_kernels
from striped_hf.optim.options import settings_of
from striped_hf.optim.steps import count_step

# on a GPU these tests run compiled kernels, and `pytest -m gpu` runs them
pytestmark = [pytest.mark.gpu] if ON_GPU else []


def mixed_specs() -> list[Spec]:
    coded = [spec for spec in SPECS if not spec.flags and spec.momentum_dtype == "int8"]
    return [*coded[::4], Spec((5,)), Spec((), dtype=BF16), Spec((4, 130), dtype=F16)]


def test_other_parameters_change_no_bit() -> None:
    specs = mixed_specs()
    alone = [optimizer_of(spec, "triton") for spec in specs]
    groups = []
    for spec in specs:
        [p] = parameters(optimizer_of(spec, "triton"))
        groups.append({"params": [p], "blocks": spec.blocks, "momentum_dtype": spec.momentum_dtype})
    one_group = {"params": [group["params"][0] for group in groups], "momentum_dtype": "int8"}
    one_group["blocks"] = [group["blocks"] for group in groups]
    together = StripedAdamW([one_group], lr=0.01, weight_decay=0.1, backend="triton")
    for t in range(2):
        for spec, p, optimizer in zip(specs, parameters(together), alone, strict=True):
            optimizer.param_groups[0]["momentum_dtype"] = "int8"
            set_grad(p, gradient_of(spec, t))
            set_grad(parameters(optimizer)[0], gradient_of(spec, t))
            optimizer.step()
        together.step()
    for p, optimizer in zip(parameters(together), alone, strict=True):
        [q] = parameters(optimizer)
        assert_same_bits(p, q)
        for key, value in optimizer.state[q].items():
            assert_same_bits(together.state[p][key], value, key)


def test_runs_repeat_bit_for_bit() -> None:
    results = []
    for _ in range(2):
        optimizer = optimizer_of(Spec((40, 300), "int8", dtype=BF16), "triton")
        for t in range(2):
            set_grad(parameters(optimizer)[0], torch.randn(40, 300).to(DEVICE, BF16))
            torch.manual_seed(t)
            optimizer.step()
        results.append(snapshot(optimizer))
        torch.manual_seed(20240607)
    assert_same_snapshot(*results)


def test_gradients_may_have_new_addresses() -> None:
    """Their alignment and layout also differ from the step before."""
    spec = Spec((20, 128), "int8")
    ours, theirs = optimizer_of(spec, "triton"), optimizer_of(spec, "reference")
    for t in range(6):
        g = gradient_of(spec, t)
        set_grad(parameters(theirs)[0], g)
        if t % 3 == 1:
            buffer = torch.empty(g.numel() + 1, device=DEVICE)
            buffer[1:] = g.flatten()
            g = buffer[1:].view(g.shape)
        if t % 3 == 2:
            g = lay_out(g, "transposed")
        set_grad(parameters(ours)[0], g)
        ours.step()
        theirs.step()
        assert_agrees(ours, theirs)
        synchronise(ours, theirs)


def lagged_pair() -> tuple[list[Spec], list[StripedAdamW]]:
    """A lagged group with blocks of whole tiles, other blocks, a transposed matrix and a vector."""
    specs = [
        Spec((140, 256), "int8", (1, 2)),
        Spec((6, 9), "int8", (1, 3)),
        Spec((5, 7), "int8", layout="transposed"),
        Spec((3, 130), "int8"),
        Spec((9,)),
    ]
    pair = []
    for backend in ("triton", "reference"):
        group = {"params": [parameters(optimizer_of(spec, backend))[0] for spec in specs]}
        group["blocks"] = [spec.blocks for spec in specs]
        pair.append(
            StripedAdamW([group], 0.01, momentum_dtype="int8", lagged=True, backend=backend)
        )
    return specs, pair


@pytest.mark.parametrize("late", [0, 1, 3])
def test_a_first_step_among_later_ones(late: int) -> None:
    """A parameter has its first gradient in the second step of the others."""
    specs, (ours, theirs) = lagged_pair()
    for t in range(3):
        for optimizer in (ours, theirs):
            for i, (spec, p) in enumerate(zip(specs, parameters(optimizer), strict=True)):
                if (i, t) != (late, 0):
                    set_grad(p, gradient_of(spec, t))
            optimizer.step()
        assert_agrees(ours, theirs)
        synchronise(ours, theirs)


@pytest.mark.parametrize("blocks", [(1, 1), (1, 2), (1, 3), (2, 5)], ids=str)
def test_a_lagged_step_reads_gradients_once(
    monkeypatch: pytest.MonkeyPatch, blocks: tuple[int, int]
) -> None:
    """A border of blocks may lie within a tile. After the first step only the update sums."""
    optimizer = optimizer_of(Spec((6, 690), "int8", blocks, flags={"lagged": True}), "triton")
    [p] = parameters(optimizer)
    launched = []
    statistics_kernel = statistics_kernels.statistics_kernel

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launched.append(grid)
            return statistics_kernel[grid]

    monkeypatch.setattr(statistics_kernels, "statistics_kernel", Recorded())
    for t in range(3):
        p.grad = gradient_of(Spec((6, 690)), t)
        optimizer.step()
    assert len(launched) == 1


def test_a_lagged_step_equals_its_two_functions() -> None:
    """Sharded parameters use the two functions."""
    backend = triton_backend.new()
    specs, (ours, theirs) = lagged_pair()
    for t in range(3):
        for optimizer in (ours, theirs):
            for spec, p in zip(specs, parameters(optimizer), strict=True):
                set_grad(p, gradient_of(spec, t))
        [group] = ours._check([None])
        [(_, settings, table)], states, _ = ours._collect(0, group, [])
        count_step(states, capturable=False)
        roots = reference.stripes(table, backend.statistics(table), settings)
        backend.update(table, roots, settings)
        theirs.step()
        assert_agrees(ours, theirs)
        synchronise(ours, theirs)


def test_roots_may_change_between_the_two_functions() -> None:
    """Sharding changes the sums between the two functions; here they become four times as large."""
    spec = Spec((5, 40))
    optimizers = [optimizer_of(spec, "triton") for _ in range(2)]
    for optimizer in optimizers:
        set_grad(parameters(optimizer)[0], gradient_of(spec, 0))
        optimizer.step()
    settings = settings_of(optimizers[0].param_groups[0], capturable=False)
    entries = [[entry_of(parameters(o)[0], o)] for o in optimizers]
    backend = triton_backend.new()
    sums_of_each = [backend.statistics(of_one) for of_one in entries]
    expected = reference.statistics(entries[0])
    for sums in sums_of_each:  # the roots of other parameters of the same shapes
        assert sums[0] is not None
        for actual, wanted in zip(sums[0], expected[0], strict=True):
            torch.testing.assert_close(actual, wanted, **STRIPES)
    for of_one, sums in zip(entries, sums_of_each, strict=True):
        roots = reference.stripes(of_one, [tuple(4 * part for part in sums[0])], settings)
        backend.update(of_one, roots, settings)
    assert_same_snapshot(*(snapshot(o) for o in optimizers))


def test_other_strides_use_the_reference_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    triton_backend._warn_once.cache_clear()
    specs = [
        Spec((6, 10), "int8", layout="strided"),
        Spec((5,), layout="strided"),
        Spec((2, 3, 7), layout="permuted"),
        Spec((4, 6), "int8"),
    ]
    ours, theirs = (
        StripedAdamW(
            [
                {"params": parameters(optimizer_of(s, backend)), "momentum_dtype": s.momentum_dtype}
                for s in specs
            ],
            lr=0.01,
            backend=backend,
        )
        for backend in ("triton", "reference")
    )
    with caplog.at_level(logging.WARNING):
        for t in range(3):
            for optimizer in (ours, theirs):
                for spec, p in zip(specs, parameters(optimizer), strict=True):
                    set_grad(p, gradient_of(spec, t))
                optimizer.step()
    assert sum("contiguous" in record.message for record in caplog.records) == 1
    for p, q in list(zip(parameters(ours), parameters(theirs), strict=True))[:3]:
        assert_same_bits(p, q)
    torch.testing.assert_close(parameters(ours)[3], parameters(theirs)[3], rtol=1e-5, atol=1e-6)


def test_a_transposed_parameters_adamw_state_is_laid_out_anew() -> None:
    """AdamW's moments have the parameter's strides; the kernels need contiguous moments."""
    p = torch.nn.Parameter(torch.randn(6, 4).to(DEVICE).T)
    p.grad = torch.randn(6, 4).to(DEVICE).T
    adamw = torch.optim.AdamW([p])
    adamw.step()
    optimizer = StripedAdamW([p], momentum_dtype="bfloat16", backend="triton")
    optimizer.load_state_dict(adamw.state_dict())
    assert all(value.is_contiguous() for value in optimizer.state[p].values())


def test_no_entries_and_empty_tensors() -> None:
    empty, other = (parameter(torch.ones(shape), device=DEVICE) for shape in ((0, 5), (3, 5)))
    optimizer = StripedAdamW([empty, other], backend="triton")
    optimizer.step()
    empty.grad, other.grad = torch.ones_like(empty), torch.ones_like(other)
    optimizer.step()
    assert (other != 1).all()
    assert triton_backend.new().statistics([]) == []
