"""The state of one parameter, decided once from its shape and its group's options."""

from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement
from torch.nn.parameter import is_lazy

from striped_hf.optim import momentum
from striped_hf.optim.blocks import blocks_of
from striped_hf.optim.interface import LOW_BITS, Blocks, BlocksOption, Group, State
from striped_hf.optim.matrix import stepped_shape
from striped_hf.optim.sharded.layout import Layout, by_rows, is_sharded, layout_of


@dataclass(frozen=True)
class Description:
    """The facts about a parameter that are decided before its first step and hold in every step.

    Attributes:
        shape: The parameter's shape.
        stepped: The shape as which backends see it: [..., R, C], or [n], or [].
        momentum_dtype: The format in which its momentum is stored.
        blocks: (br, bc).
        layout: The layout of this process's part of a DTensor; None for a plain tensor.
        low_bits: The dtype of the bits of float32 that bfloat16 lacks and the state has: int32 for
            all 16 of them, int8 for the first 8, or None. A float16 parameter with int8 is refused
            (``checks.problem_of_state``).
    """

    shape: torch.Size
    stepped: torch.Size
    momentum_dtype: str
    blocks: Blocks
    layout: Layout | None
    low_bits: torch.dtype | None = None

    @property
    def state_shape(self) -> torch.Size:
        """The shape of its momentum, apart from codes: a vector keeps the parameter's."""
        return self.stepped if len(self.stepped) >= 2 else self.shape

    @cached_property
    def tensors(self) -> tuple[tuple[str, torch.Size, torch.dtype], ...]:
        """Key, shape and dtype of each tensor in the whole parameter's state, without ``step``."""
        zeros = zero_state(self, torch.device("meta"))
        return tuple((key, v.shape, v.dtype) for key, v in zeros.items() if key != "step")

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The keys of ``tensors``."""
        return tuple(key for key, _, _ in self.tensors)


def description_of(group: Group, position: int) -> Description:
    """Describes one parameter of a param group."""
    param, blocks = group["params"][position], blocks_of(group, position)
    options = group["momentum_dtype"], blocks, group["master_bits"]
    if is_sharded(param):
        mesh, placements = param.device_mesh, tuple(param.placements)
        return _describe(param.shape, param.dtype, *options, mesh, placements)
    return _describe(param.shape, param.dtype, *options)


@cache  # no parameter's description changes from step to step
def _describe(
    shape: torch.Size,
    dtype: torch.dtype,
    momentum_dtype: str,
    blocks: BlocksOption,
    master_bits: int | None = None,
    mesh: DeviceMesh | None = None,
    placements: tuple[Placement, ...] = (),
) -> Description:
    stepped = stepped_shape(shape, blocks)
    stored = momentum.storage_format(stepped, momentum_dtype)
    pair = blocks if isinstance(blocks, tuple) else (1, 1)
    low_bits = None
    if dtype == torch.bfloat16 and len(stepped) < 2:
        # weights of about 1, as in norms, lose most updates to bfloat16's rounding; they are few
        low_bits = torch.int32  # not int16, which gloo and NCCL do not gather
    elif dtype != torch.float32 and master_bits == 24:
        low_bits = torch.int8
    description = Description(shape, stepped, stored, pair, None, low_bits)
    if mesh is None:
        return description
    if len(stepped) != len(shape):
        placements = by_rows(placements, len(shape))
    layout = layout_of(description.state_shape, mesh, placements, stored, pair)
    return replace(description, layout=layout)


def name_of(group: Group, position: int, group_index: int | None = None) -> str:
    """Names a parameter for a message: by its name if known, else by its position."""
    param, name = group["params"][position], known_name(group, position)
    shape = "unknown" if is_lazy(param) else tuple(param.shape)
    if name is not None:
        return f"parameter {name!r} of shape {shape}"
    where = "" if group_index is None else f" of param group {group_index}"
    return f"parameter {position}{where}, of shape {shape}"


def known_name(group: Group, position: int) -> str | None:
    """Returns the name of a parameter; None if its group has no names."""
    names = group.get("param_names", ())
    # other lengths: other code has removed parameters
    return names[position] if len(names) == len(group["params"]) else None


def init_state(
    param: Tensor, momentum_dtype: str, blocks: BlocksOption, device: torch.device | None = None
) -> State:
    """Returns the zero state of one whole parameter.

    Args:
        param: Only its shape, dtype and device count.
        momentum_dtype: The format that its param group asks for.
        blocks: (br, bc), "kernel" or "stack".
        device: Where to allocate, instead of on the parameter's device.

    Returns:
        As ``zero_state``.
    """
    description = _describe(param.shape, param.dtype, momentum_dtype, blocks)
    return zero_state(description, param.device if device is None else device)


def zero_state(description: Description, device: torch.device) -> State:
    """Returns the zero state of the whole of a parameter.

    Returns:
        ``step``: [] float32, on the CPU; ``exp_avg`` and perhaps ``exp_avg_scale`` as
        ``momentum.init`` returns them. A matrix has ``exp_avg_sq_row`` [..., R, bc] and
        ``exp_avg_sq_col`` [..., br, C], float32; [..., R, C] is the matrix as which the parameter
        is stepped. An exact parameter has ``exp_avg_sq`` of its own shape, float32. If it is
        bfloat16 it also has ``param_low_bits`` of its shape, int32: see ``rounding.join``. A
        bfloat16 matrix has ``param_low_bits`` [..., R, C], int8, if ``master_bits`` is 24.
    """
    shape = description.state_shape
    # explicit dtypes: torch.set_default_dtype must not change the state's dtypes
    step_device = "meta" if device.type == "meta" else "cpu"
    state = {"step": torch.zeros((), dtype=torch.float32, device=step_device)}
    state |= momentum.init(shape, description.momentum_dtype, device)
    shapes = {"exp_avg_sq": shape}
    if len(description.stepped) >= 2:
        *matrices, rows, columns = shape
        row_blocks, column_blocks = description.blocks
        shapes = {
            "exp_avg_sq_row": torch.Size((*matrices, rows, column_blocks)),
            "exp_avg_sq_col": torch.Size((*matrices, row_blocks, columns)),
        }
    for key, size in shapes.items():
        state[key] = torch.zeros(size, dtype=torch.float32, device=device)
    if description.low_bits is not None:
        state[LOW_BITS] = torch.zeros(shape, dtype=description.low_bits, device=device)
    return state
