"""Recognizes the tensors of earlier steps, so that a step need not check and describe them anew.

Nearly every step is like the step before: only values, gradients' addresses and step numbers have
changed. ``KnownEntries`` remembers the facts on which the checks of ``checks.py`` and the work of a
backend depend, and compares them in few calls for all tensors of a param group. It remembers
numbers, not tensors: it keeps no gradient, parameter or state alive.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import repeat
from operator import itemgetter
from typing import Any, NamedTuple

from torch import Tensor, UntypedStorage

from striped_hf.optim.checked import Checked
from striped_hf.optim.checks import any_flattened
from striped_hf.optim.interface import Backend, Batch, Entry, Group, Known, Settings, State
from striped_hf.optim.options import OPTIONS
from striped_hf.optim.sharded.layout import is_sharded
from striped_hf.optim.state import Description
from striped_hf.optim.views import entry_of, is_viewed

try:  # torch.compile's comparison of tensors: a private part of torch
    from torch._C._dynamo.guards import TensorGuards as _TensorGuards
except ImportError:
    _TensorGuards = None  # type: ignore[assignment, misc]

# the options that decide a parameter's description
_DESCRIBING = tuple(name for name, option in OPTIONS.items() if option.settings is None)


class KnownEntries(Known):
    """The entries of one param group that were stepped with tensors like these."""

    def __init__(
        self,
        group: Group,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[State],
        descriptions: list[Description],
    ) -> None:
        """Remembers the facts about a step.

        Args:
            group: The param group.
            params: Parameters that ``checks.is_ordinary`` accepts, on one device.
            grads: Their gradients.
            states: Their states.
            descriptions: Their descriptions.
        """
        self._group = _options_of(group)
        self._size = len(group["params"])
        self._stepped = list(map(id, params))
        self._getters = [_getter(description.keys) for description in descriptions]
        self._lengths = list(map(len, states))
        self.formats = [description.momentum_dtype for description in descriptions]
        self.blocks = [description.blocks for description in descriptions]
        self.reshaped = [
            (i, description)
            for i, description in enumerate(descriptions)
            if len(description.stepped) != len(description.shape)
        ]
        tensors = self._tensors(params, states)
        super().__init__(params[0].device, _addresses(tensors), _addresses(grads))
        self._places = _places(tensors)
        self._grad_places = _places(grads)
        self._are_like = _comparison([*tensors, *grads, *(state["step"] for state in states)])

    def recognize(
        self, group: Group, params: list[Tensor], grads: list[Tensor], states: list[State]
    ) -> "Recognized | None":
        """Compares tensors with those of earlier steps.

        Args:
            group: The param group.
            params: Its parameters with a gradient.
            grads: The gradients.
            states: The parameters' states, as other code may have left them.

        Returns:
            The tensors, if nothing but values, addresses and steps has changed, else None.
        """
        if (
            list(map(id, params)) != self._stepped
            or len(group["params"]) != self._size
            or not OPTIONS.keys() <= group.keys()
            or _options_of(group) != self._group
            or list(map(len, states)) != self._lengths
        ):
            return None
        try:
            tensors = self._tensors(params, states)
            steps = [state["step"] for state in states]
            # the order matters: only tensors of the right class have memory
            if not self._are_like(*tensors, *grads, *steps):
                return None
            addresses, grad_addresses = _addresses(tensors), _addresses(grads)
            # Sizes of storages count only where addresses have changed: torch resizes a storage by
            # allocating other memory. One that is resized twice, and is back, is not noticed.
            if grad_addresses != self.grad_addresses:
                if not all(grad_addresses) or _places(grads) != self._grad_places:
                    return None
                self.grad_addresses = grad_addresses
            if addresses != self.addresses:
                if (
                    not all(addresses)
                    or _places(tensors) != self._places
                    or any_flattened(params)  # flattening moves the parameters
                ):
                    return None
                self.addresses = addresses
        except (KeyError, TypeError, AttributeError, RuntimeError):
            return None
        return Recognized(self, params, grads, states, steps)

    def _tensors(self, params: list[Tensor], states: list[State]) -> list[Tensor]:
        tensors = list(params)
        for state, values_of in zip(states, self._getters, strict=True):
            tensors += values_of(state)
        return tensors


# as ``Entry._make``, which is slower
_new_entry: Callable[[tuple[Any, ...]], Entry] = partial(tuple.__new__, Entry)


class Recognized(NamedTuple):
    """The tensors of a step in which nothing but values, addresses and steps has changed.

    Attributes:
        known: What is known of them.
        params, grads, states: The tensors of each entry.
        counters: The states' ``step``.
    """

    known: KnownEntries
    params: list[Tensor]
    grads: list[Tensor]
    states: list[State]
    counters: list[Tensor]

    def step(self, backend: Backend, settings: Settings, steps: list[int]) -> None:
        """Steps the parameters; ``steps`` has the number of this step for each."""
        if not backend.step_known(self.known, steps, settings):
            backend.step(self._entries(steps), settings, self.known)

    def _entries(self, steps: list[int]) -> list[Entry]:
        _, params, grads, states, _ = self
        formats, blocks, zero = self.known.formats, self.known.blocks, repeat(0)
        fields = zip(params, grads, states, formats, blocks, steps, zero, zero, strict=False)
        entries = list(map(_new_entry, fields))
        for i, description in self.known.reshaped:
            entries[i] = entry_of(params[i], grads[i], states[i], description, steps[i])
        return entries


class KnownGroups:
    """The known entries of an optimizer's param groups."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, bool], KnownEntries] = {}  # by group index and ``capturable``
        self._stepped: dict[int, list[int]] = {}  # ids of parameters, by group index

    def __len__(self) -> int:
        """The number of groups that may be recognized."""
        return len(self._known)

    def forget(self) -> None:
        """Forgets all groups: the next steps check and describe everything."""
        self._known.clear()
        self._stepped.clear()

    def recognize(
        self, group_index: int, group: Group, states: Mapping[Tensor, State], capturable: bool
    ) -> Recognized | None:
        """Returns the tensors of a param group if nothing but values has changed in them.

        Args:
            group_index: The group's position.
            group: The group.
            states: The optimizer's states, by parameter.
            capturable: Whether the optimizer is capturable.
        """
        known = self._known.get((group_index, capturable))
        if known is None:
            return None
        params: list[Tensor] = group["params"]
        grads: list[Any] = [param.grad for param in params]
        if type(None) in set(map(type, grads)):
            if any(map(is_sharded, params)):  # another process may have a gradient
                return None
            params = [param for param, grad in zip(params, grads, strict=True) if grad is not None]
            grads = [grad for grad in grads if grad is not None]
        found: list[Any] = list(map(states.get, params))
        return known.recognize(group, params, grads, found) if all(found) else None

    def remember(
        self,
        group_index: int,
        group: Group,
        stepped: list[Checked],
        states: list[State],
        batches: list[Batch],
        capturable: bool,
    ) -> None:
        """Remembers the tensors of a param group that is stepped twice with the same gradients.

        Args:
            group_index: The group's position.
            group: The group.
            stepped: Its parameters with a gradient, all of which this process steps without other
                processes.
            states: Their states.
            batches: Their batches.
            capturable: Whether the optimizer is capturable.
        """
        ids = [id(each.param) for each in stepped]
        is_repeated = self._stepped.get(group_index) == ids
        self._stepped[group_index] = ids
        self._known.pop((group_index, capturable), None)
        if (
            is_repeated
            and len(batches) == 1
            and all(each.ordinary for each in stepped)
            and all(map(is_viewed, batches[0].entries))
        ):
            self._known[group_index, capturable] = KnownEntries(
                group,
                [each.param for each in stepped],
                [each.grad for each in stepped],
                states,
                [each.description for each in stepped],
            )


def _addresses(tensors: list[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _places(tensors: list[Tensor]) -> tuple[list[Any], list[Any]]:
    """Returns the sizes of the tensors' storages in bytes, and their offsets in these."""
    storages = map(Tensor.untyped_storage, tensors)
    return list(map(UntypedStorage.nbytes, storages)), list(map(Tensor.storage_offset, tensors))


def _getter(keys: Sequence[str]) -> Callable[[State], tuple[Tensor, ...]]:
    return itemgetter(*keys)  # type: ignore[return-value]  # every state has two keys or more


def _options_of(group: Group) -> list[Any]:
    blocks = group["blocks"]
    copied = list(blocks) if isinstance(blocks, list) else blocks
    return [copied, *(group[name] for name in _DESCRIBING if name != "blocks")]


def _comparison(tensors: list[Tensor]) -> Callable[..., bool]:
    """Returns a function that compares its arguments with these tensors.

    It compares class, dtype, device, shape, strides, and whether the tensor is a lazy view.
    """
    if _TensorGuards is not None:
        guards = _TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        return guards.check
    expected = list(map(_facts, tensors))
    return lambda *others: list(map(_facts, others)) == expected


def _facts(tensor: Tensor) -> tuple[Any, ...]:
    return (
        *(type(tensor), tensor.dtype, tensor.device, tensor.layout),
        *(tensor.shape, tensor.stride(), tensor.is_neg(), tensor.is_conj()),
    )
