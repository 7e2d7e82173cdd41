"""The Triton backend: finds the plan of each call, and launches the kernels on it."""

import logging
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from striped_hf.optim.backends import reference
from striped_hf.optim.backends.triton import INTERPRETED
from striped_hf.optim.backends.triton.arguments import EntryPointers
from striped_hf.optim.backends.triton.counters import Counters
from striped_hf.optim.backends.triton.fold import can_fold, launch_fold
from striped_hf.optim.backends.triton.kinds import kind_of, pointers_of
from striped_hf.optim.backends.triton.launch import (
    Placed,
    launch_statistics,
    launch_step,
    launch_update,
)
from striped_hf.optim.backends.triton.plan import Plans, launching_on
from striped_hf.optim.backends.triton.prepared import Prepared
from striped_hf.optim.capture import is_capturing
from striped_hf.optim.interface import Entry, Folded, Known, Roots, Settings, Sums

logger = logging.getLogger(__name__)

DEVICE_TYPES = ("cpu",) if INTERPRETED else ("cuda",)
CAPTURABLE = True  # steps and learning rates may be known to the device only


@cache  # once
def _warn_once() -> None:
    logger.warning(
        "StripedAdamW: parameters, gradients or state that are neither contiguous nor transposed "
        "are stepped in plain PyTorch, several times slower: make them contiguous"
    )


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
            launch_step(placed, settings)
        if prepared.fallback:
            reference.step([entries[i] for i in prepared.fallback], settings)

    def step_known(self, known: Known, steps: list[int], settings: Settings) -> bool:
        """Performs ``step`` with the plan of an earlier step of these entries."""
        prepared: Prepared | None = known.prepared.get(settings.lagged)
        if prepared is None or not prepared.update(known, steps):
            return False
        with launching_on(known.device):
            launch_step(_placed(prepared, steps), settings)
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
            launch_statistics(placed, buffer)
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
            launch_update(placed, settings, has_roots=True)
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
            launch_update(placed, settings)
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
