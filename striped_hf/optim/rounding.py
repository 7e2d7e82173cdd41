"""Stores float32 values in fewer bits: rounded stochastically, or split into two parts.

Rounding to nearest loses every update below half a unit in the last place. For bfloat16 this is
every update below about 1/512 of the weight. Rounding up with the probability of the remainder
keeps the mean.

The random bits do not come from a generator. They are a hash of (``SEED``, step, index of the
element in the whole parameter), so that data-parallel replicas, a resumed run, every backend and
every sharding use the same bits.
"""

import torch
from torch import Tensor

SEED = 0x5712_19ED
LOW_PRECISION = (torch.bfloat16, torch.float16)

_FLOAT16_MIN_NORMAL = 2.0**-14


def _multiply(x: Tensor, factor: int) -> Tensor:
    """Computes x * factor modulo 2^32, in place; int32 holds the bits."""
    return x.mul_(factor - (1 << 32) if factor >= 1 << 31 else factor)


def _xor_shift(x: Tensor, shift: int) -> Tensor:
    """Computes x ^ (x >> shift) on the bits as unsigned integers, in place."""
    return x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1))


def _mix(x: Tensor) -> Tensor:
    """Applies MurmurHash3's 32-bit finalizer, in place on int32."""
    x = _multiply(_xor_shift(x, 16), 0x85EB_CA6B)
    x = _multiply(_xor_shift(x, 13), 0xC2B2_AE35)
    return _xor_shift(x, 16)


def _mix_int(x: int) -> int:
    """Applies ``_mix`` to a Python integer in [0, 2^32)."""
    x = (x ^ x >> 16) * 0x85EB_CA6B & 0xFFFF_FFFF
    x = (x ^ x >> 13) * 0xC2B2_AE35 & 0xFFFF_FFFF
    return x ^ x >> 16


def random_bits(start: int, count: int, step: int, device: torch.device) -> Tensor:
    """Returns 32 random bits for each of ``count`` consecutive elements of a parameter.

    With mix as MurmurHash3's finalizer, and i = 2^32 i_high + i_low:
    ``bits = mix(mix(i_low ^ mix(mix(SEED ^ step) ^ i_high)))``.

    Args:
        start: The first element's row-major index in the whole parameter.
        count: The number of elements.
        step: The parameter's step, from 1.
        device: The device of the result.

    Returns:
        [count] int32.
    """
    to_next_high = (1 << 32) - (start & 0xFFFF_FFFF)
    if count > to_next_high:
        head = random_bits(start, to_next_high, step, device)
        tail = random_bits(start + to_next_high, count - to_next_high, step, device)
        return torch.cat((head, tail))
    key = _mix_int(_mix_int(SEED ^ step & 0xFFFF_FFFF) ^ start >> 32)
    low = torch.arange(start & 0xFFFF_FFFF, (start & 0xFFFF_FFFF) + count, device=device)
    # two rounds: after one, the bits of neighboring indices are correlated under a common key
    return _mix(_mix(low.bitwise_xor_(key).to(torch.int32)))


def stochastic_round(values: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Rounds each value to one of its two neighbors in ``dtype``, at random.

    The probability of the neighbor with the larger magnitude is the remainder, so the mean is the
    value. Values that ``dtype`` can represent, Inf and NaN do not change. Above its largest finite
    value the next neighbor is Inf, as in rounding to nearest.

    Args:
        values: Any shape, float32.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        bits: int32 random bits, of a shape that broadcasts to the shape of ``values``.

    Returns:
        The rounded values in ``dtype``.
    """
    if dtype == torch.bfloat16:
        rounded = _truncate_after_adding(values, bits, dropped=16)
    else:
        rounded = _truncate_after_adding(values, bits, dropped=13)
        # the unit of subnormal float16 is 2^-24, the same as just above the smallest normal number
        offset = _truncate_after_adding(values.abs() + _FLOAT16_MIN_NORMAL, bits, dropped=13)
        subnormal = offset.sub_(_FLOAT16_MIN_NORMAL).copysign_(values)
        rounded = torch.where(values.abs() < _FLOAT16_MIN_NORMAL, subnormal, rounded)
    return torch.where(values.isfinite(), rounded, values).to(dtype)


def round_to_24_bits(values: Tensor, bits: Tensor | None) -> Tensor:
    """Rounds away the last 8 of 32 bits, at random or to nearest. Inf and NaN do not change.

    Args:
        values: Any shape, float32.
        bits: As for ``stochastic_round``; None: to nearest, a half to the larger magnitude.

    Returns:
        float32 values that ``split`` stores in bfloat16 and int8 without a loss.
    """
    added = values.new_full((), 0x80, dtype=torch.int32) if bits is None else bits
    rounded = _truncate_after_adding(values, added, dropped=8)
    return torch.where(values.isnan(), values, rounded)


def join(high: Tensor, low: Tensor) -> Tensor:
    """Joins two parts to float32 values; the inverse of ``split``.

    Args:
        high: Any shape, bfloat16.
        low: The same shape, int32 or int8: the distance of the value from ``high``. Its unit is
            2^-16 or 2^-8 of the distance of two neighbors in bfloat16.
    """
    # the low part of a zero is negative only if other code has set the high part to zero; their sum
    # would be a NaN
    added = torch.where(high == 0, low.clamp(min=0), low).to(torch.int32)
    added <<= 8 if low.dtype == torch.int8 else 0
    return ((high.view(torch.int16).to(torch.int32) << 16) + added).view(torch.float32)


def split(values: Tensor, dtype: torch.dtype = torch.int32) -> tuple[Tensor, Tensor]:
    """Splits float32 values into the nearest bfloat16, and the next 16 or 8 bits.

    A value halfway between two neighbors goes to the larger magnitude.

    Args:
        values: Any shape, float32; for int8 a result of ``round_to_24_bits``.
        dtype: ``torch.int32`` or ``torch.int8``.

    Returns:
        The arguments of ``join``: bfloat16, and ``dtype``. NaN has a low part of 0.
    """
    bits = values.view(torch.int32)
    high = (bits + 0x8000 >> 16).to(torch.int16).view(torch.bfloat16)
    low = (bits << 16 >> (24 if dtype == torch.int8 else 16)).to(dtype)
    is_nan = values.isnan()
    return torch.where(is_nan, torch.nan, high), low.masked_fill_(is_nan, 0)


def _truncate_after_adding(values: Tensor, bits: Tensor, dropped: int) -> Tensor:
    """Adds random bits below the last kept bit of the mantissa, then cuts off the dropped ones."""
    mask = (1 << dropped) - 1
    summed = values.contiguous().view(torch.int32) + bits.bitwise_and(mask)
    return summed.bitwise_and_(~mask).view(torch.float32)
