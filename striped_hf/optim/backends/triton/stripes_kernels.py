"""The kernels that average sums of squares into stripes, and write the roots for the update.

The arithmetic is float32, correctly rounded.
"""

import triton
import triton.language as tl

from striped_hf.optim.backends.triton.arguments import (
    COLUMN_POINTER,
    COLUMN_SUMS,
    DECAY,
    FIRST_BLOCK,
    FLOOR,
    KEY,
    POINTERS,
    ROW_POINTER,
    ROW_SUMS,
    SCALARS,
    SHAPES,
    STEP_SIZE,
)
from striped_hf.optim.backends.triton.codec import step_key
from striped_hf.optim.backends.triton.functions import (
    bias_correction,
    decay_and_step_size,
    inverse_rms_of,
    load_step,
    momentum_floor,
)


@triton.jit(do_not_specialize=["step", "first_step"])
def stripes_kernel(
    segments,  # [programs, 8] int64: rows of ``Workspace.segments``
    buffers,  # ``Buffers``
    hyper,  # ``Hyperparameters``
    step,
    first_step,  # 1; 0 if the sums of a first step are there after the update only
    on_device,  # ``OnDevice``
    variant,  # ``StripesVariant``
    BLOCK: tl.constexpr,
):
    """Averages sums into a segment of a stripe, and writes the roots that the update needs.

    A segment has at most BLOCK elements. Before the update, sqrt(row) and
    sqrt(col / (1 - beta2^t)) replace the sums. If a segment of a row stripe has all rows of a block
    of the matrix, 1 / sqrt(mean(row)) goes to ``inverse_rms``; else its sum goes to ``totals``, for
    ``means_kernel``.

    If the update computes the statistics, this kernel runs twice. Before the update it writes the
    roots into the places of the update's sums. After the update it averages the sums.

    In a first step without sums before the update, the stripes and their roots are 0. Then
    ``momentum_floor`` is the root, and the step is AdamW's.
    """
    segment = segments + tl.program_id(0).to(tl.int64) * 8
    entry = tl.load(segment)
    is_column = tl.load(segment + 1) != 0
    start = tl.load(segment + 2)
    stride = tl.load(segment + 3)
    size = tl.load(segment + 4).to(tl.int32)
    averaged = tl.load(segment + 5).to(tl.float32)
    block = tl.load(segment + 6)
    total_index = tl.load(segment + 7)  # -1: the segment has all rows of the block
    shape = buffers.shapes + entry * SHAPES
    pointers = buffers.pointers + entry * POINTERS
    first_block = tl.load(shape + FIRST_BLOCK)
    sums = buffers.sums
    sums += start + tl.where(is_column, tl.load(shape + COLUMN_SUMS), tl.load(shape + ROW_SUMS))
    address = tl.where(
        is_column, tl.load(pointers + COLUMN_POINTER), tl.load(pointers + ROW_POINTER)
    )
    stripe = address.to(tl.pointer_type(tl.float32)) + start

    current = load_step(pointers, step, on_device.step)
    is_first_step = current <= first_step
    summed = size  # the number of sums
    if variant.fused_statistics:
        if variant.before_update:
            summed = tl.where(is_first_step, size, 0)
        else:
            summed = tl.where(is_first_step, 0, size)
    corrected = current
    if variant.lagged:
        corrected = tl.maximum(current - 1, 1)
    bias_correction2 = bias_correction(corrected, hyper.log_beta2).to(tl.float32)
    correction = tl.div_rn(1.0, tl.sqrt_rn(tl.where(is_column, bias_correction2, 1.0)))
    weight = tl.div_rn(hyper.one_minus_beta2, averaged)
    total = 0.0
    if not variant.has_roots:
        lanes = tl.arange(0, BLOCK)
        inside = lanes < size
        offsets = lanes.to(tl.int64) * stride
        has_sum = lanes < summed
        before = tl.load(stripe + offsets, mask=inside, other=0.0)
        value = hyper.beta2 * before
        value += weight * tl.load(sums + offsets, mask=has_sum, other=0.0)
        tl.store(stripe + offsets, value, mask=has_sum)
        if variant.before_update:
            if variant.lagged:
                value = tl.where(is_first_step, value, before)
            root = tl.sqrt_rn(value) * correction
            tl.store(sums + offsets, root, mask=inside)
            total = tl.sum(value, axis=0)

    if variant.before_update:
        is_row = is_column == 0
        if is_row:
            if variant.has_roots:
                tl.store(buffers.inverse_rms + block, 1.0)
            elif total_index < 0:
                tl.store(buffers.inverse_rms + block, inverse_rms_of(total, size))
            else:
                tl.store(buffers.totals + total_index, total)
            if block == first_block:  # several programs may write the same numbers
                decay, step_size = decay_and_step_size(current, hyper, on_device)
                scalars = buffers.scalars + entry * SCALARS
                tl.store(scalars + DECAY, decay.to(tl.int32, bitcast=True))
                tl.store(scalars + STEP_SIZE, step_size.to(tl.int32, bitcast=True))
                tl.store(scalars + KEY, step_key(current).to(tl.int32, bitcast=True))
                floor = momentum_floor(current, hyper, variant.nesterov)
                tl.store(scalars + FLOOR, floor.to(tl.int32, bitcast=True))


@triton.jit
def means_kernel(
    means,  # [programs, 4] int64: rows of ``Workspace.means``
    buffers,  # ``Buffers``
    BLOCK: tl.constexpr,
):
    """Computes 1 / sqrt(mean(row)) of a block whose row stripe has several segments."""
    mean = means + tl.program_id(0).to(tl.int64) * 4
    block = tl.load(mean)
    totals = buffers.totals + tl.load(mean + 1)
    count = tl.load(mean + 2).to(tl.int32)
    rows = tl.load(mean + 3)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, BLOCK):
        lanes = first + tl.arange(0, BLOCK)
        total += tl.load(totals + lanes, mask=lanes < count, other=0.0)
    tl.store(buffers.inverse_rms + block, inverse_rms_of(tl.sum(total, axis=0), rows))
