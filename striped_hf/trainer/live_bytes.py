"""Follows the bytes of all live tensors, operation by operation."""

import weakref
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OTHER = "other"  # the label of memory without a label


class _Storage:
    """The size and the label of one storage; ``label`` may be set after the allocation."""

    def __init__(self, size: int, label: str) -> None:
        self.size, self.label = size, label


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all tensors that operations make, while they are alive.

    The tensors may be fake (``FakeTensorMode``): such tensors have sizes but no memory. Tensors on
    the meta device do not count. The memory that a kernel allocates and frees inside one operation
    is not seen. Neither are earlier tensors that nobody labelled.

    Attributes:
        new: The label of memory that is allocated from now on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.new = OTHER
        self._alive: dict[int, _Storage] = {}
        self._changes: list[tuple[_Storage, int]] = []  # bytes allocated, or less than 0: freed

    def label(self, label: str, tensors: Iterable[torch.Tensor]) -> None:
        """Labels the memory of tensors, from its allocation on.

        Earlier tensors count from now on.
        """
        for tensor in tensors:
            self._add(tensor.untyped_storage(), label)

    @property
    def peak(self) -> int:
        """The largest number of bytes that were alive at a time."""
        return sum(self.at_peak().values())

    def at_peak(self, labels: Container[str] | None = None) -> dict[str, int]:
        """Returns the bytes that were alive at the peak, by label.

        Args:
            labels: The labels whose memory counts; None: all.
        """
        live, peak = 0, 0
        found = {OTHER: 0}
        at_peak = dict(found)
        for storage, change in self._changes:
            if labels is None or storage.label in labels:
                live += change
                found[storage.label] = found.get(storage.label, 0) + change
                if live > peak:
                    peak, at_peak = live, dict(found)
        return at_peak

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage, label: str | None = None) -> None:
        key = storage._cdata
        if key in self._alive:  # the storage of a view, or of an in-place operation's result
            if label is not None:
                self._alive[key].label = label
            return
        self._alive[key] = _Storage(storage.nbytes(), label or self.new)
        self._changes.append((self._alive[key], storage.nbytes()))
        weakref.finalize(storage, self._remove, key).atexit = False

    def _remove(self, key: int) -> None:
        storage = self._alive.pop(key)
        self._changes.append((storage, -storage.size))
