"""Collects the parameters of a step in batches for backends, each with its state."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from striped_hf.optim.backends import reference
from striped_hf.optim.checked import CheckedGroup
from striped_hf.optim.interface import Backend, Batch, Entry, State
from striped_hf.optim.plain import has_values, plain_gradient, plain_parameter
from striped_hf.optim.sharded import step as sharded_step
from striped_hf.optim.state import Description
from striped_hf.optim.steps import next_step
from striped_hf.optim.views import entry_of


class Collected(NamedTuple):
    """The parameters of one param group that this process steps without other processes.

    Attributes:
        batches: A batch for each device of the parameters.
        states: The states of all parameters, also of empty parameters.
        copies: Pairs of a tensor that no kernel can step and the copy that is stepped in its place.
    """

    batches: list[Batch]
    states: list[State]
    copies: list[tuple[Tensor, Tensor]]


def collect(
    group: CheckedGroup,
    new: list[Tensor],
    state_of: Callable[[Tensor, Description, bool, list[Tensor]], State],
    backend_of: Callable[[str], Backend],
    capturable: bool,
) -> Collected:
    """Collects the parameters that this process steps alone, and creates missing state.

    Args:
        group: The checked parameters of a param group; ``together`` is left to ``sharded_step``.
        new: A list to which the parameters without a state are added.
        state_of: Returns the state of a parameter, created and added to ``new`` if there is none.
            The bool says whether a state is known to be placed as the parameter is.
        backend_of: Returns the backend for a ``torch.device.type``.
        capturable: Whether the optimizer is capturable.
    """
    settings, alone, _ = group
    states: list[State] = []
    copies: list[tuple[Tensor, Tensor]] = []
    entries: dict[tuple[torch.device, bool], list[Entry]] = {}
    for param, grad, description, ordinary, sharded in alone:
        state = state_of(param, description, ordinary, new)
        states.append(state)
        if param.numel() == 0:
            continue
        step = next_step(state, capturable)
        real = ordinary or has_values(param)
        of_device = entries.setdefault((param.device, real), [])
        if ordinary:
            of_device.append(entry_of(param, grad, state, description, step))
            continue
        if len(state) > 1 + len(description.tensors):  # other code's entries
            state = {key: state[key] for key in ("step", *description.keys)}
        if sharded is not None:
            pieces, _, copied = sharded_step.localize(sharded, state, step)
            of_device += pieces
            copies += copied
            continue
        plain = plain_parameter(param)
        of_device.append(entry_of(plain, plain_gradient(grad), state, description, step))
        if plain is not param:
            copies.append((param, plain))
    batches = [
        Batch(backend_of(device.type) if real else reference, settings, of_device)
        for (device, real), of_device in entries.items()
        if of_device
    ]
    return Collected(batches, states, copies)
