"""The places of some entries in a plan, and their addresses, kept from one step to the next."""

from dataclasses import dataclass, field

import numpy as np

from striped_hf.optim.backends.triton.arguments import GRAD_POINTER
from striped_hf.optim.backends.triton.kinds import ALIGNMENT
from striped_hf.optim.backends.triton.plan import Plan, Programs
from striped_hf.optim.interface import Known


@dataclass
class Prepared:
    """The places of the entries of a step in a plan.

    Attributes:
        plan, programs, numbers, positions, fallback: As in ``launch.Placed``.
        pointers: [supported entries, 9] int64, rows of ``EntryPointers``.
    """

    plan: Plan
    programs: Programs
    numbers: list[int]
    positions: list[int]
    fallback: list[int]
    pointers: np.ndarray
    _addresses: list[int] = field(default_factory=list)
    _grad_addresses: list[int] = field(default_factory=list)
    _grad_alignment: list[bool] = field(default_factory=list)

    @property
    def can_update(self) -> bool:
        """Whether later steps may change the gradients' addresses alone."""
        # where only the device knows the step, the last field is an address, too
        return not self.fallback and all(self.pointers[:, -1] == 0)

    def learn(self, known: Known) -> None:
        """Learns the addresses of the entries, which ``pointers`` has already."""
        self._addresses, self._grad_addresses = known.addresses, known.grad_addresses
        self._grad_alignment = _alignment(known.grad_addresses)

    def update(self, known: Known, steps: list[int]) -> bool:
        """Takes the gradients' addresses of a later step over.

        Returns:
            False if the entries may need other places in the plan.
        """
        if known.addresses is not self._addresses or steps.count(steps[0]) != len(steps):
            return False
        if known.grad_addresses is not self._grad_addresses:
            if _alignment(known.grad_addresses) != self._grad_alignment:
                return False
            self.plan.addresses.invalidate()
            self.pointers[:, GRAD_POINTER.value] = known.grad_addresses
            self._grad_addresses = known.grad_addresses
        return True


def _alignment(addresses: list[int]) -> list[bool]:
    # in plain Python: faster than several calls of NumPy
    return [address % ALIGNMENT == 0 for address in addresses]
