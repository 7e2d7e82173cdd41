"""The step of ``reference.py`` on a GPU: a few launches for all parameters of a param group.

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

import logging
import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from striped_hf.optim.backends import reference
from striped_hf.optim.backends.triton import INTERPRETED, arguments, kernels, tile_sizes
from striped_hf.optim.backends.triton.arguments import (
    OPTIONS,
    Buffers,
    EntryPointers,
    Hyperparameters,
    OnDevice,
    StripesVariant,
    UpdateFlags,
    constants,
)
from striped_hf.optim.backends.triton.counters import Counters
from striped_hf.optim.backends.triton.fold import can_fold, launch_fold
from striped_hf.optim.backends.triton.kinds import kind_of, pointers_of
from striped_hf.optim.backends.triton.plan import Plan, Plans, Programs, launching_on
from striped_hf.optim.backends.triton.prepared import Prepared
from striped_hf.optim.backends.triton.workspace import ceil_div, tile_columns
from striped_hf.optim.capture import is_capturing
from striped_hf.optim.interface import Entry, Folded, Known, Roots, Settings, Sums

logger = logging.getLogger(__name__)

DEVICE_TYPES = ("cpu",) if INTERPRETED else ("cuda",)
CAPTURABLE = True  # steps and learning rates may be known to the device only


# ---------------------------------------------------------------------------------------------
# the entries of one call in a plan
# ---------------------------------------------------------------------------------------------


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


@cache  # once
def _warn_once() -> None:
    logger.warning(
        "StripedAdamW: parameters, gradients or state that are neither contiguous nor transposed "
        "are stepped in plain PyTorch, several times slower: make them contiguous"
    )


# ---------------------------------------------------------------------------------------------
# the backend
# ---------------------------------------------------------------------------------------------


class TritonBackend:
    """The backend of one optimizer, with the plans of its steps."""

    DEVICE_TYPES = DEVICE_TYPES
    CAPTURABLE = CAPTURABLE

    def __init__(self) -> None:
        self._plans: dict[tuple[torch.device, bool], Plans] = {}
        self._counters = Counters()

    def step(self, entries: list[Entry], settings: Settings, known: Known | None = None) -> None:
        """Performs ``reference.step``. A lagged step reads most gradients only once."""
        if not entries:
            return
        with launching_on(entries[0].param.device):
            prepared = self._prepare(entries, settings.lagged)
            if known is not None and prepared.can_update:
                prepared.learn(known)
                known.prepared[settings.lagged] = prepared
            placed = _placed(prepared, [entry.step for entry in entries])
            if settings.lagged and placed.step == 0:
                placed = placed._replace(has_first_step=self._may_have_first_step(entries))
            _launch_step(placed, settings)
        if prepared.fallback:
            reference.step([entries[i] for i in prepared.fallback], settings)

    def step_known(self, known: Known, steps: list[int], settings: Settings) -> bool:
        """Performs ``step`` with the plan of an earlier step of these entries."""
        prepared: Prepared | None = known.prepared.get(settings.lagged)
        if prepared is None or not prepared.update(known, steps):
            return False
        with launching_on(known.device):
            _launch_step(_placed(prepared, steps), settings)
        return True

    def statistics(self, entries: list[Entry]) -> list[Sums | None]:
        """Sums the squares of every gradient by row and by column.

        Args:
            entries: The entries of parameters on one device.

        Returns:
            As ``reference.statistics``: for each matrix the row sums [..., R, bc] and the column
            sums [..., br, C], float32. They are views of one buffer.

        Raises:
            RuntimeError: A CUDA graph is being captured, and no such step was taken before.
        """
        found: list[Sums | None] = [None] * len(entries)
        if not entries:
            return found
        with launching_on(entries[0].param.device):
            placed = self._place(entries, lagged=False)
            buffer = torch.empty_like(placed.plan.workspace.sums)
            _launch_statistics(placed, buffer)
        for number, i in zip(placed.numbers, placed.positions, strict=True):
            kind = placed.plan.kinds[number]
            if kind.is_matrix:
                found[i] = placed.plan.workspace.sums_of(number, kind, buffer)
        fallback = reference.statistics([entries[i] for i in placed.fallback])
        for i, sums in zip(placed.fallback, fallback, strict=True):
            found[i] = sums
        return found

    def update(self, entries: list[Entry], roots: list[Roots | None], settings: Settings) -> None:
        """Updates momentum and parameter of every entry in place; as ``reference.update``.

        Args:
            entries: The argument of ``statistics``, or entries whose gradients were folded.
            roots: For each matrix a and c, in tensors of the sums' shapes.
            settings: The param group's settings.
        """
        if not entries:
            return
        with launching_on(entries[0].param.device):
            placed = self._place(entries, lagged=False)
            _copy_to_workspace(placed, roots)
            _launch_update(placed, settings, has_roots=True)
        if placed.fallback:
            fallback_roots = [roots[i] for i in placed.fallback]
            reference.update([entries[i] for i in placed.fallback], fallback_roots, settings)

    def fold(
        self,
        entry: Entry,
        folded: Folded,
        settings: Settings,
        is_first: bool,
        coefficient: Tensor | None,
    ) -> None:
        """Adds a gradient to the momentum, sums and sketch; as ``reference.fold``.

        It reads the gradient and the momentum once, in two launches.
        """
        if not can_fold(entry, folded):
            _warn_once()
            reference.fold(entry, folded, settings, is_first, coefficient)
            return
        launch_fold(entry, folded, settings, is_first, coefficient)

    def step_folded(self, entries: list[Entry], sums: list[Sums], settings: Settings) -> None:
        """Updates whole matrices whose gradients were folded; as ``reference.step_folded``."""
        if not entries:
            return
        with launching_on(entries[0].param.device):
            placed = self._place(entries, lagged=False)
            _copy_to_workspace(placed, sums)
            _launch_update(placed, settings)
        if placed.fallback:
            fallback_sums = [sums[i] for i in placed.fallback]
            reference.step_folded([entries[i] for i in placed.fallback], fallback_sums, settings)

    def _may_have_first_step(self, entries: list[Entry]) -> bool:
        """Whether an entry may have its first step, if only the device knows the steps."""
        is_captured = is_capturing(entries[0].param.device)
        return not self._counters.count((entry.state["step"] for entry in entries), is_captured)

    def _place(self, entries: list[Entry], lagged: bool) -> Placed:
        """Finds a plan for some entries, and brings their addresses to the device.

        Raises:
            RuntimeError: The optimizer is capturable and an entry has strides that no kernel
                supports; or a CUDA graph is being captured, and there was no such step before.
        """
        return _placed(self._prepare(entries, lagged), [entry.step for entry in entries])

    def _prepare(self, entries: list[Entry], lagged: bool) -> Prepared:
        """Finds a plan for some entries."""
        device, first_step = entries[0].param.device, entries[0].step
        pointers = [pointers_of(entry, first_step) for entry in entries]
        kinds = [kind_of(entry, of) for entry, of in zip(entries, pointers, strict=True)]
        fallback = [i for i, kind in enumerate(kinds) if kind is None]
        if fallback:
            if first_step == 0:
                raise RuntimeError(
                    "capturable=True steps contiguous and transposed parameters only, and one has "
                    "other strides: make it contiguous"
                )
            _warn_once()
            shape = tuple(entries[fallback[0]].param.shape)
            logger.debug("StripedAdamW: the first such parameter has shape %s", shape)
        positions = [i for i, kind in enumerate(kinds) if kind is not None]
        plans = self._plans.get((device, lagged))
        if plans is None:
            plans = self._plans[device, lagged] = Plans(lagged, device)
        plan, numbers = plans.find(tuple(kind for kind in kinds if kind is not None))
        supported = np.array([pointers[i] for i in positions], dtype=np.int64)
        return Prepared(
            plan=plan,
            programs=plan.programs_of(numbers),
            numbers=numbers,
            positions=positions,
            fallback=fallback,
            pointers=supported.reshape(-1, len(EntryPointers._fields)),
        )


new = TritonBackend


def _placed(prepared: Prepared, steps: list[int]) -> Placed:
    """Brings the addresses of entries to the device, for a step with these numbers."""
    plan, programs = prepared.plan, prepared.programs
    if steps[0] == 0:
        plan.addresses.stage()
    plan.set_addresses(prepared.numbers, prepared.pointers, programs)
    plan.use_on_current_stream(programs)
    return Placed(
        plan=plan,
        programs=programs,
        numbers=prepared.numbers,
        positions=prepared.positions,
        fallback=prepared.fallback,
        step=steps[0],
        has_first_step=min(steps) <= 1,  # a step of 0 may be the first
    )


def _copy_to_workspace(placed: Placed, given: Sequence[Sums | Roots | None]) -> None:
    """Copies sums, or roots in their place, to the buffer that the kernels read."""
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    plan = placed.plan
    for number, i in zip(placed.numbers, placed.positions, strict=True):
        kind, pair = plan.kinds[number], given[i]
        if kind.is_matrix and pair is not None:
            targets += plan.workspace.sums_of(number, kind, plan.workspace.sums)
            sources += pair
    if targets:
        torch._foreach_copy_(targets, sources)


# ---------------------------------------------------------------------------------------------
# launches
# ---------------------------------------------------------------------------------------------


def _launch_step(placed: Placed, settings: Settings) -> None:
    """Does the whole step of the supported entries."""
    _launch_statistics(placed, placed.plan.workspace.sums)
    _launch_update(placed, settings)


def _launch_statistics(placed: Placed, sums: Tensor) -> None:
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
            _launch_first_combine(placed.programs, buffers)
        else:
            _launch_combine(placed.programs, buffers, fused)


def _launch_update(placed: Placed, settings: Settings, has_roots: bool = False) -> None:
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
        kernels.stripes_kernel[(len(segments),)](
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
        kernels.means_kernel[(len(means),)](
            means=means,
            buffers=buffers,
            BLOCK=tile_sizes.TOTALS_BLOCK,
            num_warps=1,
            **OPTIONS,
        )
    for matrix, tiles in programs.matrices.items():
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
        _launch_combine(programs, buffers, fused_statistics=True)
        launch_stripes(fused_statistics=True, before_update=False)
    for vector, tiles in programs.vectors.items():
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


def _launch_combine(programs: Programs, buffers: Buffers, fused_statistics: bool) -> None:
    reductions = programs.reductions[fused_statistics]
    kernels.combine_kernel[(len(reductions),)](
        reductions=reductions,
        buffers=buffers,
        PARTIALS=tile_sizes.COMBINED_PARTIALS,
        WIDTH=tile_sizes.COMBINED_WIDTH,
        num_warps=4,
        **OPTIONS,
    )


def _launch_first_combine(programs: Programs, buffers: Buffers) -> None:
    reductions = programs.reductions[True]
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
