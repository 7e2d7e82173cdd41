"""Blocks that belong to a parameter, whichever param group it is in."""

from torch import Tensor

from striped_hf.optim.interface import Blocks

_MARK = "_striped_hf_blocks"
_WHOLE: Blocks = (1, 1)


def mark_blocks(param: Tensor, blocks: Blocks) -> None:
    """Marks a parameter with its blocks, for param groups that give none.

    Whoever builds the groups, such as a subclass of ``Trainer``, then need not know of blocks.

    Args:
        param: A matrix [..., R, C].
        blocks: (br, bc).
    """
    setattr(param, _MARK, tuple(blocks))


def marked_blocks(params: list[Tensor]) -> Blocks | list[Blocks]:
    """Returns the blocks with which parameters are marked, as ``blocks`` of a param group.

    A mark that does not divide its parameter is ignored: the parameter was resized since.
    """
    blocks: list[Blocks] = []
    for param in params:
        mark: Blocks = getattr(param, _MARK, _WHOLE)
        divides = mark == _WHOLE or (
            param.dim() >= 2
            and all(size % n == 0 for size, n in zip(param.shape[-2:], mark, strict=True))
        )
        blocks.append(mark if divides else _WHOLE)
    return blocks if any(pair != _WHOLE for pair in blocks) else _WHOLE
