"""The steps that states count: ``step``, [] float32, in the state of each parameter."""

import torch
from torch import Tensor

from striped_hf.optim.interface import State
from striped_hf.optim.plain import has_values

_ONE = torch.tensor(1.0, dtype=torch.float32, device="cpu")


def counter_device(param: Tensor, capturable: bool) -> torch.device:
    """Returns the device of a parameter's ``step``; only its type counts.

    Args:
        param: The parameter.
        capturable: Whether the optimizer is capturable.
    """
    return param.device if capturable or param.is_meta else torch.device("cpu")


def next_step(state: State, capturable: bool) -> int:
    """Returns the number of this step for one state; 0 if only the device may know it."""
    if capturable:
        return 0
    step = state["step"]
    if (type(step) is not Tensor and not has_values(step)) or step.is_meta:
        return 1  # any number will do: such a step is for shapes and memory
    return int(step.item()) + 1


def next_steps(counters: list[Tensor], capturable: bool) -> list[int]:
    """Returns the numbers of this step for ``step`` tensors that are plain and have values."""
    if capturable:
        return [0] * len(counters)
    before = list(map(Tensor.item, counters))
    if before.count(before[0]) == len(before):
        return [int(before[0]) + 1] * len(before)
    return [int(step) + 1 for step in before]


def count_step(states: list[State], capturable: bool) -> None:
    """Adds one to the step of every state."""
    counters = [state["step"] for state in states]
    if any(type(counter) is not Tensor or counter.is_meta for counter in counters):
        torch._foreach_add_(counters, 1)
    elif counters:
        add_one(counters, capturable)


def add_one(counters: list[Tensor], capturable: bool) -> None:
    """Adds one to ``step`` tensors that are plain and have values."""
    if capturable:
        torch._foreach_add_(counters, 1)
        return
    # step - (-1) * 1: on a CPU, SGD is the only sum that torch computes in one call
    torch._fused_sgd_(
        *(counters, [_ONE] * len(counters), []),
        lr=-1.0,
        weight_decay=0.0,
        momentum=0.0,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )
