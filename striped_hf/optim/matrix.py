"""The matrix as which a parameter of three or more dimensions is stepped.

Matrices [R, C] and vectors (0-D and 1-D) are stepped in their own shapes. A parameter [d0, d1, ...]
of more dimensions has three readings. Each needs so many numbers for the second moment:

    kernel  the matrix [d0, d1 d2 ...], such as a convolution's     d0 + d1 d2 ...
    stack   n matrices [R, C], such as a layer of experts           n (R + C)
    exact   no matrix                                               d0 d1 d2 ...

Code that knows the module passes "kernel" or "stack" (``blocks.mark_blocks``). Blocks other than
(1, 1) mean a stack, and divide its matrices. Otherwise the shape alone decides:

    [n, R, C] with R and C of at least 16 is a stack;
    else the reading with fewer numbers, or the stack if both need as many.

In every case a parameter is exact if its stripes would need at least as many numbers as it has
elements. So its second moment is never larger than AdamW's.
"""

import torch

from striped_hf.optim.interface import BlocksOption

_STACK_SIZE = 16  # matrices with at least so many rows and columns are always a stack


def stepped_shape(shape: torch.Size, blocks: BlocksOption) -> torch.Size:
    """Returns the shape as which backends see a parameter.

    Args:
        shape: The parameter's shape.
        blocks: (br, bc), "kernel" or "stack".

    Returns:
        ``shape`` for vectors, matrices and stacks; [d0, d1 d2 ...] for a kernel; [d0 d1 ...] for
        an exact parameter.
    """
    if len(shape) < 3 or shape.numel() == 0 or (blocks != (1, 1) and isinstance(blocks, tuple)):
        return shape
    stepped = readings(shape)
    numbers = {
        "kernel": sum(stepped["kernel"]),
        "stack": shape[:-2].numel() * sum(shape[-2:]),
    }
    if isinstance(blocks, str):
        reading = blocks
    elif len(shape) == 3 and min(shape[-2:]) >= _STACK_SIZE:
        reading = "stack"
    else:
        reading = "kernel" if numbers["kernel"] < numbers["stack"] else "stack"
    return stepped[reading if numbers[reading] < shape.numel() else "exact"]


def readings(shape: torch.Size) -> dict[str, torch.Size]:
    """Returns the shapes as which a parameter of three or more dimensions can be stepped."""
    return {
        "kernel": torch.Size((shape[0], shape[1:].numel())),
        "stack": shape,
        "exact": torch.Size((shape.numel(),)),
    }
