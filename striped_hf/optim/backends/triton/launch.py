"""The launches of a step: a few for all parameters of a param group.

A step over any number of matrices has four launches. They compute partial sums of squares over
tiles of each gradient, the sums of the partial sums in a fixed order, the stripes, and the update.
The stripes have one more launch if one program cannot average all rows of a block, and the update
has one more if some tiles have columns of two blocks.
A lagged step computes the roots of the stripes, an update that also computes partial sums of
squares, their sums, and the stripes. In a lagged step, only first steps, and blocks that are
narrower than a tile, need the statistics before the update. If only the device knows whether a step
is the first, the kernels of a first step are launched, and end at once in other steps, unless
``Counters`` remembers an earlier step of all entries. 0-D and 1-D parameters have one more launch.

Folding a gradient (``fold.py``) has two launches for each matrix. The step over folded matrices
copies their sums, and computes the stripes and the update, for all matrices together.

Every launch has a list of tiles, each with the number of an entry, and finds the entry's tensors
in an array of addresses. A launch is repeated only for entries that need another variant of the
kernel, such as another dtype.

A ``Plan`` has everything that depends on the entries' kinds, and is made once. When an address has
changed, an asynchronous copy from pinned memory brings the addresses to the device. The host never
waits for the device, no kernel uses atomics, and every sum has a fixed order: runs repeat bit for
bit.
"""

import math
from functools import cache
from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from striped_hf.optim.backends.triton import (
    arguments,
    statistics_kernels,
    stripes_kernels,
    tile_sizes,
    update_kernels,
)
from striped_hf.optim.backends.triton.arguments import (
    OPTIONS,
    Buffers,
    Hyperparameters,
    OnDevice,
    StripesVariant,
    UpdateFlags,
    constants,
    options_of_update,
)
from striped_hf.optim.backends.triton.plan import Plan, Programs
from striped_hf.optim.backends.triton.workspace import ceil_div, tile_columns
from striped_hf.optim.interface import Settings


class Placed(NamedTuple):
    """The entries of one call, and their places in a plan.

    Attributes:
        plan: The plan.
        programs: The work on the entries that the kernels step.
        numbers: Their numbers in the plan.
        positions: Their positions among the entries of the call.
        fallback: The positions of the entries that the reference steps, because the kernels do not
            support their strides.
        step: The step of the first entry; 0 if only the device knows it.
        has_first_step: Whether an entry may have its first step.
    """

    plan: Plan
    programs: Programs
    numbers: list[int]
    positions: list[int]
    fallback: list[int]
    step: int
    has_first_step: bool


def launch_step(placed: Placed, settings: Settings) -> None:
    """Does the whole step of the supported entries."""
    launch_statistics(placed, placed.plan.workspace.sums)
    launch_update(placed, settings)


def launch_statistics(placed: Placed, sums: Tensor) -> None:
    """Computes the sums, except those that the update computes after an entry's first step."""
    launched = [fused for fused in placed.programs.reductions if placed.has_first_step or not fused]
    if not launched:
        return
    buffers = _buffers(placed.plan, sums, partials=True)
    step = placed.step
    for variant, tiles in placed.programs.statistics.items():
        fused = variant.fused_statistics
        if fused not in launched:
            continue
        sizes = {
            "TILE_ROWS": tile_sizes.STATISTICS_TILE_ROWS,
            "TILE_COLUMNS": tile_columns(fused),
        }
        if fused and step == 0:
            statistics_kernels.first_statistics_kernel[_programs_of_first_step(tiles)](
                tiles=tiles,
                count=len(tiles),
                buffers=buffers,
                variant=constants(variant),
                tuning=constants(arguments.TUNING),
                TILES=tile_sizes.TILES_OF_FIRST_STEP,
                **sizes,
                num_warps=4,
                **OPTIONS,
            )
        else:
            statistics_kernels.statistics_kernel[(len(tiles),)](
                tiles=tiles,
                buffers=buffers,
                step=step,
                variant=constants(variant),
                tuning=constants(arguments.TUNING),
                **sizes,
                num_warps=4,
                **OPTIONS,
            )
    for fused in launched:
        if fused and step == 0:
            _launch_first_combine(placed.programs, buffers)
        else:
            _launch_combine(placed.programs, buffers, fused)


def launch_update(placed: Placed, settings: Settings, has_roots: bool = False) -> None:
    """Updates all supported entries, from the sums or the roots in the plan's workspace."""
    programs = placed.programs
    fused = True in programs.segments
    buffers = _buffers(placed.plan, placed.plan.workspace.sums, partials=fused)
    step = placed.step
    hyper = _hyperparameters(settings)
    on_device = constants(OnDevice(lr=isinstance(settings.lr, Tensor), step=step == 0))

    def launch_stripes(fused_statistics: bool, before_update: bool) -> None:
        segments = programs.segments[fused_statistics]
        variant = StripesVariant(
            lagged=settings.lagged,
            fused_statistics=fused_statistics,
            before_update=before_update,
            has_roots=has_roots,
            nesterov=settings.nesterov,
        )
        stripes_kernels.stripes_kernel[(len(segments),)](
            segments=segments,
            buffers=buffers,
            hyper=hyper,
            step=step,
            first_step=int(placed.has_first_step or not fused_statistics),
            on_device=on_device,
            variant=constants(variant),
            BLOCK=tile_sizes.STRIPE_BLOCK,
            num_warps=8,
            **OPTIONS,
        )

    for fused_statistics in programs.segments:
        launch_stripes(fused_statistics, before_update=True)
    for means in programs.means.values() if not has_roots else ():
        stripes_kernels.means_kernel[(len(means),)](
            means=means,
            buffers=buffers,
            BLOCK=tile_sizes.TOTALS_BLOCK,
            num_warps=1,
            **OPTIONS,
        )
    for matrix, tiles in programs.matrices.items():
        update_kernels.matrices_kernel[(len(tiles),)](
            tiles=tiles,
            buffers=buffers,
            one_minus_beta1=hyper.one_minus_beta1,
            eps=hyper.eps,
            variant=constants(matrix),
            flags=_update_flags(settings, matrix.param_dtype),
            tuning=constants(arguments.TUNING),
            TILE_ROWS=tile_sizes.update_tile_rows(matrix.transposed, matrix.low_bits),
            num_warps=4,
            **options_of_update(matrix),
        )
    if fused:
        _launch_combine(programs, buffers, fused_statistics=True)
        launch_stripes(fused_statistics=True, before_update=False)
    for vector, tiles in programs.vectors.items():
        update_kernels.vectors_kernel[(len(tiles),)](
            tiles=tiles,
            buffers=buffers,
            hyper=hyper,
            step=step,
            on_device=on_device,
            variant=constants(vector),
            flags=_update_flags(settings, vector.param_dtype),
            BLOCK=tile_sizes.VECTOR_BLOCK,
            num_warps=4,
            **OPTIONS,
        )


def _launch_combine(programs: Programs, buffers: Buffers, fused_statistics: bool) -> None:
    reductions = programs.reductions[fused_statistics]
    statistics_kernels.combine_kernel[(len(reductions),)](
        reductions=reductions,
        buffers=buffers,
        PARTIALS=tile_sizes.COMBINED_PARTIALS,
        WIDTH=tile_sizes.COMBINED_WIDTH,
        num_warps=4,
        **OPTIONS,
    )


def _launch_first_combine(programs: Programs, buffers: Buffers) -> None:
    reductions = programs.reductions[True]
    statistics_kernels.first_combine_kernel[_programs_of_first_step(reductions)](
        reductions=reductions,
        count=len(reductions),
        buffers=buffers,
        REDUCTIONS=tile_sizes.TILES_OF_FIRST_STEP,
        PARTIALS=tile_sizes.COMBINED_PARTIALS,
        WIDTH=tile_sizes.COMBINED_WIDTH,
        num_warps=4,
        **OPTIONS,
    )


def _programs_of_first_step(work: Tensor) -> tuple[int]:
    return (ceil_div(len(work), tile_sizes.TILES_OF_FIRST_STEP),)


def _buffers(plan: Plan, sums: Tensor, partials: bool) -> Buffers:
    """The buffers of a step, with a new one for partial sums if ``partials``."""
    workspace = plan.workspace
    return Buffers(
        pointers=plan.addresses.on_device,
        shapes=workspace.device_shapes,
        sums=sums,
        inverse_rms=workspace.inverse_rms,
        totals=workspace.totals,
        scalars=workspace.scalars,
        partials=workspace.new_partials() if partials else sums,
    )


def _hyperparameters(settings: Settings) -> Hyperparameters:
    return Hyperparameters(
        lr=settings.lr,
        log_beta1=_log(settings.beta1),
        log_beta2=_log(settings.beta2),
        log_r=_log_r(settings.beta1, settings.beta2),
        one_minus_beta1=1 - settings.beta1,
        beta2=settings.beta2,
        one_minus_beta2=1 - settings.beta2,
        weight_decay=settings.weight_decay,
        eps=settings.eps,
    )


def _update_flags(settings: Settings, param_dtype: tl.dtype) -> UpdateFlags:
    return constants(
        UpdateFlags(
            maximize=settings.maximize,
            nesterov=settings.nesterov,
            stochastic_rounding=settings.stochastic_rounding and param_dtype != tl.float32,
            from_start=1 - settings.beta1 < 0.5,
        )
    )


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


@cache
def _log_r(beta1: float, beta2: float) -> float:
    """Returns log(r), r = beta1^2 / beta2, or a number near it with which the kernel can compute.

    1e-9 in place of 0 changes 1 + r + ... + r^(t - 1) by 5e-10 t of it. 1000 serves as infinity.
    """
    if beta1 == 0:
        return -1000.0
    log_r = 2 * math.log(beta1) - _log(beta2)
    return math.copysign(min(max(abs(log_r), 1e-9), 1000.0), log_r)
