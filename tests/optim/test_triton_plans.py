"""The plans of the Triton backend: when they are made, kept and replaced."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from optim_checks import FORMATS, assert_same_bits, assert_same_snapshot, parameters, snapshot
from test_triton_capturable import warmed_up
from triton_specs import BF16, DEVICE, F32, ON_GPU, assert_agrees, synchronise

from striped_hf import StripedAdamW
from striped_hf.optim.backends.triton import plan as plan_module
from striped_hf.optim.backends.triton.plan import Plans

# on a GPU these tests run compiled kernels, and `pytest -m gpu` runs them
pytestmark = [pytest.mark.gpu] if ON_GPU else []

SHAPES = ((4, 160), (4, 160), (20, 128), (9,), (3, 7), (4, 160), (9,), (2, 3, 16))


def optimizer_of(backend: str = "triton", **options: Any) -> StripedAdamW:
    draw = torch.Generator().manual_seed(3)
    ps = [torch.nn.Parameter(torch.randn(shape, generator=draw).to(DEVICE)) for shape in SHAPES]
    return StripedAdamW(ps, 0.01, momentum_dtype="int8", backend=backend, **options)


def give_gradients(optimizer: StripedAdamW, t: int, chosen: list[int] | None = None) -> None:
    draw = torch.Generator().manual_seed(t)
    for i, p in enumerate(parameters(optimizer)):
        grad = torch.randn(p.shape, generator=draw).to(DEVICE)
        p.grad = grad if chosen is None or i in chosen else None


def give_unaligned_gradients(optimizer: StripedAdamW, t: int) -> None:
    """No row of these gradients begins at a whole vector."""
    give_gradients(optimizer, t)
    for p in parameters(optimizer):
        buffer = torch.empty(p.numel() + 1, device=DEVICE)
        buffer[1:] = p.grad.flatten()
        p.grad = buffer[1:].view(p.shape)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list of the kinds for which plans are made."""
    found: list[Any] = []

    class Counted(plan_module.Plan):
        def __init__(self, kinds: Any, *arguments: Any) -> None:
            found.append(kinds)
            super().__init__(kinds, *arguments)

    monkeypatch.setattr(plan_module, "Plan", Counted)
    return found


@pytest.mark.parametrize("lagged", [False, True])
@pytest.mark.parametrize("kept", [8192, 20], ids=["few sets", "many sets"])
def test_sets_of_gradients_that_keep_differing(
    kept: int, lagged: bool, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a few plans are made, and every step agrees with the reference."""
    monkeypatch.setattr(Plans, "ENTRIES_KEPT", kept)
    ours, theirs = optimizer_of(lagged=lagged), optimizer_of("reference", lagged=lagged)
    choose = random.Random(1)
    sets = [choose.sample(range(len(SHAPES)), choose.randint(1, 6)) for _ in range(16)]
    for t, chosen in enumerate(sets):
        for optimizer in (ours, theirs):
            give_gradients(optimizer, t, chosen)
            optimizer.step()
        assert_agrees(ours, theirs)
        synchronise(ours, theirs)
    before = len(made)
    for t, chosen in enumerate(sets):
        give_gradients(ours, t, chosen)
        ours.step()
    assert len(made) == before
    if kept < 8192:
        assert before <= 8
        [plans] = ours._backends["triton", DEVICE]._plans.values()
        assert len(plans._plans) == 1


def test_a_step_without_some_of_the_gradients_needs_no_plan(made: list[Any]) -> None:
    optimizer = optimizer_of()
    for t in range(len(SHAPES)):
        give_gradients(optimizer, t, None if t == 0 else [i for i in range(len(SHAPES)) if i != t])
        optimizer.step()
    assert len(made) == 1


def test_parameters_in_another_order_need_no_plan(made: list[Any]) -> None:
    ours, theirs = optimizer_of(), optimizer_of("reference")
    for t in range(5):
        for optimizer in (ours, theirs):
            give_gradients(optimizer, t)
            if t == 3:
                optimizer.param_groups[0]["params"].reverse()
            optimizer.step()
        assert_agrees(ours, theirs)
        synchronise(ours, theirs)
    assert len(made) == 1


def test_param_groups_have_their_own_plans(made: list[Any]) -> None:
    optimizer = optimizer_of()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(8, 48, device=DEVICE))]})
    for t in range(3):
        give_gradients(optimizer, t)
        optimizer.step()
    assert len(made) == 2


def test_alignment_that_changes_and_returns_needs_two_plans(made: list[Any]) -> None:
    ours, theirs = optimizer_of(), optimizer_of("reference")
    for t in range(8):
        for optimizer in (ours, theirs):
            # the first comes when the tensors of the steps before are known
            (give_unaligned_gradients if t in (4, 6, 7) else give_gradients)(optimizer, t)
            optimizer.step()
        assert len(made) == (1 if t < 4 else 2)
        assert_agrees(ours, theirs)
        synchronise(ours, theirs)


@pytest.mark.skipif(ON_GPU, reason="torch's allocator for GPUs aligns every memory")
def test_memory_that_begins_at_no_vector_needs_its_own_plan(made: list[Any]) -> None:
    """As NumPy's may. Only the address tells it from memory of torch."""
    ours, theirs = optimizer_of(), optimizer_of("reference")
    for t in range(6):
        for optimizer in (ours, theirs):
            give_gradients(optimizer, t)
        if t == 4:  # the tensors of the steps before are known
            for p in parameters(ours):
                memory = bytearray(p.grad.nbytes + 20)
                begin = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
                offset = 4 + -begin % 16
                grad = torch.frombuffer(memory, dtype=torch.float32, count=p.numel(), offset=offset)
                p.grad = grad.view(p.shape).copy_(p.grad)
        for optimizer in (ours, theirs):
            optimizer.step()
        assert len(made) == (1 if t < 4 else 2)
        assert_agrees(ours, theirs)
        synchronise(ours, theirs)


def test_the_plans_hold_no_reference_to_a_parameter_or_its_state() -> None:
    """torch.utils.swap_tensors swaps no tensor that has a weak reference."""
    optimizer = optimizer_of()
    give_gradients(optimizer, 0)
    optimizer.step()
    for p in parameters(optimizer):
        p.grad = None
        new = torch.nn.Parameter(torch.zeros_like(p))
        torch.utils.swap_tensors(p, new)
        assert p.count_nonzero() == 0
        for value in optimizer.state[p].values():
            torch.utils.swap_tensors(value, torch.zeros_like(value))
    give_gradients(optimizer, 1)
    optimizer.step()
    assert all(p.count_nonzero() == p.numel() for p in parameters(optimizer))


def test_an_error_in_a_copy_to_the_device_leaves_the_plans_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While a graph is captured, a copy of the work of a new plan raises."""
    ours, theirs = optimizer_of(), optimizer_of("reference")
    for optimizer in (ours, theirs):
        give_gradients(optimizer, 0)
        optimizer.step()
    assert_agrees(ours, theirs)
    synchronise(ours, theirs)

    def refuse(*_: Any) -> None:
        raise RuntimeError("being captured")

    give_unaligned_gradients(ours, 1)
    with monkeypatch.context() as patch:
        patch.setattr(plan_module, "copy_to_device", refuse)
        with pytest.raises(RuntimeError, match="being captured"):
            ours.step()
    for state in ours.state.values():
        state["step"].fill_(1)
    for t in range(1, 3):
        give_unaligned_gradients(ours, t)
        give_gradients(theirs, t)
        ours.step()
        theirs.step()
        assert_agrees(ours, theirs)
        synchronise(ours, theirs)


# ---------------------------------------------------------------------------------------------
# what only a GPU can show
# ---------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not ON_GPU, reason="no CUDA device")


@pytest.mark.gpu
@needs_gpu
def test_a_graph_repeats_its_step_after_steps_with_other_alignments() -> None:
    """A graph reads its lists of tiles in every replay, and nothing may replace them."""
    captured, plain = optimizer_of(capturable=True), optimizer_of()
    for optimizer in (captured, plain):
        give_gradients(optimizer, 0)
    warmed_up(captured)
    plain.step()
    inputs = [p.grad for p in parameters(captured)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for t in range(1, 6):
        give_gradients(plain, t)
        plain.step()
        if t % 2:
            give_unaligned_gradients(captured, t)
            captured.step()
            continue
        garbage = [torch.full((1 << 14,), 1 << 20, dtype=torch.int32, device=DEVICE) for _ in "123"]
        give_gradients(captured, t)
        for p, grad in zip(parameters(captured), inputs, strict=True):
            grad.copy_(p.grad)
        graph.replay()
        torch.cuda.synchronize()
        del garbage
    for p, q in zip(parameters(captured), parameters(plain), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_every_part_of_a_plan_is_recorded_on_a_new_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has no streams, so names are in their place."""
    current, recorded = ["first"], []
    monkeypatch.setattr(plan_module, "_current_stream", lambda device: current[0])
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: recorded.append((id(tensor), stream))
    )
    optimizer = optimizer_of()
    selections = (None, [0, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7])
    for stream in ("first", "second"):
        current[0] = stream
        for t, chosen in enumerate(selections):
            give_gradients(optimizer, t, chosen)
            optimizer.step()
    [plans] = optimizer._backends["triton", DEVICE]._plans.values()
    for plan in plans._plans.values():
        for programs in plan._programs.values():
            tensors = [tensor for of_kernel in programs for tensor in of_kernel.values()]
            assert {(id(tensor), "second") for tensor in tensors} <= set(recorded)


@pytest.mark.gpu
@needs_gpu
def test_memory_of_a_plan_waits_for_other_streams() -> None:
    """The optimizer is freed while a step waits on another stream, and its memory is reused."""
    moved = []
    for delay in (0, 400_000_000):
        optimizer = optimizer_of()
        give_gradients(optimizer, 0)
        optimizer.step()
        torch.cuda.synchronize()
        kept = [parameters(optimizer), list(optimizer.state.values())]
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(delay)
            optimizer.step()
        del optimizer
        reused = [
            torch.full((size,), 1 << 20, dtype=torch.int32, device=DEVICE)
            for size in (1 << k for k in range(4, 20))
            for _ in range(8)
        ]
        torch.cuda.synchronize()
        del reused
        moved.append([p.detach().clone() for p in kept[0]])
    for actual, expected in zip(*moved, strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_a_graph_of_a_step_on_another_device_than_the_current_one(momentum_dtype: str) -> None:
    other = torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    p = torch.nn.Parameter(torch.ones(20, 128, device=other, dtype=BF16))
    p.grad = torch.ones_like(p)
    options: dict[str, Any] = {"momentum_dtype": momentum_dtype, "backend": "triton"}
    optimizer = StripedAdamW([p], capturable=True, **options)
    stream = torch.cuda.Stream(other)
    optimizer.step()
    torch.cuda.synchronize(other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream), torch.cuda.device(0):
        optimizer.step()
    graph.replay()
    torch.cuda.synchronize(other)
    assert float(optimizer.state[p]["step"]) == 2
    plain = StripedAdamW([p], **options)
    with (
        pytest.raises(RuntimeError, match="capturable=True"),
        torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream),
        torch.cuda.device(0),
    ):
        plain.step()


def test_runs_repeat_bit_for_bit_with_sets_that_keep_differing() -> None:
    results = []
    for _ in range(2):
        optimizer = optimizer_of(lagged=True)
        for t in range(4):
            give_gradients(optimizer, t, [t, t + 1, 6])
            optimizer.step()
        results.append(snapshot(optimizer))
    assert_same_snapshot(*results)
    assert all(p.dtype == F32 for p in parameters(optimizer))
