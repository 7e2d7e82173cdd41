"""Which entries have had their first step, where only the device knows the number of a step."""

from collections.abc import Callable, Iterable
from functools import partial
from weakref import ref

from torch import Tensor


class Counters:
    """Remembers which counters (``state["step"]`` on the device) have counted a step.

    After a step outside of a CUDA graph a counter is 1 or more, and steps only add to it. If other
    code writes to it, its version changes; if other code replaces it, it is another tensor. Then
    the host knows nothing of it, as at first. A step that is captured does not count yet.
    """

    def __init__(self) -> None:
        # by id: the counter and its version
        self._counted: dict[int, tuple[Callable[[], Tensor | None], int]] = {}

    def count(self, counters: Iterable[Tensor], is_captured: bool) -> bool:
        """Remembers a step. Call it once in each step, when the counters have counted the step.

        Args:
            counters: The counters of the step's entries.
            is_captured: Whether a CUDA graph is being captured.

        Returns:
            Whether each of them certainly had counted a step before this step.
        """
        all_had_counted = True
        for counter in counters:
            key, version = id(counter), _version(counter)
            known, known_version = self._counted.get(key, _UNKNOWN)
            if known() is counter and version == known_version + 1:
                self._counted[key] = known, version
                continue
            all_had_counted = False
            if not is_captured:
                self._counted[key] = ref(counter, partial(self._forget, key)), version
        return all_had_counted

    def _forget(self, key: int, _: "ref[Tensor]") -> None:
        self._counted.pop(key, None)


def _unknown() -> Tensor | None:
    return None


_UNKNOWN: tuple[Callable[[], Tensor | None], int] = _unknown, 0


def _version(counter: Tensor) -> int:
    """Returns the number of writes to a tensor; -1 where torch does not count them."""
    return -1 if counter.is_inference() else counter._version
