"""LayerwiseStripedAdamW: against the ordinary optimizer, and its own features."""

from __future__ import annotations

import gc
import io
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from optim_checks import (
    CODED,
    FORMATS,
    PARAM_DTYPES,
    assert_same_bits,
    code_bound,
    parameter,
    snapshot,
    spacing,
    stored_momentum,
    to_numpy,
)
from torch import Tensor, nn

import striped_hf.optim.layerwise.optimizer as layerwise_optimizer
from striped_hf import LayerwiseStripedAdamW, StripedAdamW

pytestmark = pytest.mark.usefixtures("every_backend")

WIDTH = 256  # a square matrix has 65,536 elements: the smallest whose gradient is freed


class Model(nn.Module):
    """An embedding that is tied to the head, two matrices, a packed matrix, and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, WIDTH)
        self.packed = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.small = nn.Linear(WIDTH, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        q, k, v = self.packed(self.norm(x)).chunk(3, -1)
        x = x + self.out(q * k.tanh() + v)
        logits = x @ self.embedding.weight.T
        return logits.logsumexp(-1).mean() - logits[..., 0].mean() + self.small(x).square().mean()


def make_model(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype)


def make_groups(model: Model) -> list[dict[str, Any]]:
    packed = [model.packed.weight]
    others = [p for p in model.parameters() if p is not model.packed.weight]
    return [{"params": packed, "blocks": (3, 1)}, {"params": others, "weight_decay": 0.0}]


def train(
    cls: type[StripedAdamW],
    steps: int = 4,
    passes: int = 1,
    dtype: torch.dtype = torch.float32,
    after_backward: Callable[[Any, Model], None] = lambda optimizer, model: None,
    **options: Any,
) -> tuple[Model, StripedAdamW]:
    model = make_model(dtype)
    optimizer = cls(make_groups(model), lr=1e-2, **options)
    run(model, optimizer, range(steps), passes, after_backward)
    return model, optimizer


def run(
    model: Model,
    optimizer: StripedAdamW,
    steps: range,
    passes: int = 1,
    after_backward: Callable[[Any, Model], None] = lambda optimizer, model: None,
) -> None:
    for step in steps:
        for i in range(passes):
            torch.manual_seed(100 * step + i)
            (model(torch.randint(0, 300, (2, 8))) / passes).backward()
        after_backward(optimizer, model)
        optimizer.step()
        optimizer.zero_grad()


def give_gradient(param: Tensor, grad: Tensor) -> None:
    """Runs a backward pass in which ``param`` gets ``grad``."""
    (param * grad).sum().backward()


# -------------------------------------------------------------------------------------------------
# against the ordinary optimizer
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "master_bits"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 24), (torch.float16, None)],
    ids=str,
)
def test_float32_momentum_gives_the_ordinary_step_to_the_bit(
    dtype: torch.dtype, master_bits: int | None
) -> None:
    _, ordinary = train(StripedAdamW, dtype=dtype, master_bits=master_bits)
    _, layerwise = train(LayerwiseStripedAdamW, dtype=dtype, master_bits=master_bits)
    for a, b in zip(snapshot(ordinary), snapshot(layerwise), strict=True):
        for x, y in zip(_tensors(a), _tensors(b), strict=True):
            assert_same_bits(y, x)


def _tensors(value: Any) -> list[Tensor]:
    values = value.values() if isinstance(value, dict) else [value]
    return [each for each in values if isinstance(each, Tensor)]


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_gradients_of_matrices_are_gone_after_backward(momentum_dtype: str) -> None:
    kept = []

    def count(_: Any, model: Model) -> None:
        kept.append({n for n, p in model.named_parameters() if p.grad is not None})

    model, _ = train(LayerwiseStripedAdamW, after_backward=count, momentum_dtype=momentum_dtype)
    small = {n for n, p in model.named_parameters() if p.dim() < 2 or p.numel() < WIDTH**2}
    assert "small.weight" in small
    assert kept == 4 * [small]


@pytest.mark.parametrize("momentum_dtype", ["bfloat16", "int8", "int4"])
def test_coded_momentum_is_the_ordinary_one_after_one_step(momentum_dtype: str) -> None:
    model, ordinary = train(StripedAdamW, steps=1, momentum_dtype=momentum_dtype)
    other, layerwise = train(LayerwiseStripedAdamW, steps=1, momentum_dtype=momentum_dtype)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        expected, actual = ordinary.state[p], layerwise.state[q]
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert_same_bits(actual[key], value, key)


@pytest.mark.parametrize("momentum_dtype", FORMATS)
@pytest.mark.parametrize(
    ("shape", "blocks"),
    [
        ((5, 7), (1, 1)),
        ((64, 129), (1, 1)),
        ((12, 385), (3, 1)),
        ((9, 300), (1, 3)),
        ((2, 3, 130), (1, 2)),
        ((300, 1), (1, 1)),
        ((1, 257), (1, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", PARAM_DTYPES, ids=str)
def test_each_step_is_the_oracles(
    shape: tuple[int, ...],
    blocks: tuple[int, int],
    dtype: torch.dtype,
    momentum_dtype: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layerwise_optimizer, "SMALLEST", 1)
    hyper = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    param = parameter(torch.randn(shape), dtype)
    optimizer = LayerwiseStripedAdamW(
        [param], blocks=blocks, momentum_dtype=momentum_dtype, stochastic_rounding=False, **hyper
    )
    state = oracle.new_state(shape, blocks)
    for t in range(1, 4):
        grad = torch.randn(shape).to(dtype)
        grad[..., 0] = 0
        before = to_numpy(param)
        give_gradient(param, grad)
        assert param.grad is None
        optimizer.step()
        # once without the stored momentum, for the momentum before its encoding
        _, made = oracle.step(before, to_numpy(grad), state, t, blocks=blocks, **hyper)
        stored, name = stored_momentum(optimizer.state[param], shape[-1])
        allowed = 2e-6 * np.abs(made["m"]).max()
        if name == "bfloat16":
            allowed = allowed + 2.0**-8 * np.abs(made["m"])
        elif name in CODED:
            allowed = allowed + code_bound(made["m"], name)
        assert np.all(np.abs(stored - made["m"]) <= allowed)
        expected, state = oracle.step(
            before, to_numpy(grad), state, t, blocks=blocks, stored=stored, **hyper
        )
        state["m"] = stored
        for key, of_state in (("row", "exp_avg_sq_row"), ("col", "exp_avg_sq_col")):
            actual = to_numpy(optimizer.state[param][of_state])
            np.testing.assert_allclose(actual, state[key], rtol=4e-6, atol=0)
        # a dozen float32 roundings of 6e-8 of the update and the parameter, and one to its dtype
        allowed = 4e-6 * np.abs(expected - before) + 2.0**-22 * np.abs(before)
        if dtype != torch.float32:
            allowed = 1.01 * allowed + 0.5 * spacing(np.abs(expected), dtype)
        assert np.all(np.abs(to_numpy(param) - expected) <= allowed)


def test_every_option_of_a_group_counts() -> None:
    options = {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3, "maximize": True}
    model, _ = train(StripedAdamW, **options)
    other, _ = train(LayerwiseStripedAdamW, **options)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_bits(b, a)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    model = make_model()
    model.out.requires_grad_(False)
    optimizer = LayerwiseStripedAdamW(model.parameters())
    before = model.out.weight.clone()
    run(model, optimizer, range(2))
    assert_same_bits(model.out.weight, before)
    assert model.out.weight not in optimizer.state
    # unfrozen later: the first gradient stays until the step, and later gradients are freed
    model.out.requires_grad_(True)
    kept = []
    run(model, optimizer, range(2, 5), after_backward=lambda o, m: kept.append(m.out.weight.grad))
    assert kept[0] is not None
    assert kept[1:] == [None, None]
    assert optimizer.state[model.out.weight]["step"] == 3


def test_the_kernel_of_a_convolution_keeps_its_gradient() -> None:
    results = []
    for cls in (StripedAdamW, LayerwiseStripedAdamW):
        torch.manual_seed(0)
        layer = nn.Conv2d(64, 128, 3)
        optimizer = cls(layer.parameters(), lr=1e-2, momentum_dtype="int8")
        for _ in range(2):
            layer(torch.randn(1, 64, 5, 5)).square().sum().backward()
            assert layer.weight.grad is not None
            optimizer.step()
            optimizer.zero_grad()
        results.append(layer.weight.detach())
    assert_same_bits(*results)


# -------------------------------------------------------------------------------------------------
# several backward passes before a step
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [4, 16, 32])
@pytest.mark.parametrize("mean", [0.0, 0.3, 3.0])
def test_the_denominator_is_that_of_the_summed_gradient(passes: int, mean: float) -> None:
    # the noise of passes whose gradients agree, by `mean`, not at all, a little, or nearly fully
    shared = mean * torch.randn(1024, 512)
    summed, folded = (nn.Parameter(torch.zeros(1024, 512)) for _ in range(2))
    ordinary = StripedAdamW([summed], lr=0.0)
    layerwise = LayerwiseStripedAdamW([folded], lr=0.0, gradient_accumulation=True)
    for _ in range(passes):
        grad = shared + torch.randn(1024, 512)
        give_gradient(summed, grad)
        give_gradient(folded, grad)
        assert folded.grad is None
    # a sum of 4,096 squares deviates by sqrt(2 / 4096) = 2.2%, its root by 1.1%: four times this
    within = 0.045
    assert layerwise.grad_norm().item() == pytest.approx(summed.grad.norm().item(), rel=within)
    ordinary.step()
    layerwise.step()
    expected, actual = ordinary.state[summed], layerwise.state[folded]
    torch.testing.assert_close(actual["exp_avg"], expected["exp_avg"], rtol=1e-4, atol=1e-5)
    for key in ("exp_avg_sq_row", "exp_avg_sq_col"):
        ratio = (actual[key].mean() / expected[key].mean()).sqrt().item()
        assert ratio == pytest.approx(1, rel=within), key
        # rows and columns share this error; a column also has its own, of a mean of 1,024 squares,
        # and a row of 4 squares: their mean deviates by sqrt(2 / 4), which averages out over steps
        ratios = (actual[key] / expected[key]).sqrt() / ratio
        assert (ratios - 1).abs().mean() < (0.05 if key == "exp_avg_sq_col" else 0.35)


def test_the_estimate_has_no_bias() -> None:
    param = nn.Parameter(torch.zeros(256, 256))
    optimizer = LayerwiseStripedAdamW([param], lr=0.0, gradient_accumulation=True)
    grads = [torch.randn(256, 256) + 0.2 for _ in range(4)]
    true_norm = sum(grads).norm()
    ratios = []
    for _ in range(30):  # the signs differ from step to step
        for grad in grads:
            give_gradient(param, grad)
        ratios.append((optimizer.grad_norm() / true_norm).square().item())
        optimizer.step()
    mean = sum(ratios) / len(ratios)
    scatter = torch.tensor(ratios).std().item() / math.sqrt(len(ratios))
    assert 0 < scatter < 0.01
    assert abs(mean - 1) < 4 * scatter


@pytest.mark.parametrize("blocks", [(1, 1), (2, 2), (1, 4)])
def test_rows_whose_passes_agree_have_their_own_second_moment(blocks: tuple[int, int]) -> None:
    # as in an embedding: the gradients of frequent tokens agree, the others are noise
    agree = torch.zeros(256, 256)
    agree[::2] = 1.0
    summed, folded = (nn.Parameter(torch.zeros(256, 256)) for _ in range(2))
    groups = [[{"params": [p], "blocks": [blocks]}] for p in (summed, folded)]
    ordinary = StripedAdamW(groups[0], lr=0.0)
    layerwise = LayerwiseStripedAdamW(groups[1], lr=0.0, gradient_accumulation=True)
    for _ in range(30):
        for _ in range(4):
            grad = agree + torch.randn(256, 256)
            give_gradient(summed, grad)
            give_gradient(folded, grad)
        ordinary.step()
        layerwise.step()
        ordinary.zero_grad()
    rows = [o.state[p]["exp_avg_sq_row"] for o, p in ((ordinary, summed), (layerwise, folded))]
    for first in (0, 1):
        expected, actual = (row[first::2].mean() for row in rows)
        # a row and step has at least one square, so at least 128 x 30 of them: four times 2.3%
        assert (actual / expected).item() == pytest.approx(1, rel=0.09)


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_many_passes_do_not_wear_out_a_coded_momentum(momentum_dtype: str) -> None:
    passes = 16
    torch.manual_seed(1)
    grads = [torch.randn(256, 512) + 0.2 * torch.randn(256, 1) for _ in range(passes)]
    summed, folded = (nn.Parameter(torch.zeros(256, 512)) for _ in range(2))
    ordinary = StripedAdamW([summed], lr=0.0, momentum_dtype=momentum_dtype)
    options = {"momentum_dtype": momentum_dtype, "gradient_accumulation": True}
    layerwise = LayerwiseStripedAdamW([folded], lr=0.0, **options)
    for _ in range(2):
        for grad in grads:
            give_gradient(summed, grad)
            give_gradient(folded, grad)
        ordinary.step()
        layerwise.step()
        ordinary.zero_grad()
    exact = sum(grads) * (0.1 + 0.9 * 0.1)
    expected, name = stored_momentum(ordinary.state[summed], 512)
    actual, same_name = stored_momentum(layerwise.state[folded], 512)
    assert name == same_name == momentum_dtype

    def error(values: Any) -> float:
        return ((torch.from_numpy(values) - exact).norm() / exact.norm()).item()

    # sixteen encodings to 8 bits have four times the error of one; only the last is to 4 bits
    at_most = {"float32": 1e-5, "bfloat16": 0.02, "int8": 0.05, "int4": 1.1 * error(expected)}
    assert error(actual) <= at_most[momentum_dtype]


def test_four_bit_codes_are_freed_while_eight_bits_accumulate() -> None:
    options = {"momentum_dtype": "int4", "gradient_accumulation": True}
    model, optimizer = train(LayerwiseStripedAdamW, 2, 3, **options)

    def kinds() -> list[dict[str, Any]]:
        states = optimizer.state_dict()["state"].values()
        return [{key: (v.dtype, v.shape) for key, v in state.items()} for state in states]

    before = kinds()
    assert before[0]["exp_avg"][0] == torch.uint8
    codes = weakref.ref(optimizer.state[model.out.weight]["exp_avg"])
    model(torch.zeros(1, 4, dtype=torch.long)).backward()
    assert codes() is None
    optimizer.step()
    assert kinds() == before


@pytest.mark.parametrize("error", ["in the backward pass", "in the step", "before the step"])
def test_no_momentum_is_lost_by_an_error_while_eight_bits_accumulate(
    error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"momentum_dtype": "int4", "gradient_accumulation": True}
    model, optimizer = train(LayerwiseStripedAdamW, 2, 3, **options)
    weight = model.out.weight
    codes, _ = stored_momentum(optimizer.state[weight], WIDTH)

    def fail(*args: Any) -> None:
        raise RuntimeError("CUDA out of memory.")

    if error == "in the backward pass":
        model.embedding.weight.register_hook(fail)
    elif error == "before the step":
        optimizer.register_step_pre_hook(fail)
    else:
        monkeypatch.setattr(optimizer, "_update_matrices", fail)
    with pytest.raises(RuntimeError, match="out of memory"):  # noqa: PT012
        (0 * model(torch.zeros(1, 4, dtype=torch.long))).backward()
        optimizer.step()
    assert "exp_avg" not in optimizer.state[weight]
    with pytest.raises(RuntimeError, match=r"call step\(\) before"):
        optimizer.state_dict()
    optimizer.zero_grad()
    kept, name = stored_momentum(optimizer.state[weight], WIDTH)
    assert name == "int4"
    # a gradient of zeros was added
    assert np.abs(kept - 0.9 * codes).max() < 0.1 * np.abs(codes).max()
    assert np.corrcoef(kept.ravel(), codes.ravel())[0, 1] > 0.98
    assert optimizer.state_dict()["state"]


def test_a_state_is_loaded_while_eight_bits_accumulate() -> None:
    options = {"momentum_dtype": "int4", "gradient_accumulation": True}
    model, optimizer = train(LayerwiseStripedAdamW, 2, 3, **options)
    saved = optimizer.state_dict()
    codes = saved["state"][0]["exp_avg"].clone()
    model(torch.zeros(1, 4, dtype=torch.long)).backward()
    optimizer.load_state_dict(saved)
    optimizer.zero_grad()
    assert_same_bits(optimizer.state_dict()["state"][0]["exp_avg"], codes)
    run(model, optimizer, range(2, 4), 3)


def test_a_momentum_dropped_while_eight_bits_accumulate_is_named() -> None:
    options = {"momentum_dtype": "int4", "gradient_accumulation": True}
    model, optimizer = train(LayerwiseStripedAdamW, 2, 3, **options)
    model(torch.zeros(1, 4, dtype=torch.long)).backward()
    del optimizer.state[model.out.weight]["exp_avg_sq_row"]
    with pytest.raises(RuntimeError, match="'exp_avg_sq_row' is missing"):
        optimizer.step()


def test_a_second_pass_is_refused_without_accumulation() -> None:
    model = make_model()
    optimizer = LayerwiseStripedAdamW(model.parameters())
    model(torch.zeros(1, 4, dtype=torch.long)).backward()
    with pytest.raises(RuntimeError, match="gradient_accumulation=True"):
        model(torch.zeros(1, 4, dtype=torch.long)).backward()
    optimizer.step()
    run(model, optimizer, range(2))


# -------------------------------------------------------------------------------------------------
# clipping
# -------------------------------------------------------------------------------------------------


def _clip(max_norm: float) -> Callable[[Any, Model], None]:
    def clip(optimizer: Any, model: Model) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    return clip


def test_grad_norm_is_the_norm_of_all_gradients() -> None:
    norms: list[float] = []

    def of_all(_: Any, model: Model) -> None:
        grads = [p.grad for p in model.parameters()]
        norms.append(torch.nn.utils.get_total_norm(grads).item())

    def of_folded(optimizer: Any, _: Model) -> None:
        expected = norms.pop(0)
        assert optimizer.grad_norm().item() == pytest.approx(expected, rel=1e-5)
        assert optimizer.grad_norm().item() == pytest.approx(expected, rel=1e-5)  # a second call

    train(StripedAdamW, after_backward=of_all)
    train(LayerwiseStripedAdamW, after_backward=of_folded)
    assert not norms


def test_a_first_step_is_clipped_as_by_torch() -> None:
    model, _ = train(StripedAdamW, 1, after_backward=_clip(1e-4), eps=1e-3)
    other, optimizer = train(LayerwiseStripedAdamW, 1, max_grad_norm=1e-4, eps=1e-3)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-7)
    assert isinstance(optimizer, LayerwiseStripedAdamW)


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_gradients_of_one_norm_are_clipped_as_by_torch(momentum_dtype: str) -> None:
    torch.manual_seed(2)
    summed, folded = (nn.Parameter(torch.zeros(256, 256)) for _ in range(2))
    ordinary = StripedAdamW([summed], lr=1.0, eps=1e-3)
    options = {"max_grad_norm": 0.5, "momentum_dtype": momentum_dtype}
    layerwise = LayerwiseStripedAdamW([folded], lr=1.0, eps=1e-3, **options)
    for _ in range(4):
        grad = torch.randn(256, 256)
        grad *= 3 / grad.norm()
        give_gradient(summed, grad)
        torch.nn.utils.clip_grad_norm_([summed], 0.5)
        give_gradient(folded, grad)
        ordinary.step()
        layerwise.step()
        ordinary.zero_grad()
    allowed = {"float32": 1e-4, "bfloat16": 0.01, "int8": 0.02, "int4": 0.5}[momentum_dtype]
    assert (folded - summed).norm() / summed.norm() < allowed
    row, expected = (
        o.state[p]["exp_avg_sq_row"] for o, p in ((layerwise, folded), (ordinary, summed))
    )
    torch.testing.assert_close(row, expected, rtol=1e-4, atol=0)


def test_a_spike_weighs_no_more_than_clipping_lets_it() -> None:
    torch.manual_seed(3)
    param = nn.Parameter(torch.zeros(256, 256))
    optimizer = LayerwiseStripedAdamW([param], lr=0.0, max_grad_norm=1.0)
    for scale in (1.0, 1.0, 1000.0, 1.0, 1.0):
        grad = torch.randn(256, 256)
        before = optimizer.state[param].get("exp_avg_sq_row", torch.zeros(1)).mean().item()
        give_gradient(param, scale * grad / grad.norm())
        assert optimizer.grad_norm().item() == pytest.approx(scale, rel=1e-4)
        optimizer.step()
        added = optimizer.state[param]["exp_avg_sq_row"].mean().item() - 0.999 * before
        # the weight of a gradient of norm 1, or at least a quarter of it right after the spike
        assert 0.001 * 0.2 < added * 256**2 <= 0.001 * 1.01, scale
        assert optimizer.state[param]["exp_avg"].norm() < 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_spike_leaves_the_momentum_of_earlier_steps(dtype: torch.dtype) -> None:
    """The first gradients of a step tell that it is a spike, before they are folded."""
    states = []
    for cls in (StripedAdamW, LayerwiseStripedAdamW):
        torch.manual_seed(6)
        params = [
            parameter(torch.zeros(shape, dtype=dtype))
            for shape in ((256, 512), (4, 256, 256), (512, 256), (300, 256))
        ]
        is_layerwise = cls is LayerwiseStripedAdamW
        options: dict[str, Any] = {"max_grad_norm": 1.0} if is_layerwise else {}
        optimizer = cls([{"params": params[:2]}, {"params": params[2:]}], lr=0.0, **options)
        for step in range(8):
            scale = 100.0 if step == 7 else 0.9
            grads = [torch.randn(p.shape) for p in params]
            for grad, share in zip(grads, (1.0, 0.1, 5.0, 0.01), strict=True):
                grad *= scale * share / (26**0.5) / grad.norm()
            loss = sum((p * grad).sum() for p, grad in zip(params[:-1], grads[:-1], strict=True))
            (loss if step == 3 else loss + (params[-1] * grads[-1]).sum()).backward()
            if not is_layerwise:
                torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        states.append([optimizer.state[p]["exp_avg"] for p in params])
    for exact, folded in zip(*states, strict=True):
        assert (folded - exact).norm() < 0.05 * exact.norm()


def test_norms_that_grow_for_good_are_followed() -> None:
    torch.manual_seed(4)
    param = nn.Parameter(torch.zeros(256, 256))
    optimizer = LayerwiseStripedAdamW([param], lr=0.0, max_grad_norm=1.0)
    for step in range(20):
        grad = torch.randn(256, 256) + 1
        scale = 1.0 if step < 3 else 50.0
        give_gradient(param, scale * grad / grad.norm())
        optimizer.step()
    # 16 clipped gradients of norm 1 are most of the momentum, and point the same way
    assert optimizer.state[param]["exp_avg"].norm() > 0.5


@pytest.mark.parametrize(("before", "after"), [(None, 0.5), (0.5, None)])
def test_the_norm_to_clip_to_may_change_within_a_step(
    before: float | None, after: float | None
) -> None:
    torch.manual_seed(2)
    param = nn.Parameter(torch.zeros(256, 256))
    optimizer = LayerwiseStripedAdamW([param], lr=1.0, max_grad_norm=0.5)
    for norms in ((0.5, 0.5), (0.5, 0.5), (before, after), (None, None), (0.5, 0.5)):
        grad = torch.randn(256, 256)
        grad *= 3 / grad.norm()
        optimizer.max_grad_norm = norms[0]
        before_step = optimizer.state[param]["exp_avg"].clone() if optimizer.state else 0
        give_gradient(param, grad)
        share = optimizer.state[param]["exp_avg"] - 0.9 * before_step
        optimizer.max_grad_norm = norms[1]
        assert optimizer.grad_norm().item() == pytest.approx(3, rel=1e-5)
        # the norm of the first step is not known when its gradients are folded
        expected = 0.5 if norms[0] and torch.is_tensor(before_step) else 3
        assert share.norm().item() / 0.1 == pytest.approx(expected, rel=1e-4)
        optimizer.step()


def test_gradients_that_stayed_are_clipped_by_their_own_norm() -> None:
    model, _ = train(StripedAdamW, after_backward=_clip(0.1), eps=1e-3)
    other = make_model()
    optimizer = LayerwiseStripedAdamW(make_groups(other), lr=1e-2, eps=1e-3, max_grad_norm=0.1)
    optimizer.remove_hooks()
    for step in range(4):
        torch.manual_seed(100 * step)
        other(torch.randint(0, 300, (2, 8))).backward()
        assert other.out.weight.grad is not None
        optimizer.step()
        optimizer.remove_hooks()
        optimizer.zero_grad()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_as_loud_as_without_folding(value: float) -> None:
    results = []
    for cls in (StripedAdamW, LayerwiseStripedAdamW):
        param = nn.Parameter(torch.ones(256, 256))
        optimizer = cls([param], momentum_dtype="int8")
        grad = torch.randn(256, 256)
        for bad in (False, True, False):
            grad[3, 5] = value if bad else 0.5
            give_gradient(param, grad)
            optimizer.step()
            optimizer.zero_grad()
        results.append(param.isfinite())
    assert torch.equal(*results)
    assert not results[0].all()


# -------------------------------------------------------------------------------------------------
# hooks
# -------------------------------------------------------------------------------------------------


def test_removed_hooks_leave_an_ordinary_model() -> None:
    model = make_model()
    optimizer = LayerwiseStripedAdamW(model.parameters())
    run(model, optimizer, range(1))
    optimizer.remove_hooks()
    model(torch.zeros(1, 4, dtype=torch.long)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_deleted_optimizer_leaves_an_ordinary_model() -> None:
    model = make_model()
    optimizer = LayerwiseStripedAdamW(model.parameters())
    run(model, optimizer, range(1))
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    model(torch.zeros(1, 4, dtype=torch.long)).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_later_optimizer_gets_the_gradients() -> None:
    """In a notebook, the Trainer of an earlier cell is still alive."""
    model = make_model()
    earlier = LayerwiseStripedAdamW(model.parameters(), lr=1.0)
    later = LayerwiseStripedAdamW(make_groups(model), lr=1e-2)
    run(model, later, range(2))
    expected = make_model()
    run(expected, LayerwiseStripedAdamW(make_groups(expected), lr=1e-2), range(2))
    for param, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert_same_bits(param, other)
    assert not earlier.state


def test_replaced_parameters_are_hooked_from_the_next_step_on() -> None:
    model = make_model()
    optimizer = LayerwiseStripedAdamW(model.parameters())
    model.out.weight = nn.Parameter(model.out.weight.detach().clone())
    params = optimizer.param_groups[0]["params"]
    names = [name for name, _ in model.named_parameters()]
    params[names.index("out.weight")] = model.out.weight
    kept = []
    run(model, optimizer, range(3), after_backward=lambda o, m: kept.append(m.out.weight.grad))
    assert kept[0] is not None
    assert kept[1:] == [None, None]
    assert optimizer.state[model.out.weight]["step"] == 3


def test_added_groups_are_hooked() -> None:
    model = make_model()
    optimizer = LayerwiseStripedAdamW(model.embedding.parameters())
    optimizer.add_param_group({"params": model.packed.parameters(), "blocks": (3, 1)})
    model(torch.zeros(1, 4, dtype=torch.long)).backward()
    assert model.packed.weight.grad is None
    assert model.out.weight.grad is not None


def test_the_hooks_of_a_step_run_once() -> None:
    StripedAdamW([nn.Parameter(torch.zeros(2))])  # torch wraps the steps of both classes
    model = make_model()
    optimizer = LayerwiseStripedAdamW(model.parameters())
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    run(model, optimizer, range(2))
    assert seen == 2 * ["before", "after"]


# -------------------------------------------------------------------------------------------------
# state dicts
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum_dtype", FORMATS)
@pytest.mark.parametrize("passes", [1, 3])
def test_a_run_resumes_to_the_bit(momentum_dtype: str, passes: int) -> None:
    options = {
        "momentum_dtype": momentum_dtype,
        "max_grad_norm": 0.05,
        "gradient_accumulation": passes > 1,
    }
    whole, _ = train(LayerwiseStripedAdamW, 4, passes, **options)
    model, optimizer = train(LayerwiseStripedAdamW, 2, passes, **options)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = make_model()
    resumed.load_state_dict(saved["model"])
    optimizer = LayerwiseStripedAdamW(make_groups(resumed), lr=1e-2, **options)
    optimizer.load_state_dict(saved["optimizer"])
    run(resumed, optimizer, range(2, 4), passes)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert_same_bits(b, a)


@pytest.mark.parametrize(
    ("first", "second"),
    [(StripedAdamW, LayerwiseStripedAdamW), (LayerwiseStripedAdamW, StripedAdamW)],
    ids=["from ordinary", "to ordinary"],
)
def test_state_dicts_are_exchanged_with_the_ordinary_optimizer(
    first: type[StripedAdamW], second: type[StripedAdamW]
) -> None:
    whole, _ = train(StripedAdamW)
    model, optimizer = train(first, 2)
    resumed = second(make_groups(model), lr=1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    del optimizer
    gc.collect()
    run(model, resumed, range(2, 4))
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        assert_same_bits(b, a)


def test_a_state_dict_between_backward_and_step_is_refused() -> None:
    model = make_model()
    optimizer = LayerwiseStripedAdamW(model.parameters())
    model(torch.zeros(1, 4, dtype=torch.long)).backward()
    with pytest.raises(RuntimeError, match=r"call step\(\) before"):
        optimizer.state_dict()
    optimizer.step()
    optimizer.state_dict()


def test_dropped_gradients_take_no_step() -> None:
    model = make_model()
    optimizer = LayerwiseStripedAdamW(model.parameters())
    run(model, optimizer, range(1))
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.zeros(1, 4, dtype=torch.long)).backward()
    optimizer.zero_grad()
    optimizer.step()
    for a, b in zip(before, model.parameters(), strict=True):
        assert_same_bits(b, a)
    run(model, optimizer, range(1, 2))
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


# -------------------------------------------------------------------------------------------------
# refused
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nesterov": True}, "nesterov=True needs each gradient"),
        ({"lagged": True}, "lagged=True needs each gradient"),
        ({"capturable": True}, "capturable=True cannot"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0 is not above zero"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0 is not above zero"),
        ({"max_grad_norm": math.nan}, "max_grad_norm=nan is not above zero"),
    ],
    ids=str,
)
def test_unsupported_options_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=message):
        LayerwiseStripedAdamW(model.parameters(), **options)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_closure_is_refused() -> None:
    optimizer = LayerwiseStripedAdamW(make_model().parameters())
    with pytest.raises(RuntimeError, match="takes no closure"):
        optimizer.step(lambda: 1.0)


def test_a_gradient_scaler_is_refused() -> None:
    model = make_model()
    optimizer = LayerwiseStripedAdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.zeros(1, 4, dtype=torch.long))).backward()
    with pytest.raises(RuntimeError, match="train in bfloat16"):
        scaler.step(optimizer)


def test_a_sparse_gradient_is_refused_in_the_backward_pass() -> None:
    embedding = nn.Embedding(300, WIDTH, sparse=True)
    LayerwiseStripedAdamW(embedding.parameters())
    optimizer = LayerwiseStripedAdamW([{"params": [embedding.weight]}])
    with pytest.raises(RuntimeError, match="make it dense"):
        embedding(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    assert not optimizer.state
