"""Rounding and momentum codes in Triton: device functions that the kernels call.

``striped_hf/optim/rounding.py`` and ``striped_hf/optim/momentum.py`` have the same functions in
PyTorch. The random bits and both roundings agree with them to the bit. A code may differ by one,
because it uses fast square roots, with errors of up to 2 units in the last place.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from striped_hf.optim import rounding
from striped_hf.optim.backends.triton import INTERPRETED

_SEED = tl.constexpr(rounding.SEED)
_FLOAT16_MIN_NORMAL = tl.constexpr(2.0**-14)
_CAST_TRUNCATES = tl.constexpr(INTERPRETED)  # the interpreter's cast to bfloat16 does not round
# 1.5 * 2^23: added to a number below 2^22 it rounds to an integer, half to even, in the low bits
_TO_INTEGER = tl.constexpr(12582912.0)


# ---------------------------------------------------------------------------------------------
# random bits
# ---------------------------------------------------------------------------------------------


@triton.jit
def _mix(x):  # uint32
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def step_key(step):  # int32 -> uint32
    """Returns the key of a step's random bits."""
    return _mix(step.to(tl.uint32) ^ _SEED)


@triton.jit
def random_bits(low, high, key):  # uint32
    """Returns ``rounding.random_bits`` of element 2^32 high + low, by the step's key."""
    # Each element has a hash of its own. One hash for two elements, with 16 bits for each, was
    # tried in the update of bfloat16 parameters with int8 momentum on sm_90. It has 70.3
    # instructions for an element (``benchmarks.compiled_kernels.matrices(BF16, "int8")``, counted
    # by ``benchmarks.sass``), 54.0 with ``stochastic_rounding=False``, and 64.4 with half a hash:
    # 8% less. That is too little for new random bits in every backend, and for tiles that must
    # begin at even elements of the whole parameter.
    return _mix(_mix(low ^ _mix(key ^ high)))


# ---------------------------------------------------------------------------------------------
# rounding
# ---------------------------------------------------------------------------------------------


@triton.jit
def _truncate_after_adding(values, bits, MASK: tl.constexpr):
    summed = values.to(tl.uint32, bitcast=True) + (bits & MASK)
    return (summed & (0xFFFFFFFF - MASK)).to(tl.float32, bitcast=True)


@triton.jit
def stochastic_round(values, bits, DTYPE: tl.constexpr):  # float32, uint32 -> DTYPE
    """``rounding.stochastic_round``."""
    if DTYPE == tl.bfloat16:
        rounded = _truncate_after_adding(values, bits, 0xFFFF)
    else:
        rounded = _truncate_after_adding(values, bits, 0x1FFF)
        offset = _truncate_after_adding(tl.abs(values) + _FLOAT16_MIN_NORMAL, bits, 0x1FFF)
        magnitude = (offset - _FLOAT16_MIN_NORMAL).to(tl.uint32, bitcast=True)
        sign = values.to(tl.uint32, bitcast=True) & 0x80000000
        subnormal = (magnitude | sign).to(tl.float32, bitcast=True)
        rounded = tl.where(tl.abs(values) < _FLOAT16_MIN_NORMAL, subnormal, rounded)
    return tl.where(tl.abs(values) < float("inf"), rounded, values).to(DTYPE)


@triton.jit
def round_to_nearest(values, DTYPE: tl.constexpr):  # float32 -> DTYPE
    """Rounds to nearest, half to even, like a GPU's cast."""
    if _CAST_TRUNCATES and DTYPE == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        values = tl.where(values == values, rounded, values)
    return values.to(DTYPE)


@triton.jit
def round_to_24_bits(values, bits):  # float32, uint32 -> float32
    """``rounding.round_to_24_bits``; to nearest if ``bits`` are 0x80."""
    return tl.where(values == values, _truncate_after_adding(values, bits, 0xFF), values)


@triton.jit
def join(high, low):  # bfloat16, int32 or int8 -> float32
    """``rounding.join``."""
    high_bits = high.to(tl.uint16, bitcast=True).to(tl.uint32)
    added = low.to(tl.int32)
    added = tl.where(((high_bits & 0x7FFF) == 0) & (added < 0), 0, added)
    if low.dtype == tl.int8:
        added = added << 8
    bits = (high_bits << 16).to(tl.int32, bitcast=True) + added
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def split(values, DTYPE: tl.constexpr):  # float32 -> bfloat16, DTYPE: int32 or int8
    """``rounding.split``."""
    bits = values.to(tl.uint32, bitcast=True)
    is_nan = values != values
    high = tl.where(is_nan, 0x7FC0, (bits + 0x8000) >> 16)
    low = (bits << 16).to(tl.int32, bitcast=True) >> (24 if DTYPE == tl.int8 else 16)
    low = tl.where(is_nan, 0, low).to(DTYPE)
    return high.to(tl.uint16).to(tl.bfloat16, bitcast=True), low


# ---------------------------------------------------------------------------------------------
# momentum codes
# ---------------------------------------------------------------------------------------------


@triton.jit
def decode(codes, scale, QMAX: tl.constexpr):  # [r, c] int32, [r] float32 -> [r, c] float32
    """Decodes one quantization block per row, as ``momentum.decode``; codes in [-QMAX, QMAX]."""
    values = codes.to(tl.float32)
    return values * tl.abs(values) * (1.0 / (QMAX * QMAX)) * scale[:, None]


@triton.jit
def largest_magnitude(m):  # [r, c] float32 -> [r] int32
    """Returns the bits of each row's largest magnitude. As an integer, NaN is the largest."""
    return tl.max(tl.abs(m).to(tl.int32, bitcast=True), axis=1)


@triton.jit
def encode(m, scale, QMAX: tl.constexpr):  # [r, c] float32, [r] float32 -> [r, c] int32
    """Encodes one quantization block per row, as ``momentum.encode``; codes in [-QMAX, QMAX]."""
    # the fast root takes subnormal numbers for 0, so small blocks are multiplied by 2^64
    lift = tl.where(scale < 5.421010862427522e-20, 1.8446744073709552e19, 1.0)
    # sqrt(x) / sqrt(scale), not sqrt(x / scale): one division per row
    factor = tl.div_rn(QMAX * 1.0, tl.sqrt_rn(scale * lift))
    magnitude = tl.sqrt(tl.abs(m) * lift[:, None]) * factor[:, None] + _TO_INTEGER
    codes = magnitude.to(tl.int32, bitcast=True) & 0xFF
    coded = (scale > 0.0) & (scale < float("inf"))
    codes = tl.where(coded[:, None], codes, 0)
    return tl.where(m < 0.0, -codes, codes)


# ---------------------------------------------------------------------------------------------
# momentum in memory
# ---------------------------------------------------------------------------------------------


class StoredMomentum(NamedTuple):
    """The place of a program's tiles of the momentum: the columns of one quantization block."""

    exp_avg: Any  # pointer
    scales: Any  # pointer to the block's scale of row 0, if there are codes
    code_columns: Any  # columns of ``exp_avg``
    scale_columns: Any
    code_index: Any  # [c] int32: the tile's columns of ``exp_avg``


@triton.jit
def load_momentum(stored, rows, in_rows, inside, high_inside, QMAX: tl.constexpr):
    """Reads a tile of the momentum.

    Args:
        stored: ``StoredMomentum``.
        rows: [r] int32: indices.
        in_rows: [r] bool: whether the row belongs to the program.
        inside: [c] bool: whether the column belongs to the matrix.
        high_inside: [c] bool: the same, for the columns of 4-bit codes in the high half of a byte.
        QMAX: The largest code; 0 where the momentum has no codes.

    Returns:
        [r, c] float32: the momentum. If two codes share a byte, also the momentum of the high
        halves. It is 0 outside of the matrix.
    """
    mask = in_rows[:, None] & inside[None, :]
    offsets = rows.to(tl.int64)[:, None] * stored.code_columns + stored.code_index[None, :]
    codes = tl.load(stored.exp_avg + offsets, mask=mask, other=0)
    if QMAX == 0:
        m = codes.to(tl.float32)
        high_m = m
    else:
        scale_offsets = rows.to(tl.int64) * stored.scale_columns
        scale = tl.load(stored.scales + scale_offsets, mask=in_rows, other=0.0)
        if QMAX == 7:
            both = codes.to(tl.int32)
            high_mask = in_rows[:, None] & high_inside[None, :]
            m = tl.where(mask, decode((both & 15) - 8, scale, QMAX), 0.0)
            high_m = tl.where(high_mask, decode((both >> 4) - 8, scale, QMAX), 0.0)
        else:
            m = decode(codes.to(tl.int32), scale, QMAX)
            high_m = m
    return m, high_m


@triton.jit
def store_momentum(
    m, high_m, stored, rows, in_rows, inside, high_inside, QMAX: tl.constexpr, DTYPE: tl.constexpr
):
    """Writes a tile of the momentum in DTYPE; the other arguments are as in ``load_momentum``."""
    mask = in_rows[:, None] & inside[None, :]
    offsets = rows.to(tl.int64)[:, None] * stored.code_columns + stored.code_index[None, :]
    if QMAX == 0:
        tl.store(stored.exp_avg + offsets, round_to_nearest(m, DTYPE), mask=mask)
    else:
        largest = largest_magnitude(m)
        if QMAX == 7:
            largest = tl.maximum(largest, largest_magnitude(high_m))
        scale = largest.to(tl.float32, bitcast=True)
        codes = encode(m, scale, QMAX)
        if QMAX == 7:
            # the last byte of an odd block has no code in its high half, which is stored as 0
            high_mask = in_rows[:, None] & high_inside[None, :]
            high_codes = tl.where(high_mask, encode(high_m, scale, QMAX) + 8, 0)
            codes = (codes + 8) | (high_codes << 4)
        tl.store(stored.exp_avg + offsets, codes.to(DTYPE), mask=mask)
        scale_offsets = rows.to(tl.int64) * stored.scale_columns
        tl.store(stored.scales + scale_offsets, scale, mask=in_rows)
