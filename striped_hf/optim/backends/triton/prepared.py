"""The places of some entries in a plan, and their addresses, kept from one step to the next."""

from array import array
from dataclasses import dataclass, field

import numpy as np

from striped_hf.optim.backends.triton.arguments import EntryPointers
from striped_hf.optim.backends.triton.kinds import ALIGNMENT
from striped_hf.optim.backends.triton.plan import Plan, Programs
from striped_hf.optim.interface import Known

_FIELDS = {name: i for i, name in enumerate(EntryPointers._fields)}
# the tensors that kernels read in vectors
_READ = ("param", "grad", "exp_avg", "exp_avg_sq", "param_low_bits")


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
    _places: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    _are_read: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=bool))
    _aligned: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=bool))

    @property
    def can_update(self) -> bool:
        """Whether later steps may change the addresses alone."""
        # where only the device knows the step, the last field is an address, too
        return not self.fallback and all(self.pointers[:, -1] == 0)

    def learn(self, known: Known) -> None:
        """Learns where the addresses of ``known`` belong."""
        rows = range(len(known.keys))
        fields = [(row, name) for name in ("param", "grad") for row in rows]
        for row, keys in zip(rows, known.keys, strict=True):
            fields += [(row, key) for key in keys]
        self._places = np.array([row * len(_FIELDS) + _FIELDS[name] for row, name in fields])
        self._are_read = np.array([name in _READ for _, name in fields])
        self._addresses = known.addresses
        self._aligned = self._alignment(np.array(known.addresses))

    def update(self, known: Known, steps: list[int]) -> bool:
        """Takes the addresses of a later step over; False: the entries need other places."""
        if steps.count(steps[0]) != len(steps):
            return False
        if known.addresses is self._addresses:
            return True
        # by way of an array, which is faster than NumPy's conversion of a list
        addresses = np.frombuffer(array("q", known.addresses), np.int64)
        if not np.array_equal(self._alignment(addresses), self._aligned):
            return False
        pointers = np.zeros_like(self.pointers)
        pointers.reshape(-1)[self._places] = addresses
        self._addresses, self.pointers = known.addresses, pointers
        return True

    def _alignment(self, addresses: np.ndarray) -> np.ndarray:
        """Returns, for each tensor that kernels read in vectors, whether it begins at one."""
        return addresses[self._are_read] % ALIGNMENT == 0
