"""The step of ``reference.py`` on a GPU: a few launches for all parameters of a param group.

A step over any number of matrices has four launches. They compute partial sums of squares over
tiles of each gradient, the sums of the partial sums in a fixed order, the stripes, and the update.
The stripes have one more launch if one program cannot average all rows of a block, and the update
has one more if some tiles have columns of two blocks.
A lagged step computes the roots of the stripes, an update that also computes partial sums of
squares, their sums, and the stripes. In a lagged step, only first steps, and blocks that are
narrower than a tile, need the statistics before the update. If only the device knows whether a step
is the first, the kernels of a first step are launched, and end at once in other steps. 0-D and 1-D
parameters have one more launch.

Folding a gradient (``fold.py``) has two launches for each matrix. The step over folded matrices
copies their sums, and computes the stripes and the update, for all matrices together.

Every launch has a list of tiles, each with the number of an entry, and finds the entry's tensors
in an array of addresses. A launch is repeated only for entries that need another variant of the
kernel, such as another dtype.

A ``Plan`` has everything that depends on shapes alone, and is made once. When an address has
changed, an asynchronous copy from pinned memory brings the addresses to the device. The host never
waits for the device, no kernel uses atomics, and every sum has a fixed order: runs repeat bit for
bit.
"""

import logging
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from striped_hf.optim.backends import reference
from striped_hf.optim.backends.triton import INTERPRETED, arguments, kernels, tile_sizes
from striped_hf.optim.backends.triton.arguments import (
    OPTIONS,
    Buffers,
    Hyperparameters,
    OnDevice,
    StripesVariant,
    UpdateFlags,
    constants,
)
from striped_hf.optim.backends.triton.fold import can_fold, launch_fold
from striped_hf.optim.backends.triton.plan import Plan, is_supported, strides_of
from striped_hf.optim.backends.triton.workspace import ceil_div, tile_columns
from striped_hf.optim.interface import LOW_BITS, Entry, Folded, Roots, Settings, Sums

logger = logging.getLogger(__name__)

DEVICE_TYPES = ("cpu",) if INTERPRETED else ("cuda",)
CAPTURABLE = True  # steps and learning rates may be known to the device only


# ---------------------------------------------------------------------------------------------
# the functions of a backend
# ---------------------------------------------------------------------------------------------


def step(entries: list[Entry], settings: Settings) -> None:
    """Performs ``reference.step``. A lagged step reads most gradients from memory only once."""
    if not entries:
        return
    plan = _plan(entries, lagged=settings.lagged)
    plan.refresh(entries)
    with plan.launching():
        _launch_statistics(plan, entries)
        _launch_update(plan, entries, settings)
    if plan.fallback:
        reference.step([entries[i] for i in plan.fallback], settings)


def statistics(entries: list[Entry]) -> list[Sums | None]:
    """Sums the squares of every gradient by row and by column.

    Args:
        entries: The entries of parameters on one device; not empty.

    Returns:
        As ``reference.statistics``: for each matrix the row sums [..., R, bc] and the column sums
        [..., br, C], float32. They are views of one buffer, which the next step of the same
        parameters overwrites.

    Raises:
        RuntimeError: A CUDA graph is being captured, and no such step was taken before.
    """
    if not entries:
        return []
    plan = _plan(entries, lagged=False)
    plan.refresh(entries)
    plan.pending = entries
    with plan.launching():
        _launch_statistics(plan, entries)
    sums = list(plan.sums)
    fallback = reference.statistics([entries[i] for i in plan.fallback])
    for i, pair in zip(plan.fallback, fallback, strict=True):
        sums[i] = pair
    return sums


def update(entries: list[Entry], roots: list[Roots | None], settings: Settings) -> None:
    """Updates momentum and parameter of every entry in place; as ``reference.update``.

    Args:
        entries: The argument of ``statistics``, or entries whose gradients were folded.
        roots: For each matrix a and c, in tensors of the sums' shapes.
        settings: The param group's settings.
    """
    if not entries:
        return
    plan = _plan(entries, lagged=False)
    if plan.pending is not entries:
        plan.refresh(entries)
    plan.pending = None
    with plan.launching():
        _copy_to_workspace(plan, roots)
        _launch_update(plan, entries, settings, has_roots=True)
    if plan.fallback:
        fallback_roots = [roots[i] for i in plan.fallback]
        reference.update([entries[i] for i in plan.fallback], fallback_roots, settings)


def fold(
    entry: Entry, folded: Folded, settings: Settings, is_first: bool, coefficient: Tensor | None
) -> None:
    """Adds a gradient to the momentum, sums and sketch; as ``reference.fold``.

    It reads the gradient and the momentum once, in two launches.
    """
    if not can_fold(entry, folded):
        _warn_once()
        reference.fold(entry, folded, settings, is_first, coefficient)
        return
    launch_fold(entry, folded, settings, is_first, coefficient)


def step_folded(entries: list[Entry], sums: list[Sums], settings: Settings) -> None:
    """Updates whole matrices whose gradients were folded; as ``reference.step_folded``."""
    if not entries:
        return
    plan = _plan(entries, lagged=False)
    plan.refresh(entries)
    with plan.launching():
        _copy_to_workspace(plan, sums)
        _launch_update(plan, entries, settings)
    if plan.fallback:
        fallback_sums = [sums[i] for i in plan.fallback]
        reference.step_folded([entries[i] for i in plan.fallback], fallback_sums, settings)


def _copy_to_workspace(plan: Plan, given: Sequence[Sums | Roots | None]) -> None:
    """Copies sums, or roots in their place, to the buffer that the kernels read."""
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for i in plan.supported:
        places, pair = plan.sums[i], given[i]
        if places is not None and pair is not None:
            targets += places
            sources += pair
    if targets:
        torch._foreach_copy_(targets, sources)


# ---------------------------------------------------------------------------------------------
# plans
# ---------------------------------------------------------------------------------------------

# The key is the first parameter's momentum, so that the plans are freed with the optimizer. (The
# parameter itself may be a view or a copy, another one in each step.) A model has several plans if
# some of its parameters have gradients in some steps only (experts, frozen layers).
_plans: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_PLANS_KEPT = 16


def _plan(entries: list[Entry], lagged: bool) -> Plan:
    """Returns the plan for some entries: a kept plan, or a new plan.

    Raises:
        RuntimeError: The optimizer is capturable and an entry has strides that no kernel supports.
    """
    exp_avg = entries[0].state["exp_avg"]
    exp_avg = exp_avg if exp_avg._base is None else exp_avg._base
    plans: dict[tuple[Any, ...], Plan] = _plans.setdefault(exp_avg, {})
    for plan in plans.values():
        if plan.pending is entries and plan.lagged == lagged:
            return plan
    strides = [strides_of(entry) for entry in entries]
    descriptions = tuple(
        (
            e.param.shape,
            e.param.dtype,
            None if e.grad is None else e.grad.dtype,
            LOW_BITS in e.state,
            e.momentum_dtype,
            e.blocks,
            e.whole_start,
            e.whole_stride,
            kind,
        )
        for e, kind in zip(entries, strides, strict=True)
    )
    key = (entries[0].param.device, lagged, descriptions)
    if key not in plans:
        unsupported = [
            entry
            for entry, kind in zip(entries, strides, strict=True)
            if not is_supported(entry, kind)
        ]
        if any(entry.step == 0 for entry in unsupported):
            raise RuntimeError(
                "capturable=True steps contiguous and transposed parameters only, and one has "
                "other strides: make it contiguous"
            )
        if unsupported:
            _warn_once()
            shape = tuple(unsupported[0].param.shape)
            logger.debug("StripedAdamW: the first such parameter has shape %s", shape)
        # CUDA graphs need the plans that they were captured with
        idle = [old for old, plan in plans.items() if not plan.addresses.captured]
        for old in idle[: max(0, len(idle) + 1 - _PLANS_KEPT)]:
            del plans[old]
        plans[key] = Plan(entries, strides, lagged)
    return plans[key]


@cache  # once
def _warn_once() -> None:
    logger.warning(
        "StripedAdamW: parameters, gradients or state that are neither contiguous nor transposed "
        "are stepped in plain PyTorch, several times slower: make them contiguous"
    )


# ---------------------------------------------------------------------------------------------
# launches
# ---------------------------------------------------------------------------------------------


def _launch_statistics(plan: Plan, entries: list[Entry]) -> None:
    """Computes the sums, except those that the update computes after an entry's first step."""
    # a step of 0 may be the first: only the device knows
    first_step = any(entries[i].step <= 1 for i in plan.supported)
    launched = [fused for fused in plan.workspace.reductions if first_step or not fused]
    if not launched:
        return
    buffers = _buffers(plan, partials=True)
    step = entries[0].step
    for variant, tiles in plan.tiles.statistics.items():
        fused = variant.fused_statistics
        if fused not in launched:
            continue
        sizes = {
            "TILE_ROWS": tile_sizes.STATISTICS_TILE_ROWS,
            "TILE_COLUMNS": tile_columns(fused),
        }
        if fused and step == 0:
            kernels.first_statistics_kernel[_programs_of_first_step(tiles)](
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
            kernels.statistics_kernel[(len(tiles),)](
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
            _launch_first_combine(plan, buffers)
        else:
            _launch_combine(plan, buffers, fused)


def _launch_update(
    plan: Plan, entries: list[Entry], settings: Settings, has_roots: bool = False
) -> None:
    """Updates all supported entries, from the sums or the roots in the plan's workspace."""
    workspace = plan.workspace
    fused = True in workspace.segments
    buffers = _buffers(plan, partials=fused)
    step = entries[0].step
    hyper = _hyperparameters(settings)
    on_device = constants(OnDevice(lr=isinstance(settings.lr, Tensor), step=step == 0))

    def launch_stripes(fused_statistics: bool, before_update: bool) -> None:
        segments = workspace.segments[fused_statistics]
        variant = StripesVariant(
            lagged=settings.lagged,
            fused_statistics=fused_statistics,
            before_update=before_update,
            has_roots=has_roots,
            nesterov=settings.nesterov,
        )
        kernels.stripes_kernel[(len(segments),)](
            segments=segments,
            buffers=buffers,
            hyper=hyper,
            step=step,
            on_device=on_device,
            variant=constants(variant),
            BLOCK=tile_sizes.STRIPE_BLOCK,
            num_warps=8,
            **OPTIONS,
        )

    for fused_statistics in workspace.segments:
        launch_stripes(fused_statistics, before_update=True)
    if workspace.means is not None and not has_roots:
        kernels.means_kernel[(len(workspace.means),)](
            means=workspace.means,
            buffers=buffers,
            BLOCK=tile_sizes.TOTALS_BLOCK,
            num_warps=1,
            **OPTIONS,
        )
    for matrix, tiles in plan.tiles.matrices.items():
        kernels.matrices_kernel[(len(tiles),)](
            tiles=tiles,
            buffers=buffers,
            one_minus_beta1=hyper.one_minus_beta1,
            eps=hyper.eps,
            variant=constants(matrix),
            flags=_update_flags(settings, matrix.param_dtype),
            tuning=constants(arguments.TUNING),
            TILE_ROWS=tile_sizes.UPDATE_TILE_ROWS,
            num_warps=4,
            **OPTIONS,
        )
    if fused:
        _launch_combine(plan, buffers, fused_statistics=True)
        launch_stripes(fused_statistics=True, before_update=False)
    for vector, tiles in plan.tiles.vectors.items():
        kernels.vectors_kernel[(len(tiles),)](
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


def _launch_combine(plan: Plan, buffers: Buffers, fused_statistics: bool) -> None:
    reductions = plan.workspace.reductions[fused_statistics]
    kernels.combine_kernel[(len(reductions),)](
        reductions=reductions,
        buffers=buffers,
        PARTIALS=tile_sizes.COMBINED_PARTIALS,
        WIDTH=tile_sizes.COMBINED_WIDTH,
        num_warps=4,
        **OPTIONS,
    )


def _launch_first_combine(plan: Plan, buffers: Buffers) -> None:
    reductions = plan.workspace.reductions[True]
    kernels.first_combine_kernel[_programs_of_first_step(reductions)](
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


def _buffers(plan: Plan, partials: bool) -> Buffers:
    """The buffers of a step, with a new one for partial sums if ``partials``."""
    workspace = plan.workspace
    return Buffers(
        pointers=plan.addresses.on_device,
        shapes=workspace.device_shapes,
        sums=workspace.sums,
        inverse_rms=workspace.inverse_rms,
        totals=workspace.totals,
        scalars=workspace.scalars,
        partials=workspace.new_partials() if partials else workspace.sums,
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


def _log_r(beta1: float, beta2: float) -> float:
    """Returns log(r), r = beta1^2 / beta2, or a number near it with which the kernel can compute.

    1e-9 in place of 0 changes 1 + r + ... + r^(t - 1) by 5e-10 t of it. 1000 serves as infinity.
    """
    if beta1 == 0:
        return -1000.0
    log_r = 2 * math.log(beta1) - _log(beta2)
    return math.copysign(min(max(abs(log_r), 1e-9), 1000.0), log_r)
