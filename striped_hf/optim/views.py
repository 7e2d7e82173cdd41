"""Parameters in the shape in which backends step them: views, or copies if there is no view.

The columns of a kernel are in the parameter's row-major order, whatever its memory format. So its
state, and the bits of stochastic rounding, do not depend on the format. A kernel that is not
contiguous, such as one in ``torch.channels_last``, is stepped in a contiguous copy.
"""

from collections.abc import Iterator

from torch import Tensor

from striped_hf.optim.interface import Batch, Entry, State
from striped_hf.optim.state import Description

# the number of elements copied at a time: on a CPU they stay in a cache between copy and step
_COPIED = {"cpu": 1 << 20}
_COPIED_ELSEWHERE = 1 << 24


def as_stepped(tensor: Tensor, dims: int) -> Tensor:
    """Views a contiguous tensor of a parameter's shape in the shape in which it is stepped.

    Args:
        tensor: A parameter, its gradient, or the same part of both.
        dims: The number of dimensions of the shape in which it is stepped.
    """
    if tensor.dim() == dims:
        return tensor
    return tensor.flatten(1) if dims == 2 else tensor.flatten()


def entry_of(
    param: Tensor, grad: Tensor, state: State, description: Description, step: int
) -> Entry:
    """Returns the entry of a whole parameter; ``step_batch`` steps it."""
    dims = len(description.stepped)
    if dims != param.dim():
        if dims == 1:
            keys = description.keys
            state = {"step": state["step"], **{key: state[key].view(-1) for key in keys}}
        if param.is_contiguous() and grad.is_contiguous():
            param, grad = as_stepped(param, dims), as_stepped(grad, dims)
    return Entry(param, grad, state, description.momentum_dtype, description.blocks, step)


def step_batch(batch: Batch) -> None:
    """Steps whole parameters, some of them in copies, a few at a time."""
    backend, settings, entries = batch
    in_place = [entry for entry in entries if is_viewed(entry)]
    if in_place:
        backend.step(in_place, settings)
    if len(in_place) == len(entries):
        return
    for group in _few_at_a_time([entry for entry in entries if not is_viewed(entry)]):
        copies = [_copied(entry) for entry in group]
        backend.step(copies, settings)
        for entry, copy in zip(group, copies, strict=True):
            if not entry.param.is_contiguous():
                entry.param.copy_(copy.param.view(entry.param.shape))


def is_viewed(entry: Entry) -> bool:
    """Whether a whole parameter is stepped in its own memory."""
    return entry.param.dim() == entry.state["exp_avg"].dim()


def _copied(entry: Entry) -> Entry:
    dims = entry.state["exp_avg"].dim()
    param, grad = entry.param.contiguous(), entry.gradient.contiguous()
    return entry._replace(param=as_stepped(param, dims), grad=as_stepped(grad, dims))


def _few_at_a_time(entries: list[Entry]) -> Iterator[list[Entry]]:
    group: list[Entry] = []
    elements = 0
    for entry in entries:
        size, limit = entry.param.numel(), _COPIED.get(entry.param.device.type, _COPIED_ELSEWHERE)
        if group and elements + size > limit:
            yield group
            group, elements = [], 0
        group.append(entry)
        elements += size
    yield group
