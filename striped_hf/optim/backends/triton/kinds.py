"""The facts about an entry on which its kernels and the work of their programs depend."""

from enum import Enum
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from striped_hf.optim.backends.triton.arguments import EntryPointers
from striped_hf.optim.interface import LOW_BITS, Blocks, Entry

ALIGNMENT = 16  # bytes of a vector; also the number of int8 columns in a vector
TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
MOMENTUM_DTYPES = {
    "float32": tl.float32,
    "bfloat16": tl.bfloat16,
    "int8": tl.int8,
    "int4": tl.uint8,
}
# the state's tensors, in the order in which ``EntryPointers`` has their addresses
_STATE_KEYS = EntryPointers._fields[2:-1]


class Strides(Enum):
    """The order in memory of the elements of a parameter and its gradient."""

    CONTIGUOUS = 0
    TRANSPOSED = 1  # every matrix is the transposed view of a contiguous one
    OTHER = 2


class EntryKind(NamedTuple):
    """All facts about an entry that a plan depends on. Entries of one kind can replace each other.

    Attributes:
        shape: The shape as which the parameter is stepped.
        param_dtype: The parameter's dtype.
        grad_dtype: The gradient's dtype; None if the gradient was folded.
        momentum_dtype, blocks, whole_start, whole_stride: As in ``interface.Entry``.
        low_bits: Whether the state has ``param_low_bits``.
        strides: The strides that parameter and gradient have in common.
        aligned: Whether the rows of all tensors can be read in vectors.
    """

    shape: torch.Size
    param_dtype: torch.dtype
    grad_dtype: torch.dtype | None
    momentum_dtype: str
    blocks: Blocks
    low_bits: bool
    whole_start: int
    whole_stride: int
    strides: Strides
    aligned: bool

    @property
    def is_matrix(self) -> bool:
        """Whether the kernels of matrices step it."""
        return len(self.shape) >= 2


def kind_of(entry: Entry, pointers: EntryPointers) -> EntryKind | None:
    """Returns the kind of an entry with these addresses; None: no kernel supports it."""
    strides = strides_of(entry)
    if not _is_supported(entry, strides):
        return None
    shape = entry.param.shape
    columns = shape.numel() if len(shape) < 2 else shape[-1]
    block_columns = 0 if len(shape) < 2 else columns // entry.blocks[1]
    return EntryKind(
        shape=shape,
        param_dtype=entry.param.dtype,
        grad_dtype=None if entry.grad is None else entry.grad.dtype,
        momentum_dtype=entry.momentum_dtype,
        blocks=entry.blocks,
        low_bits=LOW_BITS in entry.state,
        whole_start=entry.whole_start,
        whole_stride=entry.whole_stride,
        strides=strides,
        aligned=(
            are_aligned(pointers)
            and strides is Strides.CONTIGUOUS
            and columns % ALIGNMENT == block_columns % ALIGNMENT == 0
        ),
    )


def pointers_of(entry: Entry, first_step: int) -> EntryPointers:
    """Returns the addresses of an entry's tensors; ``first_step`` is the first entry's step."""
    state = entry.state
    # a step of 0 means that only the device knows it
    step = entry.step - first_step if entry.step else state["step"].data_ptr()
    grad = 0 if entry.grad is None else entry.grad.data_ptr()
    # the state of a part of a sharded matrix has no stripes; a vector's state has no scales
    of_state = [state[key].data_ptr() if key in state else 0 for key in _STATE_KEYS]
    return EntryPointers(*(entry.param.data_ptr(), grad, *of_state, step))


def are_aligned(pointers: EntryPointers) -> bool:
    """Whether the tensors that kernels read in vectors begin at whole vectors."""
    read = pointers.param | pointers.grad | pointers.exp_avg | pointers.exp_avg_sq
    return (read | pointers.param_low_bits) % ALIGNMENT == 0


def strides_of(entry: Entry) -> Strides:
    """Returns the strides that parameter and gradient have in common."""
    tensors = [entry.param] if entry.grad is None else [entry.param, entry.grad]
    if all(map(Tensor.is_contiguous, tensors)):
        return Strides.CONTIGUOUS
    if entry.param.dim() >= 2 and all(tensor.mT.is_contiguous() for tensor in tensors):
        return Strides.TRANSPOSED
    return Strides.OTHER


def _is_supported(entry: Entry, strides: Strides) -> bool:
    """Whether the kernels can step an entry. They count rows and columns in int32."""
    if strides is Strides.OTHER or not all(map(Tensor.is_contiguous, entry.state.values())):
        return False
    if entry.param.dim() < 2:
        return True
    columns = entry.param.shape[-1]
    return max(columns, entry.param.numel() // columns) < 1 << 30
