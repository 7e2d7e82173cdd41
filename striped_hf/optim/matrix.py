"""As which matrix a parameter of three or more dimensions is stepped.

A matrix [R, C] is stepped as it is, and so are vectors (0-D and 1-D). A parameter [d0, d1, ...] of
more dimensions has three readings. For its second moment they need these numbers:

    kernel  the matrix [d0, d1 d2 ...], such as a convolution's     d0 + d1 d2 ...
    stack   n matrices [R, C], such as a layer of experts           n (R + C)
    exact   no matrix                                               d0 d1 d2 ...

Whoever knows the module says "kernel" or "stack" (``blocks.mark_blocks``). Blocks other than (1, 1)
are of the matrices of a stack. Otherwise the shape alone decides:

    [n, R, C] with R and C of at least 16 is a stack;
    else the reading with fewer numbers is taken, and the stack where both have as many.

Whatever was decided, a parameter is exact where its stripes would need no fewer numbers than it has
elements: its second moment is never larger than AdamW's.
"""

import torch

from striped_hf.optim.interface import BlocksOption

_STACK_SIZE = 16  # the fewest rows and columns of what is a stack, whatever it costs


def stepped_shape(shape: torch.Size, blocks: BlocksOption) -> torch.Size:
    """Returns the shape as which backends see a parameter.

    Args:
        shape: The parameter's.
        blocks: (br, bc), "kernel" or "stack".

    Returns:
        ``shape`` for vectors, matrices and stacks; [d0, d1 d2 ...] for a kernel; [d0 d1 ...] for
        what is exact.
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
