"""Steps of the Triton backend in CUDA graphs: capturable=True."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from optim_checks import (
    FORMATS,
    assert_same_bits,
    parameter,
    parameters,
    set_grad,
)
from triton_specs import (
    BF16,
    DEVICE,
    ON_GPU,
    Spec,
    entry_of,
    gradient_of,
    optimizer_of,
    triton_backend,
)

from striped_hf import StripedAdamW
from striped_hf.optim.backends.triton import statistics_kernels, tile_sizes
from striped_hf.optim.backends.triton.counters import Counters
from striped_hf.optim.options import settings_of

# on a GPU these tests run compiled kernels, and `pytest -m gpu` runs them
pytestmark = [pytest.mark.gpu] if ON_GPU else []


def capturable_pair(momentum_dtype: str, lr: Any, **more: Any) -> tuple[StripedAdamW, StripedAdamW]:
    pair = []
    for capturable in (False, True):
        torch.manual_seed(1)
        ps = [parameter(torch.randn(s), BF16, DEVICE) for s in ((4, 130), (5,), (2, 3, 7))]
        rate = copy.copy(lr) if capturable else float(lr)
        options = {"momentum_dtype": momentum_dtype, "capturable": capturable, **more}
        pair.append(StripedAdamW(ps, lr=rate, backend="triton", **options))
    return pair[0], pair[1]


@pytest.mark.parametrize("options", [{}, {"lagged": True}, {"master_bits": 24}], ids=str)
@pytest.mark.parametrize("momentum_dtype", ["float32", "int8"])
@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05), torch.tensor([0.05])], ids=repr)
def test_capturable_steps_equal_ordinary_steps(
    lr: Any, momentum_dtype: str, options: dict[str, Any]
) -> None:
    if isinstance(lr, torch.Tensor):
        lr = lr.to(DEVICE)
    plain, capturable = capturable_pair(momentum_dtype, lr, **options)
    for t in range(3):
        for p, q in zip(parameters(plain), parameters(capturable), strict=True):
            p.grad = torch.randn(p.shape).to(DEVICE, BF16) if (p.ndim, t) != (1, 2) else None
            q.grad = p.grad
        plain.step()
        capturable.step()
        if t == 1:
            saved = copy.deepcopy(capturable.state_dict())
            capturable.load_state_dict(saved)
    assert all(state["step"].device.type == DEVICE for state in capturable.state.values())
    for p, q in zip(parameters(plain), parameters(capturable), strict=True):
        assert_same_bits(p, q)
        for key, value in plain.state[p].items():
            assert_same_bits(capturable.state[q][key].cpu(), value.cpu(), key)
    assert copy.deepcopy(capturable).capturable
    plain.load_state_dict(capturable.state_dict())
    assert all(state["step"].device.type == "cpu" for state in plain.state.values())


@pytest.mark.parametrize("late", [0, 2])
def test_only_first_steps_do_the_work_of_first_steps(
    monkeypatch: pytest.MonkeyPatch, late: int
) -> None:
    """A capturable lagged step launches it if only the device knows whether a step is the first."""
    monkeypatch.setattr(tile_sizes, "TILES_OF_FIRST_STEP", 4)
    plain, capturable = (
        StripedAdamW(
            [parameter(torch.ones(s), device=DEVICE) for s in ((140, 300), (4, 130), (6, 260))],
            lr=0.1,
            backend="triton",
            lagged=True,
            capturable=is_capturable,
        )
        for is_capturable in (False, True)
    )
    sum_squares, summed = statistics_kernels.sum_squares, []

    def recorded(*args: Any) -> None:
        summed.append(args)
        sum_squares(*args)

    tiles = [6, 2, 3]  # of 128 columns; the first matrix has two programs one below another
    for t in range(3):
        for i, (p, q) in enumerate(zip(parameters(plain), parameters(capturable), strict=True)):
            p.grad = torch.randn(p.shape).to(DEVICE) if (i, t) != (late, 0) else None
            q.grad = p.grad
        plain.step()
        if not ON_GPU:
            monkeypatch.setattr(statistics_kernels, "sum_squares", recorded)
        capturable.step()
        monkeypatch.setattr(statistics_kernels, "sum_squares", sum_squares)
        if not ON_GPU:
            assert len(summed) == (sum(tiles) - tiles[late], tiles[late], 0)[t]
            summed.clear()
        for p, q in zip(parameters(plain), parameters(capturable), strict=True):
            assert_same_bits(p, q)


class Launches:
    """Counts the launches of the kernels of first steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for name in ("first_statistics_kernel", "first_combine_kernel"):
            monkeypatch.setattr(
                statistics_kernels, name, self._recorded(getattr(statistics_kernels, name))
            )

    def _recorded(self, kernel: Any) -> Any:
        launches = self

        class Recorded:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                launches.count += 1
                return kernel[grid]

        return Recorded()

    def of_step(self, optimizer: StripedAdamW) -> int:
        before = self.count
        optimizer.step()
        return self.count - before


def lagged_optimizer(capturable: bool = True, **more: Any) -> StripedAdamW:
    torch.manual_seed(1)
    ps = [parameter(torch.randn(s), device=DEVICE) for s in ((4, 130), (5, 20), (7,))]
    return StripedAdamW(ps, 0.1, backend="triton", lagged=True, capturable=capturable, **more)


def draw_gradients(optimizers: Sequence[StripedAdamW], t: int) -> None:
    """Gives the optimizers the same gradients, in the same tensors as in earlier steps."""
    torch.manual_seed(t)
    for of_one in zip(*map(parameters, optimizers), strict=True):
        g = torch.randn(of_one[0].shape).to(DEVICE, of_one[0].dtype)
        for p in of_one:
            p.grad = g.clone() if p.grad is None else p.grad.copy_(g)


def zero(state: dict[str, torch.Tensor]) -> None:
    for value in state.values():
        value.zero_()


# what other code may do between two steps, and whether the second may then be a first step
BETWEEN = {
    "nothing": (lambda optimizer: None, False),
    "load": (lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()), True),
    "drop": (lambda optimizer: optimizer.state.clear(), True),
    "drop one": (lambda optimizer: optimizer.state.popitem(), True),
    "zero": (lambda optimizer: [zero(state) for state in optimizer.state.values()], True),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_a_later_step_launches_no_kernels_of_a_first_step(
    monkeypatch: pytest.MonkeyPatch, between: str
) -> None:
    """Two are launched if the state is new to the backend, or if other code wrote to it."""
    launches = Launches(monkeypatch)
    optimizers = plain, capturable = lagged_optimizer(False), lagged_optimizer()
    change, may_be_first = BETWEEN[between]
    expected = [2, 0, 2 * may_be_first, 0, 0]
    for t, launched in enumerate(expected):
        draw_gradients(optimizers, t)
        assert launches.of_step(capturable) == launched
        assert launches.of_step(plain) == 0
        for p, q in zip(parameters(plain), parameters(capturable), strict=True):
            assert_same_bits(p, q)
        if t == 1:
            for optimizer in optimizers:
                change(optimizer)


def test_a_step_with_inference_tensors_may_be_a_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch does not count the writes to them."""
    launches, optimizer = Launches(monkeypatch), lagged_optimizer()
    with torch.inference_mode():
        for t in range(3):
            for p in parameters(optimizer):
                p.grad = torch.full_like(p, t + 1.0)
            assert launches.of_step(optimizer) == 2


def test_a_first_step_after_an_unseen_reset_is_adamws() -> None:
    """A graph without the kernels of first steps may be replayed with a state of zeros."""
    optimizer = lagged_optimizer(eps=1e-12)
    adamw = torch.optim.AdamW(
        [parameter(p.detach().clone()) for p in parameters(optimizer)], 0.1, eps=1e-12
    )
    for t in range(2):
        draw_gradients([optimizer], t)
        optimizer.step()
    with torch.no_grad():
        for p, q in zip(parameters(optimizer), parameters(adamw), strict=True):
            p.copy_(q)
    for state in optimizer.state.values():
        for value in state.values():
            value.data.zero_()  # torch does not count writes to .data
    for t in range(2, 4):
        draw_gradients([optimizer, adamw], t)
        [counter, *_] = (state["step"] for state in optimizer.state.values())
        optimizer.step()
        if t == 2:
            assert float(counter) == 1
            adamw.step()
            for p, q in zip(parameters(optimizer), parameters(adamw), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
                row = optimizer.state[p].get("exp_avg_sq_row")
                if row is not None:
                    torch.testing.assert_close(row[:, 0], 1e-3 * (q.grad**2).mean(1))
    assert all(p.isfinite().all() for p in parameters(optimizer))


def test_a_captured_step_has_not_been_counted() -> None:
    """A graph repeats the step later, if at all."""
    counters, counter = Counters(), torch.zeros(())

    def counted(is_captured: bool) -> bool:
        counter.add_(1)
        return counters.count([counter], is_captured)

    assert [counted(is_captured=True) for _ in range(2)] == [False, False]
    assert [counted(is_captured) for is_captured in (False, True, True)] == [False, True, True]
    counter.zero_()
    assert [counted(is_captured) for is_captured in (True, True, False)] == [False, False, False]
    assert counted(is_captured=False)


def test_counters_keep_no_tensor_alive() -> None:
    counters, counter = Counters(), torch.zeros(())
    counters.count([counter], is_captured=False)
    reference = weakref.ref(counter)
    del counter
    assert reference() is None
    assert not counters._counted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_learning_rate_in_memory(dtype: torch.dtype) -> None:
    """The optimizer passes a learning rate on a GPU without reading it."""
    optimizers = [optimizer_of(Spec(shape), "triton") for shape in ((4, 130), (4, 130), (9,), (9,))]
    for i, optimizer in enumerate(optimizers):
        [p] = parameters(optimizer)
        p.grad = gradient_of(Spec(tuple(p.shape)), 0)
        optimizer.step()
        p.grad = gradient_of(Spec(tuple(p.shape)), 1)
        settings = settings_of(optimizer.param_groups[0], capturable=True)
        if i % 2:
            lr = torch.tensor(settings.lr, dtype=dtype, device=DEVICE)
            settings = dataclasses.replace(settings, lr=lr)
        triton_backend.new().step([entry_of(p, optimizer)], settings)
    for plain, in_memory in (optimizers[:2], optimizers[2:]):
        torch.testing.assert_close(parameters(plain), parameters(in_memory), rtol=2e-7, atol=0)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_capturable_with_another_backend_is_an_error(backend: str) -> None:
    p = parameter(torch.ones(2, 3))
    p.grad = torch.ones(2, 3)
    optimizer = StripedAdamW([p], backend=backend, capturable=True)
    with pytest.raises(RuntimeError, match=r"capturable.*triton"):
        optimizer.step()
    assert (p == 1).all()
    assert not optimizer.state


def test_capturable_with_other_strides_is_an_error() -> None:
    p = torch.nn.Parameter(torch.ones(4, 8).to(DEVICE)[:, ::2])
    set_grad(p, torch.ones(4, 4).to(DEVICE))
    optimizer = StripedAdamW([p], backend="triton", capturable=True)
    with pytest.raises(RuntimeError, match="contiguous"):
        optimizer.step()


def warmed_up(optimizer: StripedAdamW, steps: int = 1) -> None:
    """Takes steps on a side stream, as torch's notes on CUDA graphs require."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(steps):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no CUDA device")
@pytest.mark.parametrize("lagged", [False, True])
@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_a_cuda_graph_repeats_the_step(
    monkeypatch: pytest.MonkeyPatch, momentum_dtype: str, lagged: bool
) -> None:
    """Replays take the same steps, with the same rates, as an optimizer without a graph."""
    launches = Launches(monkeypatch)
    lr = torch.tensor(0.05, device="cuda")
    plain, capturable = capturable_pair(momentum_dtype, lr, lagged=lagged)
    draw_gradients([plain, capturable], 0)
    plain.step()
    warmed_up(capturable)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert launches.of_step(capturable) == 0
    for t in range(1, 5):
        draw_gradients([plain, capturable], t)
        for group in plain.param_groups:
            group["lr"] = 0.05 / t
        capturable.param_groups[0]["lr"].fill_(0.05 / t)
        plain.step()
        if t == 3:  # a step outside the graph, with other gradients, does not disturb it
            held = [q.grad for q in parameters(capturable)]
            for q in parameters(capturable):
                q.grad = q.grad.clone()
            capturable.step()
            for q, g in zip(parameters(capturable), held, strict=True):
                q.grad = g
        else:
            graph.replay()
    torch.cuda.synchronize()
    for p, q in zip(parameters(plain), parameters(capturable), strict=True):
        assert_same_bits(p, q)
        assert float(capturable.state[q]["step"]) == 5


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no CUDA device")
@pytest.mark.parametrize("between", ["zero", "load"])
def test_a_cuda_graph_of_a_state_that_other_code_wrote(
    monkeypatch: pytest.MonkeyPatch, between: str
) -> None:
    """Its first replay may be a first step, so the graph has the kernels for it."""
    launches = Launches(monkeypatch)
    optimizers = plain, capturable = lagged_optimizer(False), lagged_optimizer()
    draw_gradients(optimizers, 0)
    plain.step()
    warmed_up(capturable, 2)
    plain.step()
    for optimizer in optimizers:
        BETWEEN[between][0](optimizer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert launches.of_step(capturable) == 2
    for t in range(1, 4):
        draw_gradients(optimizers, t)
        plain.step()
        graph.replay()
    torch.cuda.synchronize()
    for p, q in zip(parameters(plain), parameters(capturable), strict=True):
        assert_same_bits(p, q)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no CUDA device")
def test_a_capture_without_capturable_raises() -> None:
    p = parameter(torch.ones(3, 4), device="cuda")
    p.grad = torch.ones_like(p)
    optimizer = StripedAdamW([p])
    warmed_up(optimizer)
    with (
        pytest.raises(RuntimeError, match="capturable=True"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()
