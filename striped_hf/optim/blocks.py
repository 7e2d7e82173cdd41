"""The blocks of each parameter. They are kept by parameter, because other code reorders ``params``.

A group's ``blocks`` are one value for all of its parameters or a list with a value for each: a pair
(br, bc), or how a parameter of more than two dimensions is read, "kernel" or "stack"
(``matrix.py``). A list is read by position once, when the optimizer first sees a parameter. After
that the parameter keeps its blocks, and the list follows the group's parameters.
"""

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.parameter import is_lazy

from striped_hf.optim.interface import Blocks, BlocksOption, Group, State
from striped_hf.optim.options import as_blocks, is_list_of_blocks

_MARK = "_striped_hf_blocks"
_WHOLE: Blocks = (1, 1)


def mark_blocks(param: Tensor, blocks: BlocksOption) -> None:
    """Marks a parameter with its blocks, for every optimizer and in any group.

    Code that builds the groups, such as a subclass of ``Trainer``, then need not know of blocks.
    The mark has precedence over a group's list, because other code may have put the parameters in
    another order. It also has precedence over a group's pair if the pair is (1, 1). A mark that
    does not divide its parameter is ignored: the parameter was resized after it was marked.

    Args:
        param: A parameter.
        blocks: (br, bc). For a parameter of three or more dimensions also "kernel", for the kernel
            of a convolution, or "stack", for a stack of matrices.
    """
    setattr(param, _MARK, as_blocks(blocks))


def is_marked(param: Tensor) -> bool:
    """Whether ``mark_blocks`` marked a parameter."""
    return hasattr(param, _MARK)


def blocks_of(group: Group, position: int) -> BlocksOption:
    """Returns the blocks of one parameter, from a group whose ``blocks`` follow its ``params``."""
    blocks: Any = group["blocks"]
    return as_blocks(blocks[position] if is_list_of_blocks(blocks) else blocks)


class _Known(NamedTuple):
    """A parameter that was seen before.

    A parameter that reuses its ``id`` has another class or shape.
    """

    kind: type
    shape: tuple[int, ...]
    blocks: BlocksOption


class ParameterBlocks:
    """The blocks of an optimizer's parameters.

    It holds no reference to a parameter. A strong one would keep a whole parameter in memory after
    ``accelerate`` has swapped it for its shard, and ``torch.utils.swap_tensors`` refuses to swap a
    parameter with a weak one.
    """

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}

    def refresh(self, groups: list[Group], states: Mapping[Tensor, State]) -> None:
        """Learns new parameters, and lets each group's ``blocks`` follow its ``params``.

        Args:
            groups: All of the optimizer's param groups.
            states: The optimizer's states, by parameter.

        Raises:
            RuntimeError: A pair differs from the pair that a matrix's state was made with, or
                DeepSpeed flattened the parameters. Nothing has changed then.
        """
        known = [[self._find(p, states) for p in group["params"]] for group in groups]
        found = [
            _blocks_of_group(index, group, of_group, states)
            for index, (group, of_group) in enumerate(zip(groups, known, strict=True))
        ]
        if all(blocks is None for blocks in found):
            return
        present = {id(param) for group in groups for param in group["params"]}
        gone = [old for key, old in self._known.items() if key not in present]
        if any(len(old.shape) >= 2 for old in gone):
            _check_not_flattened(groups, known)
        stepped = set(map(id, states))
        self._known = {k: old for k, old in self._known.items() if k in present or k in stepped}
        now = [
            blocks or [pair for pair in of_group if pair is not None]
            for blocks, of_group in zip(found, known, strict=True)
        ]
        # if one group has a list, all groups get lists, so that readers find one kind
        as_lists = any(
            is_list_of_blocks(group["blocks"]) or blocks.count(blocks[0]) < len(blocks)
            for group, blocks in zip(groups, now, strict=True)
            if blocks
        )
        for group, blocks in zip(groups, now, strict=True):
            for param, pair in zip(group["params"], blocks, strict=True):
                old = self._known.get(id(param))
                # a state was made for the shape that the parameter had when it was first seen
                shape = old.shape if old is not None and param in states else _shape(param)
                self._known[id(param)] = _Known(type(param), shape, pair)
            if blocks:
                group["blocks"] = blocks if as_lists else blocks[0]

    def first_shape(self, param: Tensor) -> tuple[int, ...]:
        """Returns the shape in which a parameter with a state was first seen."""
        known = self._known.get(id(param))
        return _shape(param) if known is None else known.shape

    def _find(self, param: Tensor, states: Mapping[Tensor, State]) -> BlocksOption | None:
        """Returns the blocks of a parameter that was seen before."""
        old = self._known.get(id(param))
        if old is None:
            return None
        # a state holds its parameter, so that nothing reuses its id
        if param in states or (type(param) is old.kind and _shape(param) == old.shape):
            return old.blocks
        return None


def _mark_of(param: Tensor, default: BlocksOption) -> BlocksOption:
    mark: BlocksOption | None = getattr(param, _MARK, None)
    if mark is None or is_lazy(param):
        return default if mark is None else mark
    if isinstance(mark, str):
        return mark if param.dim() >= 3 else _WHOLE
    divides = mark == _WHOLE or (
        param.dim() >= 2
        and all(size % n == 0 for size, n in zip(param.shape[-2:], mark, strict=True))
    )
    return mark if divides else _WHOLE


def _shape(param: Tensor) -> tuple[int, ...]:
    return () if is_lazy(param) else param.shape


def _blocks_of_group(
    index: int, group: Group, known: list[BlocksOption | None], states: Mapping[Tensor, State]
) -> list[BlocksOption] | None:
    """Returns the blocks of a group's parameters; None where nothing has changed.

    Args:
        index: The group's position, for messages.
        group: A param group.
        known: The blocks of the parameters that were seen before, else None.
        states: The optimizer's states, by parameter.
    """
    params, given = group["params"], group["blocks"]
    if not is_list_of_blocks(given):
        if known.count(given) == len(known):
            return None
        pair = as_blocks(given)
        blocks = [_mark_of(p, pair) if pair == _WHOLE else pair for p in params]
        if pair == _WHOLE:  # the default does not contradict known blocks
            blocks = [
                old if isinstance(old, str) else new for old, new in zip(known, blocks, strict=True)
            ]
        for param, old, new in zip(params, known, blocks, strict=True):
            if old not in (None, new) and states.get(param) and param.dim() >= 2:
                raise RuntimeError(
                    f"blocks of param group {index} were changed to {new}, but the state of its "
                    f"parameter of shape {tuple(param.shape)} was made with blocks={old}: set them "
                    "back, or start afresh with a new optimizer"
                )
        return blocks
    if known == given:
        return None
    # a list that contradicts known blocks belongs to other parameters
    listed = [as_blocks(each) for each in given]
    if len(listed) != len(params) or any(
        old not in (None, pair) for old, pair in zip(known, listed, strict=True)
    ):
        listed = [_WHOLE for _ in params]
    marked = [_mark_of(param, pair) for param, pair in zip(params, listed, strict=True)]
    return [old or new for old, new in zip(known, marked, strict=True)]


def _check_not_flattened(groups: list[Group], known: list[list[BlocksOption | None]]) -> None:
    """Raises RuntimeError if DeepSpeed replaced a group's parameters by one flat buffer.

    ZeRO 1 and 2 do not mark the buffer. So the check is that DeepSpeed's module is loaded and that
    the buffer is new. Callers call it when matrices have left the groups.
    """
    for index, (group, of_group) in enumerate(zip(groups, known, strict=True)):
        is_new = of_group == [None]
        if is_new and "deepspeed" in sys.modules and group["params"][0].dim() == 1:
            raise RuntimeError(
                f"DeepSpeed ZeRO flattened the parameters of param group {index} into one buffer "
                f"of {group['params'][0].numel()} elements, which leaves no matrix to factor: use "
                "FSDP2, torch's fully_shard, or fsdp_version: 2 in accelerate's config"
            )
