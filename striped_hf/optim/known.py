"""Recognizes the tensors of earlier steps, so that a step need not check and describe them anew.

Nearly every step is like the step before: only values, gradients' addresses and step numbers have
changed. ``KnownEntries`` remembers the facts on which the checks of ``checks.py`` and the work of a
backend depend, and compares them in few calls for all tensors of a param group. It remembers
numbers, not tensors: it keeps no gradient, parameter or state alive.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat
from operator import itemgetter
from typing import Any

from torch import Tensor, UntypedStorage

from striped_hf.optim.checks import any_flattened
from striped_hf.optim.interface import Entry, Group, Known, State
from striped_hf.optim.options import OPTIONS
from striped_hf.optim.state import Description
from striped_hf.optim.views import entry_of

try:  # torch.compile's comparison of tensors: a private part of torch
    from torch._C._dynamo.guards import TensorGuards as _TensorGuards
except ImportError:
    _TensorGuards = None  # type: ignore[assignment, misc]

# the options that decide a parameter's description
_DESCRIBING = tuple(name for name, option in OPTIONS.items() if option.settings is None)


# as ``Entry._make``, which is slower
_new_entry: Callable[[tuple[Any, ...]], Entry] = partial(tuple.__new__, Entry)


class KnownEntries(Known):
    """The entries of one param group that were stepped with tensors like these.

    Attributes:
        device: The device of all tensors but the steps.
    """

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
        self.device = params[0].device
        keys = [description.keys for description in descriptions]
        self._group = _options_of(group)
        self._size = len(group["params"])
        self._stepped = list(map(id, params))
        self._getters = [_getter(of_state) for of_state in keys]
        self._lengths = list(map(len, states))
        self._formats = [description.momentum_dtype for description in descriptions]
        self._blocks = [description.blocks for description in descriptions]
        self._reshaped = [
            (i, description)
            for i, description in enumerate(descriptions)
            if len(description.stepped) != len(description.shape)
        ]
        tensors = self._tensors(params, grads, states)
        super().__init__(keys, list(map(Tensor.data_ptr, tensors)))
        self._sizes = _storage_sizes(tensors)
        self._offsets = list(map(Tensor.storage_offset, tensors))
        self._are_like = _comparison([*tensors, *(state["step"] for state in states)])

    def recognize(
        self, group: Group, params: list[Tensor], grads: list[Tensor], states: list[State]
    ) -> list[Tensor] | None:
        """Compares tensors with those of earlier steps.

        Args:
            group: The param group.
            params: Its parameters with a gradient.
            grads: The gradients.
            states: The parameters' states, as other code may have left them.

        Returns:
            The states' ``step``, if nothing but values and addresses has changed, else None.
        """
        if (
            list(map(id, params)) != self._stepped
            or len(group["params"]) != self._size
            or not OPTIONS.keys() <= group.keys()
            or _options_of(group) != self._group
            or list(map(len, states)) != self._lengths
            or any_flattened(params)
        ):
            return None
        try:
            tensors = self._tensors(params, grads, states)
            steps = [state["step"] for state in states]
            # the order matters: only tensors of the right class have memory
            if not self._are_like(*tensors, *steps):
                return None
            sizes = _storage_sizes(tensors)
            addresses = list(map(Tensor.data_ptr, tensors))
        except (KeyError, TypeError, AttributeError, RuntimeError):
            return None
        if sizes != self._sizes:
            return None
        if addresses != self.addresses:
            offsets = list(map(Tensor.storage_offset, tensors))
            if offsets != self._offsets or not all(addresses):
                return None
            self.addresses = addresses
        return steps

    def entries(
        self, params: list[Tensor], grads: list[Tensor], states: list[State], steps: list[int]
    ) -> list[Entry]:
        """Returns the entries of a recognized step, whose numbers are ``steps``."""
        zero = repeat(0)  # they are whole parameters
        fields = (params, grads, states, self._formats, self._blocks, steps, zero, zero)
        entries = list(map(_new_entry, zip(*fields, strict=False)))
        for i, description in self._reshaped:
            entries[i] = entry_of(params[i], grads[i], states[i], description, steps[i])
        return entries

    def _tensors(
        self, params: list[Tensor], grads: list[Tensor], states: list[State]
    ) -> list[Tensor]:
        tensors = [*params, *grads]
        for state, values_of in zip(states, self._getters, strict=True):
            tensors += values_of(state)
        return tensors


def _storage_sizes(tensors: list[Tensor]) -> list[int]:
    return list(map(UntypedStorage.nbytes, map(Tensor.untyped_storage, tensors)))


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
