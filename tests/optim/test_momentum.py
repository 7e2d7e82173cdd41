"""The momentum formats: error bounds, byte layout, coded tensors, bytes per parameter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optim_checks import (
    BLOCK,
    CODED,
    FORMATS,
    QMAX,
    assert_same_bits,
    code_bound,
    decode_documented,
    documented_matrix,
    expected_format,
    gpt2_124m_shapes,
    parameter,
    state_bytes,
    to_numpy,
)

from striped_hf import StripedAdamW
from striped_hf.optim.momentum import decode, encode

pytestmark = pytest.mark.usefixtures("every_backend")

STORED_DTYPE = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "int4": torch.uint8,
}


def round_trip(values: torch.Tensor, momentum_dtype: str) -> torch.Tensor:
    codes, scale = encode(values, momentum_dtype)
    decoded = decode(codes, scale, momentum_dtype, values.shape[-1])
    assert decoded.dtype == torch.float32
    assert decoded.shape == values.shape
    return decoded


# ---------------------------------------------------------------------------------------------
# shapes and layout
# ---------------------------------------------------------------------------------------------

WIDTHS = [1, 2, 3, 5, 64, 126, 127, 128, 129, 130, 131, 191, 255, 256, 257, 383]


@pytest.mark.parametrize("momentum_dtype", FORMATS)
@pytest.mark.parametrize("C", WIDTHS)
def test_formats_store_the_documented_shapes_and_dtypes(C: int, momentum_dtype: str) -> None:
    codes, scale = encode(torch.randn(2, 3, C), momentum_dtype)
    assert codes.dtype == STORED_DTYPE[momentum_dtype]
    assert codes.shape == (2, 3, -(-C // 2) if momentum_dtype == "int4" else C)
    if momentum_dtype in CODED:
        assert scale is not None
        assert scale.dtype == torch.float32
        assert scale.shape == (2, 3, -(-C // BLOCK))
    else:
        assert scale is None


@pytest.mark.parametrize("momentum_dtype", CODED)
@pytest.mark.parametrize("C", WIDTHS)
def test_decoding_is_as_documented(C: int, momentum_dtype: str) -> None:
    codes, scale = encode(torch.randn(4, C) * torch.logspace(-4, 4, 4)[:, None], momentum_dtype)
    decoded = decode(codes, scale, momentum_dtype, C)
    assert scale is not None
    documented = decode_documented(codes.numpy(), scale.numpy(), momentum_dtype, C)
    np.testing.assert_allclose(to_numpy(decoded), documented, rtol=3e-7)


def test_int8_codes_are_what_the_formula_says() -> None:
    # absmax 4, so s = sqrt(|x|/4): 1, 0.5, 0.25, 0.707..., 0; times 127 and rounded
    values = torch.tensor([[-4.0, 1.0, -0.25, 2.0, 0.0, -0.0]])
    codes, scale = encode(values, "int8")
    assert scale is not None
    assert scale.tolist() == [[4.0]]
    # 127 / 2 = 63.5 rounds to even, 127 / 4 = 31.75, 127 / sqrt(2) = 89.8
    assert codes.tolist() == [[-127, 64, -32, 90, 0, 0]]


def test_int4_bytes_of_a_short_even_block() -> None:
    """Element k in the low nibble of byte k, element k + n/2 in the high one, each code + 8."""
    # absmax 49 makes the codes square roots: 7, -3, 0, 5, -7, 1
    values = torch.tensor([[49.0, -9.0, 0.0, 25.0, -49.0, 1.0]])
    codes, scale = encode(values, "int4")
    assert scale is not None
    assert scale.tolist() == [[49.0]]
    # low nibbles 15, 5, 8; high nibbles 13, 1, 9
    assert codes.tolist() == [[0xDF, 0x15, 0x98]]


def test_int4_bytes_of_a_short_odd_block() -> None:
    values = torch.tensor([[49.0, -9.0, 0.0, 25.0, -49.0]])  # codes 7, -3, 0 | 5, -7
    codes, _ = encode(values, "int4")
    assert codes[0, :2].tolist() == [0xDF, 0x15]
    assert int(codes[0, 2]) & 0x0F == 8  # the high nibble is unused
    assert codes.shape == (1, 3)


def test_int4_bytes_of_a_full_block_and_a_short_one() -> None:
    """A full block pairs elements 64 apart; the short block after it pairs its halves."""
    values = torch.zeros(1, 132)
    values[0, 0], values[0, 64], values[0, 63], values[0, 127] = 49.0, -49.0, 4.0, 16.0
    values[0, 128:] = torch.tensor([0.49, 0.04, -0.25, -0.01])
    codes, scale = encode(values, "int4")
    assert scale is not None
    assert codes.shape == (1, 66)
    torch.testing.assert_close(scale, torch.tensor([[49.0, 0.49]]), rtol=0, atol=0)
    expected = [0x88] * 64
    expected[0], expected[63] = 0x1F, 0xCA  # 7 and -7; 2 and 4
    expected += [0x3F, 0x7A]  # 7 and -5; 2 and -1
    assert codes[0].tolist() == expected


@pytest.mark.parametrize("momentum_dtype", CODED)
def test_blocks_never_reach_into_the_next_row(momentum_dtype: str) -> None:
    """A single row has the same bytes as in the matrix: any sharding by rows is exact."""
    values = torch.randn(5, 200) * torch.logspace(-3, 3, 5)[:, None]
    codes, scale = encode(values, momentum_dtype)
    assert scale is not None
    for i in range(5):
        row_codes, row_scale = encode(values[i : i + 1], momentum_dtype)
        assert row_scale is not None
        assert_same_bits(row_codes, codes[i : i + 1])
        assert_same_bits(row_scale, scale[i : i + 1])


# ---------------------------------------------------------------------------------------------
# error
# ---------------------------------------------------------------------------------------------


@given(
    momentum_dtype=st.sampled_from(CODED),
    C=st.integers(1, 2 * BLOCK + 1),
    exponent=st.integers(-37, 37),
    spread=st.integers(0, 12),
    seed=st.integers(0, 2**31),
)
def test_round_trip_error(
    momentum_dtype: str, C: int, exponent: int, spread: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.choice([-1.0, 1.0], (3, C)) * 10.0 ** (exponent - rng.uniform(0, spread, (3, C)))
    x = torch.as_tensor(values, dtype=torch.float32)
    decoded, exact = to_numpy(round_trip(x, momentum_dtype)), to_numpy(x)
    assert (np.abs(decoded - exact) <= code_bound(exact, momentum_dtype)).all()
    assert (decoded * exact >= 0).all()  # a sign may become zero, but never the opposite sign
    for start in range(0, C, BLOCK):
        block, coded = exact[:, start : start + BLOCK], decoded[:, start : start + BLOCK]
        # the largest of a block is kept exactly
        np.testing.assert_array_equal(np.abs(coded).max(-1), np.abs(block).max(-1))
        # the order of the elements is kept, too
        order = np.argsort(block, axis=-1)
        assert (np.diff(np.take_along_axis(coded, order, -1), axis=-1) >= 0).all()


@pytest.mark.parametrize("momentum_dtype", CODED)
def test_the_error_is_within_the_bound_of_each_code(momentum_dtype: str) -> None:
    """|decoded - x| <= absmax (4 k + 1) / (4 qmax^2) at code k, over the whole range of a block."""
    qmax = QMAX[momentum_dtype]
    x = torch.linspace(0, 1, 127 * 200).reshape(200, 127)
    x = torch.cat([x, torch.ones(200, 1)], dim=-1)  # absmax 1 in every block
    decoded = to_numpy(round_trip(x, momentum_dtype))
    k = np.round(np.sqrt(decoded) * qmax)
    error = np.abs(decoded - to_numpy(x))
    assert (error <= (4 * k + 1) / (4 * qmax**2) + 1e-6).all()
    assert set(np.unique(k)) == set(range(qmax + 1))  # every code is used


@pytest.mark.parametrize("momentum_dtype", CODED)
def test_encoding_decoded_values_changes_nothing(momentum_dtype: str) -> None:
    values = torch.randn(7, 300) * torch.logspace(-6, 6, 7)[:, None]
    codes, scale = encode(values, momentum_dtype)
    again, scale_again = encode(decode(codes, scale, momentum_dtype, 300), momentum_dtype)
    assert scale is not None
    assert scale_again is not None
    assert_same_bits(again, codes)
    assert_same_bits(scale_again, scale)


@pytest.mark.parametrize("momentum_dtype", CODED)
def test_opposite_values_have_opposite_codes(momentum_dtype: str) -> None:
    values = torch.randn(3, 200)
    assert_same_bits(
        round_trip(-values, momentum_dtype) + 0.0, -round_trip(values, momentum_dtype) + 0.0
    )


@pytest.mark.parametrize("momentum_dtype", CODED)
@pytest.mark.parametrize("C", [1, 5, 128, 129, 200])
def test_zero_blocks_stay_zero(C: int, momentum_dtype: str) -> None:
    values = torch.zeros(3, C)
    values[1] = 1.0
    decoded = round_trip(values, momentum_dtype)
    assert_same_bits(decoded, values)
    codes, _ = encode(torch.zeros(3, 128), momentum_dtype)
    assert (codes == (0x88 if momentum_dtype == "int4" else 0)).all()


@pytest.mark.parametrize("momentum_dtype", CODED)
@pytest.mark.parametrize(
    "absmax",
    [1e-45, 1e-42, 1.1754942e-38, 1e-38, 1e-20, 1.0, 1e20, 1e38, 3.4028235e38],
    ids=str,
)
def test_extremes(absmax: float, momentum_dtype: str) -> None:
    """Denormals up to the largest float: no overflow, no NaN, the bound holds."""
    fractions = torch.tensor([1.0, -0.5, 0.3, -0.1, 0.01, 0.0] * 22)
    x = (fractions.double() * absmax).float().unsqueeze(0)
    decoded = round_trip(x, momentum_dtype)
    assert decoded.isfinite().all()
    exact = to_numpy(x)
    spacing = 1.5e-45  # of denormals
    bound = code_bound(exact, momentum_dtype) + spacing
    assert (np.abs(to_numpy(decoded) - exact) <= bound).all()
    assert_same_bits(decoded.abs().max(), x.abs().max())


@pytest.mark.parametrize("momentum_dtype", CODED)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_inf_and_nan_do_not_become_numbers(bad: float, momentum_dtype: str) -> None:
    """It stays as in an fp32 average, and only within its block of 128 elements."""
    values = torch.ones(3, 300)
    values[1, 140] = bad
    decoded = round_trip(values, momentum_dtype)
    assert not decoded[1, 140].isfinite()
    assert torch.equal(decoded[[0, 2]], values[[0, 2]])
    assert torch.equal(decoded[1, :128], values[1, :128])
    assert torch.equal(decoded[1, 256:], values[1, 256:])


def test_bfloat16_rounds_to_nearest() -> None:
    values = torch.randn(5, 131)
    assert_same_bits(round_trip(values, "bfloat16"), values.bfloat16().float())


def test_float32_is_exact() -> None:
    values = torch.randn(5, 131)
    assert_same_bits(round_trip(values, "float32"), values)


def test_encode_does_not_change_its_argument() -> None:
    for momentum_dtype in FORMATS:
        values = torch.randn(3, 130)
        copy = values.clone()
        encode(values, momentum_dtype)
        assert_same_bits(values, copy)


@pytest.mark.parametrize("momentum_dtype", CODED)
def test_strided_input(momentum_dtype: str) -> None:
    values = torch.randn(131, 6).T
    for one, other in zip(
        encode(values, momentum_dtype), encode(values.contiguous(), momentum_dtype), strict=True
    ):
        assert one is not None
        assert other is not None
        assert_same_bits(one, other)


# ---------------------------------------------------------------------------------------------
# in the optimizer
# ---------------------------------------------------------------------------------------------

STATE_SHAPES = [
    (),
    (5,),
    (128,),
    (4, 1),
    (1, 1),
    (3, 2, 1),
    (4, 2),
    (1, 2),
    (1, 9),
    (4, 200),
    (2, 3, 129),
    (8, 6, 3, 3),
    (16, 1, 3),
    (7, 1, 1),
    (0, 5),
    (5, 0),
    (0,),
]


@pytest.mark.parametrize("momentum_dtype", FORMATS)
@pytest.mark.parametrize("shape", STATE_SHAPES, ids=str)
def test_state_of_a_parameter(shape: tuple[int, ...], momentum_dtype: str) -> None:
    """Keys, dtypes and shapes are as documented; momentum is fp32 where codes save nothing."""
    p = parameter(torch.randn(shape), torch.bfloat16)
    optimizer = StripedAdamW([p], momentum_dtype=momentum_dtype)
    assert not optimizer.state  # nothing is allocated before the first gradient
    p.grad = torch.randn_like(p)
    optimizer.step()
    state = dict(optimizer.state[p])

    step = state.pop("step")
    assert step.shape == ()
    assert step.dtype == torch.float32
    assert step.device.type == "cpu"

    matrix = documented_matrix(shape)
    kept = expected_format(matrix, momentum_dtype)
    exp_avg = state.pop("exp_avg")
    assert exp_avg.dtype == STORED_DTYPE[kept]
    if kept == "int4":
        assert exp_avg.shape == (*matrix[:-1], -(-matrix[-1] // 2))
    else:
        assert exp_avg.shape == (matrix if len(matrix) > 1 else shape)
    if kept in CODED:
        scale = state.pop("exp_avg_scale")
        assert scale.dtype == torch.float32
        assert scale.shape == (*matrix[:-1], -(-matrix[-1] // BLOCK))
        coded = exp_avg.nbytes + scale.nbytes
        assert coded < 4 * p.numel()

    if len(matrix) < 2:
        low_bits = state.pop("param_low_bits")  # of a vector in bfloat16
        assert low_bits.dtype == torch.int32
        assert low_bits.shape == shape
        assert list(state) == ["exp_avg_sq"]
        assert state["exp_avg_sq"].shape == shape
    else:
        assert set(state) == {"exp_avg_sq_row", "exp_avg_sq_col"}
        assert state["exp_avg_sq_row"].shape == (*matrix[:-1], 1)
        assert state["exp_avg_sq_col"].shape == (*matrix[:-2], 1, matrix[-1])
    assert all(value.dtype == torch.float32 for value in state.values())


@pytest.mark.parametrize("blocks", [(1, 3), (2, 1), (2, 3)], ids=str)
def test_stripes_of_a_packed_matrix(blocks: tuple[int, int]) -> None:
    p = parameter(torch.randn(5, 4, 6))
    optimizer = StripedAdamW([p], blocks=blocks)
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert optimizer.state[p]["exp_avg_sq_row"].shape == (5, 4, blocks[1])
    assert optimizer.state[p]["exp_avg_sq_col"].shape == (5, blocks[0], 6)


BYTES_PER_PARAMETER = {"float32": 4.01, "bfloat16": 2.01, "int8": 1.04, "int4": 0.54}


@pytest.mark.slow
@pytest.mark.parametrize("momentum_dtype", FORMATS)
def test_bytes_per_parameter_of_gpt2_124m(momentum_dtype: str) -> None:
    """Counts the states' tensors, one for each shape, times the number of parameters."""
    shapes = gpt2_124m_shapes()
    total = 0
    for shape in set(shapes):
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = torch.zeros(1).expand(shape)
        optimizer = StripedAdamW([p], momentum_dtype=momentum_dtype)
        optimizer.step()
        total += shapes.count(shape) * state_bytes(optimizer)
    assert round(total / 124_439_808, 2) == BYTES_PER_PARAMETER[momentum_dtype]
