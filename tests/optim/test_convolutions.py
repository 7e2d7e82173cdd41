"""Parameters of three or more dimensions: kernels of convolutions, and stacks of matrices."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optim_checks import (
    FORMATS,
    Follower,
    assert_same_bits,
    decode_documented,
    documented_matrix,
    lay_out,
    to_numpy,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from striped_hf import StripedAdamW
from striped_hf.optim import adamw_state_dict, backends, momentum
from striped_hf.optim.blocks import mark_blocks
from striped_hf.optim.matrix import stepped_shape
from striped_hf.optim.state import init_state
from striped_hf.trainer.param_groups import mark_matrices, param_groups

BACKENDS = ("reference", "cpu", "triton")
KERNEL, STACK, EXACT = "kernel", "stack", "exact"

# the readings by the shape alone
READINGS: list[tuple[tuple[int, ...], str]] = [
    ((64, 32, 3), KERNEL),  # Conv1d
    ((512, 512, 10), KERNEL),
    ((512, 1, 31), KERNEL),  # depthwise
    ((80, 1, 251), KERNEL),
    ((64, 3, 7, 7), KERNEL),
    ((256, 256, 3, 3), KERNEL),
    ((1280, 320, 1, 1), KERNEL),
    ((32, 1, 3, 3), KERNEL),
    ((768, 3, 16, 16), KERNEL),  # patch embeddings
    ((1024, 3, 14, 14), KERNEL),
    ((768, 3, 32, 32), KERNEL),
    ((1024, 3, 2, 14, 14), KERNEL),
    ((64, 64, 3, 3, 3), KERNEL),
    ((3, 128, 3, 3), KERNEL),
    ((8, 4096, 14336), STACK),  # experts
    ((512, 2048, 512), STACK),
    ((48, 128, 768, 2048), STACK),
    ((8, 4096, 16), STACK),  # adapters
    ((128, 16, 4096), STACK),
    ((12, 64, 64), STACK),
    ((1, 197, 768), STACK),  # position embeddings and biases
    ((1, 768, 14, 14), STACK),
    ((1, 12, 197, 197), STACK),
    ((1, 1, 768), EXACT),
    ((96, 1, 1), EXACT),
    ((1, 1, 1, 1), EXACT),
]


def shape_of(reading: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    size = math.prod(shape)
    return {KERNEL: (shape[0], size // shape[0]), STACK: shape, EXACT: (size,)}[reading]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    try:
        backends.resolve(request.param, "cpu")
    except RuntimeError as error:
        pytest.skip(str(error))
    return request.param


# ---------------------------------------------------------------------------------------------
# how a parameter is read
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "reading"), READINGS, ids=str)
def test_the_shape_alone_decides_the_reading(shape: tuple[int, ...], reading: str) -> None:
    assert stepped_shape(torch.Size(shape), (1, 1)) == shape_of(reading, shape)
    assert documented_matrix(shape) == shape_of(reading, shape)


SIDES = st.sampled_from((1, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 64, 129, 512))


@given(
    shape=st.lists(SIDES, min_size=3, max_size=6).map(tuple),
    blocks=st.sampled_from([(1, 1), "kernel", "stack"]),
    momentum_dtype=st.sampled_from(FORMATS),
)
def test_the_state_is_never_larger_than_adamws(
    shape: tuple[int, ...], blocks: Any, momentum_dtype: str
) -> None:
    state = init_state(torch.empty(shape, device="meta"), momentum_dtype, blocks)
    stripes = [value for key, value in state.items() if key.startswith("exp_avg_sq")]
    momenta = [state[key] for key in ("exp_avg", "exp_avg_scale") if key in state]
    assert sum(value.nbytes for value in stripes) <= 4 * math.prod(shape)
    assert sum(value.nbytes for value in momenta) <= 4 * math.prod(shape)
    matrix = documented_matrix(shape, blocks)
    assert stepped_shape(torch.Size(shape), blocks) == matrix
    if len(matrix) > 1:
        assert state["exp_avg_sq_row"].shape == (*matrix[:-1], 1)
        assert state["exp_avg_sq_col"].shape == (*matrix[:-2], 1, matrix[-1])


def test_blocks_divide_the_matrices_of_a_stack() -> None:
    assert stepped_shape(torch.Size((64, 32, 4)), (2, 1)) == (64, 32, 4)


# ---------------------------------------------------------------------------------------------
# steps
# ---------------------------------------------------------------------------------------------

MODULES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "Conv1d": (lambda: nn.Conv1d(6, 20, 5), (2, 6, 9)),
    "Conv1d, depthwise": (lambda: nn.Conv1d(12, 12, 7, groups=12), (2, 12, 9)),
    "Conv2d": (lambda: nn.Conv2d(15, 8, 3), (2, 15, 5, 5)),
    "Conv2d, in groups": (lambda: nn.Conv2d(12, 16, 3, groups=4), (2, 12, 5, 5)),
    "Conv2d, depthwise": (lambda: nn.Conv2d(16, 16, 3, groups=16), (2, 16, 5, 5)),
    "Conv2d, pointwise": (lambda: nn.Conv2d(16, 24, 1), (2, 16, 5, 5)),
    "Conv2d, one output": (lambda: nn.Conv2d(9, 1, 3), (2, 9, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, (2, 3, 3)), (1, 4, 3, 4, 4)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(8, 6, 4), (2, 8, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(8, 6, 3, groups=2), (2, 8, 4, 4)),
}


def modules(channels_last: bool = False) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    found = {name: make() for name, (make, _) in MODULES.items()}
    for module in found.values():
        if channels_last and module.weight.dim() == 4:
            module.to(memory_format=torch.channels_last)
    return found


def backward(found: dict[str, nn.Module], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, module in found.items():
        x = torch.randn(MODULES[name][1], generator=generator)
        module.zero_grad()
        if not module.weight.is_contiguous():
            x = x.to(memory_format=torch.channels_last)
        module(x).square().sum().backward()


def weights(found: dict[str, nn.Module]) -> list[nn.Parameter]:
    return [module.weight for module in found.values()]


@pytest.mark.parametrize("momentum_dtype", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_a_kernel_is_stepped_as_its_matrix(
    channels_last: bool, dtype: torch.dtype, momentum_dtype: str, backend: str
) -> None:
    """To the bit, with the bits of stochastic rounding, in every memory format."""
    found = modules(channels_last)
    ps = [nn.Parameter(p.detach().to(dtype)) for p in weights(found)]
    if backend == "triton":
        ps = ps[2:5]  # its interpreter is slow
    assert any(not p.is_contiguous() for p in ps) == channels_last
    for p in ps:
        mark_blocks(p, "kernel")
    matrices = [
        nn.Parameter(p.detach().reshape(documented_matrix(p.shape, "kernel")).clone()) for p in ps
    ]
    optimizer, expected = (
        StripedAdamW(params, lr=1e-2, momentum_dtype=momentum_dtype, backend=backend)
        for params in (ps, matrices)
    )
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for p, matrix in zip(ps, matrices, strict=True):
            grad = torch.randn(p.shape, generator=generator).to(dtype)
            p.grad = torch.empty_like(p).copy_(grad)
            matrix.grad = grad.reshape(matrix.shape)
        optimizer.step()
        expected.step()
    for p, matrix in zip(ps, matrices, strict=True):
        assert_same_bits(p.reshape(matrix.shape), matrix, str(tuple(p.shape)))
        for key, value in expected.state[matrix].items():
            ours = optimizer.state[p][key]
            assert_same_bits(ours.view(value.shape), value, f"{tuple(p.shape)}: {key}")


@pytest.mark.parametrize("momentum_dtype", FORMATS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("settings", [{}, {"lagged": True, "nesterov": True}], ids=str)
def test_real_convolutions_follow_the_oracle(
    settings: dict[str, Any], channels_last: bool, momentum_dtype: str, backend: str
) -> None:
    found = modules(channels_last)
    if backend == "triton":
        found = {name: found[name] for name in ("Conv2d", "Conv2d, depthwise")}
    params = [p for module in found.values() for p in module.parameters()]
    optimizer = StripedAdamW(
        params, lr=1e-2, momentum_dtype=momentum_dtype, backend=backend, **settings
    )
    follower = Follower(optimizer, rtol=3e-6, tiny=1e-30)
    for seed in range(3):
        backward(found, seed)
        follower.step()


@pytest.mark.parametrize("of", ["parameter", "gradient"])
def test_a_parameter_or_its_gradient_alone_may_be_channels_last(of: str, backend: str) -> None:
    p = nn.Parameter(torch.randn(8, 16, 3, 3))
    q = nn.Parameter(p.detach().clone())
    p.grad = torch.randn(8, 16, 3, 3)
    q.grad = p.grad.clone()
    if of == "parameter":
        q.data = q.data.to(memory_format=torch.channels_last)
    else:
        q.grad = q.grad.to(memory_format=torch.channels_last)
    for param in (p, q):
        StripedAdamW([param], momentum_dtype="int8", backend=backend).step()
    assert_same_bits(q, p)
    assert q.is_contiguous(memory_format=torch.channels_last) == (of == "parameter")


def test_a_change_of_the_memory_format_changes_nothing() -> None:
    one, two = modules(), modules()
    for p in weights(one) + weights(two):
        mark_blocks(p, "kernel")
    optimizers = [StripedAdamW(weights(found), momentum_dtype="int8") for found in (one, two)]
    for seed in range(4):
        if seed == 2:
            for module in two.values():
                if module.weight.dim() == 4:
                    module.to(memory_format=torch.channels_last)
        for a, b in zip(weights(one), weights(two), strict=True):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(seed))
            b.grad = torch.empty_like(b).copy_(a.grad)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(weights(one), weights(two), strict=True):
        assert_same_bits(b, a)


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_tensors_without_values_are_stepped(kind: str) -> None:
    if kind == "meta":
        p = nn.Parameter(torch.empty(8, 16, 3, 3, device="meta"))
        p.grad = torch.empty_like(p)
        optimizer = StripedAdamW([p], momentum_dtype="int8")
        optimizer.step()
    else:
        with FakeTensorMode():
            p = nn.Parameter(torch.empty(8, 16, 3, 3))
            p.grad = torch.empty_like(p, memory_format=torch.channels_last)
            optimizer = StripedAdamW([p], momentum_dtype="int8")
            optimizer.step()
    assert optimizer.state[p]["exp_avg"].shape == (8, 144)


# ---------------------------------------------------------------------------------------------
# the readings that a model decides
# ---------------------------------------------------------------------------------------------


class Model(nn.Module):
    """A positional convolution like wav2vec's, which has a stack's shape; and experts."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Conv1d(64, 32, 32)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(32, 32, 16), dim=2)
        self.experts = nn.Parameter(torch.randn(4, 16, 24))


def stripes(optimizer: StripedAdamW, param: nn.Parameter) -> torch.Size:
    return optimizer.state[param]["exp_avg_sq_col"].shape


def step(optimizer: StripedAdamW, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("how", ["marks", "param_groups"])
def test_a_module_marks_its_kernels(how: str) -> None:
    model = Model()
    if how == "marks":
        mark_matrices(model)
        optimizer = StripedAdamW(model.parameters())
    else:
        optimizer = StripedAdamW(param_groups(model, 0.1))
    step(optimizer)
    assert stripes(optimizer, model.positions.weight) == (1, 64 * 32)
    assert stripes(optimizer, model.normed.parametrizations.weight.original1) == (1, 32 * 16)
    assert stripes(optimizer, model.experts) == (4, 1, 24)
    bare = StripedAdamW([nn.Parameter(torch.randn(32, 64, 32))])
    step(bare)
    assert stripes(bare, bare.param_groups[0]["params"][0]) == (32, 1, 32)


def test_a_mark_outlives_a_copy_and_a_swap_of_the_parameters() -> None:
    model = Model()
    mark_matrices(model)
    optimizer = StripedAdamW(model.parameters())
    step(optimizer)
    copied_model, copied = copy.deepcopy((model, optimizer))
    other = nn.Parameter(model.positions.weight.detach().clone())
    torch.utils.swap_tensors(model.positions.weight, other)
    assert not hasattr(model.positions.weight, "_striped_hf_blocks")
    for each, trained in ((optimizer, model), (copied, copied_model)):
        step(each, 1)
        assert stripes(each, trained.positions.weight) == (1, 64 * 32)
    for group in optimizer.param_groups:  # other code, which knows only of the defaults
        group["blocks"] = (1, 1)
    step(optimizer, 2)
    assert stripes(optimizer, model.positions.weight) == (1, 64 * 32)


def test_a_group_may_decide_how_its_parameters_are_read() -> None:
    shapes = [(32, 64, 32), (32, 4, 3), (6, 5), (7,)]
    ps = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    kernels = StripedAdamW(ps, blocks="kernel")
    step(kernels)
    assert stripes(kernels, ps[0]) == (1, 64 * 32)
    assert stripes(kernels, ps[2]) == (1, 5)
    stacks = StripedAdamW([{"params": ps, "blocks": ["stack", "stack", (2, 1), (1, 1)]}])
    step(stacks)
    assert stripes(stacks, ps[0]) == (32, 1, 32)
    assert stripes(stacks, ps[1]) == (32, 1, 3)
    assert stripes(stacks, ps[2]) == (2, 5)
    with pytest.raises(ValueError, match="'row'"):
        StripedAdamW(ps, blocks="row")


# ---------------------------------------------------------------------------------------------
# state dicts
# ---------------------------------------------------------------------------------------------

SAVED_SHAPES = [(16, 15, 3, 3), (24, 16, 1, 1), (12, 1, 7), (6, 1, 1), (4, 3, 2, 3, 3), (2, 3, 4)]


def saved_as_stacks(
    ps: list[nn.Parameter], momentum_dtype: str
) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Returns an old state dict, in which every parameter was a stack, and its momenta."""
    states, momenta = {}, []
    for i, p in enumerate(ps):
        stored = momentum.storage_format(p.shape, momentum_dtype)
        m = torch.randn(p.shape)
        codes, scale = momentum.encode(m, stored)
        v = torch.rand(p.shape) + 0.5
        states[i] = {
            "step": torch.tensor(3.0),
            "exp_avg": codes,
            "exp_avg_sq_row": v.mean(-1, keepdim=True),
            "exp_avg_sq_col": v.mean(-2, keepdim=True),
        }
        decoded = None if scale is None else scale.numpy()
        if scale is not None:
            states[i]["exp_avg_scale"] = scale
        name = stored if scale is not None else "float32"
        if scale is None:
            momenta.append(codes.float())
        else:
            values = decode_documented(codes.numpy(), decoded, name, p.shape[-1])
            momenta.append(torch.from_numpy(values))
    saved = StripedAdamW(ps, momentum_dtype=momentum_dtype).state_dict()
    return {**saved, "state": states}, momenta


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_state_dicts_of_kernels_saved_as_stacks_are_loaded(momentum_dtype: str) -> None:
    ps = [nn.Parameter(torch.randn(shape)) for shape in SAVED_SHAPES]
    saved, momenta = saved_as_stacks(ps, momentum_dtype)
    kept = copy.deepcopy(saved)
    optimizer = StripedAdamW(ps, momentum_dtype=momentum_dtype)
    optimizer.load_state_dict(saved)
    exported = adamw_state_dict(optimizer)["state"]
    for i, p in enumerate(ps):
        state, old, shape = optimizer.state[p], kept["state"][i], documented_matrix(p.shape)
        assert state["step"] == 3
        rows, cols = old["exp_avg_sq_row"], old["exp_avg_sq_col"]
        v = rows * cols / rows.mean(-2, keepdim=True)
        if len(shape) == 1:
            torch.testing.assert_close(state["exp_avg_sq"], v)
        elif shape != p.shape:
            row = rows.flatten(1).mean(1, keepdim=True)
            torch.testing.assert_close(state["exp_avg_sq_row"], row)
            col = v.reshape(shape).mean(0, keepdim=True)
            torch.testing.assert_close(state["exp_avg_sq_col"], col)
        else:
            assert_same_bits(state["exp_avg_sq_row"], rows)
        off = (exported[i]["exp_avg"].double() - momenta[i].double()).abs().max()
        allowed = {"float32": 0.0, "bfloat16": 0.0, "int8": 0.02, "int4": 0.3}[momentum_dtype]
        assert off <= allowed * momenta[i].abs().max()
        for key, value in old.items():
            assert_same_bits(saved["state"][i][key], value)
    step(optimizer)


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_a_state_of_another_reading_is_converted(momentum_dtype: str) -> None:
    p = nn.Parameter(torch.randn(32, 16, 20))
    kernel = StripedAdamW([p], momentum_dtype=momentum_dtype, blocks="kernel")
    stack = StripedAdamW([p], momentum_dtype=momentum_dtype, blocks="stack")
    step(kernel)
    stack.load_state_dict(kernel.state_dict())
    assert stripes(stack, p) == (32, 1, 20)
    again = StripedAdamW([p], momentum_dtype=momentum_dtype, blocks="kernel")
    again.load_state_dict(stack.state_dict())
    for key in ("exp_avg_sq_row", "exp_avg_sq_col"):  # a kernel's moments have a stack's form too
        torch.testing.assert_close(again.state[p][key].mean(), kernel.state[p][key].mean())
    assert stack.param_groups[0]["blocks"] == "stack"
    step(stack, 1)


def test_a_damaged_state_of_another_reading_is_refused() -> None:
    ps = [nn.Parameter(torch.randn(16, 15, 3, 3))]
    saved, _ = saved_as_stacks(ps, "int8")
    optimizer = StripedAdamW(ps, momentum_dtype="int8")
    saved["state"][0]["exp_avg_scale"][0] = -1.0
    with pytest.raises(ValueError, match="negative"):
        optimizer.load_state_dict(saved)
    saved["state"][0]["exp_avg_sq_row"] = torch.ones(16, 15, 2, 1)
    with pytest.raises(ValueError, match="exp_avg"):
        optimizer.load_state_dict(saved)
    assert not optimizer.state


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_a_kernels_state_is_converted_from_adamw_and_back(momentum_dtype: str) -> None:
    found = modules(channels_last=True)
    ps = weights(found)
    adamw = torch.optim.AdamW(ps)
    backward(found, 0)
    adamw.step()
    optimizer = StripedAdamW(ps, momentum_dtype=momentum_dtype)
    optimizer.load_state_dict(adamw.state_dict())
    back = torch.optim.AdamW(ps)
    back.load_state_dict(adamw_state_dict(optimizer))
    for p in ps:
        v, shape = adamw.state[p]["exp_avg_sq"], documented_matrix(p.shape)
        if len(shape) == 2:
            state = optimizer.state[p]
            matrix = v.reshape(shape)
            torch.testing.assert_close(state["exp_avg_sq_row"], matrix.mean(1, keepdim=True))
            torch.testing.assert_close(state["exp_avg_sq_col"], matrix.mean(0, keepdim=True))
        exported = back.state[p]
        assert exported["exp_avg"].shape == p.shape
        rows, expanded = v.flatten(1).mean(1), exported["exp_avg_sq"].flatten(1).mean(1)
        torch.testing.assert_close(expanded, rows)
        if momentum_dtype == "float32":
            assert (to_numpy(exported["exp_avg"]) == to_numpy(adamw.state[p]["exp_avg"])).all()
    backward(found, 1)
    optimizer.step()
    back.step()


@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_the_state_of_an_exact_parameter_may_have_any_strides(
    momentum_dtype: str, every_backend: str
) -> None:
    params = [torch.nn.Parameter(torch.ones(2, 1, 2)) for _ in range(2)]
    optimizers = [StripedAdamW([p], momentum_dtype=momentum_dtype) for p in params]
    for step in range(3):
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        state = optimizers[0].state[params[0]]
        assert state["exp_avg_sq"].shape == (2, 1, 2)
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = lay_out(state[key], "permuted")
    assert torch.equal(*params)
