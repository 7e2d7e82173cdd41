"""The parameters that a step updates, checked before any tensor changes."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from striped_hf.optim.blocks import ParameterBlocks
from striped_hf.optim.checks import (
    is_ordinary,
    problem_of_gradient,
    problem_of_shape,
    problem_of_shards,
    problem_of_state,
)
from striped_hf.optim.interface import Group, Settings, State
from striped_hf.optim.plain import problem_of_wrapper
from striped_hf.optim.sharded.layout import is_elsewhere, is_sharded
from striped_hf.optim.sharded.matrix import ShardedParameter
from striped_hf.optim.state import Description, description_of, name_of


class Checked(NamedTuple):
    """A parameter that can be stepped by its gradient.

    Attributes:
        ordinary: Whether all of its tensors are plain, fit each other, and have values.
        sharded: The argument of ``sharded_step`` if the parameter is sharded, else None.
    """

    param: Tensor
    grad: Tensor
    description: Description
    ordinary: bool = True
    sharded: ShardedParameter | None = None


class CheckedGroup(NamedTuple):
    """The parameters of one param group that a step updates; none if they were recognized.

    Attributes:
        settings: The group's settings.
        alone: Parameters that this process steps without other processes.
        together: Sharded parameters of which the processes exchange a tensor, with or without a
            gradient in this process.
    """

    settings: Settings
    alone: list[Checked]
    together: list[ShardedParameter]


def check_params(
    group: Group,
    group_index: int,
    settings: Settings,
    states: Mapping[Tensor, State],
    blocks: ParameterBlocks,
    capturable: bool,
    sharded_of: Callable[[Settings, Group, int, bool], ShardedParameter | None],
) -> tuple[CheckedGroup, str | None]:
    """Checks everything that a step of a param group will read or write, and changes none of it.

    Args:
        group: The param group.
        group_index: Its position.
        settings: Its settings.
        states: The optimizer's states, by parameter.
        blocks: The blocks of its parameters.
        capturable: Whether the optimizer is capturable.
        sharded_of: Returns the argument of ``sharded_step`` for the parameter at a position, and
            None if it is not sharded. The bool says whether the checks found no problem.

    Returns:
        The parameters to step; and the problem of the first parameter that cannot be stepped, with
        its name, or None.
    """
    alone: list[Checked] = []
    together: list[ShardedParameter] = []
    first_problem: str | None = None
    for i, param in enumerate(group["params"]):
        grad = param.grad
        # another process may have a gradient of a sharded parameter
        is_waited_for = param.requires_grad and is_sharded(param)
        if (grad is None and not is_waited_for) or is_elsewhere(param):
            continue
        description, state = description_of(group, i), states.get(param, {})
        # a kernel's state has another shape than the kernel, and may fit by accident
        is_kernel = len(description.stepped) != len(description.shape)
        first_shape = blocks.first_shape(param) if is_kernel else description.shape
        is_resized = bool(state) and first_shape != description.shape
        if grad is not None and not is_resized and is_ordinary(param, grad, state, description):
            alone.append(Checked(param, grad, description))
            continue
        problem = problem_of_step(param, grad, state, description, capturable)
        if problem is None and is_resized:
            problem = problem_of_shape(first_shape)
        if problem is not None:
            # a sharded parameter is still listed: the other processes wait for this one
            first_problem = first_problem or f"{name_of(group, i, group_index)} {problem}"
        sharded = sharded_of(settings, group, i, problem is None)
        if sharded is not None and sharded.mesh_dims:
            together.append(sharded)
        elif grad is not None:
            alone.append(Checked(param, grad, description, False, sharded))
    return CheckedGroup(settings, alone, together), first_problem


def problem_of_step(
    param: Tensor, grad: Tensor | None, state: State, description: Description, capturable: bool
) -> str | None:
    """Explains why a parameter cannot be stepped by its gradient and its state; None: it can.

    Args:
        param: The parameter.
        grad: Its gradient; None if this process has none.
        state: Its state; empty if it has none yet.
        description: Its description.
        capturable: Whether the optimizer is capturable.
    """
    return (
        problem_of_gradient(param, grad, capturable)
        or problem_of_wrapper(param)
        or problem_of_state(param, state, description)
        or (problem_of_shards(param, state) if is_sharded(param) else None)
    )
