"""The interface between the optimizer and the backends that compute its step."""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

State = dict[str, Tensor]  # the state of one parameter, by the names in a state dict
LOW_BITS = "param_low_bits"  # a key that few states have: ``state.zero_state``
Blocks = tuple[int, int]  # (br, bc)
# the value of a param group's ``blocks`` for one parameter: ``matrix.py``
BlocksOption = Blocks | Literal["kernel", "stack"]
Group = dict[str, Any]  # a param group

Sums = tuple[Tensor, Tensor]  # of squares: by row [..., R, bc] and by column [..., br, C], float32
Roots = tuple[Tensor, Tensor]  # a [..., R, bc] and c [..., br, C], float32


@dataclass(frozen=True)
class Settings:
    """The options of a param group, as a backend sees them.

    ``stochastic_rounding`` is a bool, and ``eps`` is above zero. ``lr`` is a tensor where the
    optimizer is capturable and the group's ``lr`` is on the device.
    """

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool
    nesterov: bool
    stochastic_rounding: bool
    lagged: bool


class Entry(NamedTuple):
    """A parameter, or a part of one, that a backend steps. ``matrix.py`` decides its shape.

    A step changes ``param`` and the tensors of ``state`` in place.

    Attributes:
        param: float32, bfloat16 or float16, not empty.
        grad: The gradient, with ``param``'s shape and any of these dtypes; None if ``fold`` has
            added it to the momentum.
        state: As ``state.init_state`` describes it. A part of a sharded matrix has no stripes.
        momentum_dtype: The format in which ``state`` holds the momentum.
        blocks: (br, bc).
        step: The number of this step, from 1; 0 where only ``state["step"]`` on the device knows
            it, because the optimizer is capturable.
        whole_start: The row-major index of the first element in the whole parameter. Stochastic
            rounding draws its bits by the index in the whole.
        whole_stride: The distance of two rows in the whole parameter, in elements; 0: the number of
            columns.
    """

    param: Tensor
    grad: Tensor | None
    state: State
    momentum_dtype: str
    blocks: Blocks
    step: int
    whole_start: int = 0
    whole_stride: int = 0

    @property
    def gradient(self) -> Tensor:
        """The gradient of an entry that has one."""
        assert self.grad is not None
        return self.grad


class Folded(NamedTuple):
    """The sums of one matrix's gradients, beside its momentum, from ``fold`` to the step.

    Attributes:
        row_sums: [..., R, bc] float32, the sums by row of the gradients' squares.
        col_sums: [..., br, C] float32, the sums by column.
        sketch: [..., R, ceil(C / 128)] float32, the sums of the gradients' elements over blocks of
            128 columns, each element multiplied by a random sign; None if a step has one gradient.
    """

    row_sums: Tensor
    col_sums: Tensor
    sketch: Tensor | None


@dataclass
class Known:
    """What the optimizer knows of the entries of a step, from earlier steps.

    As long as a step gets the same object, its entries differ from those of the first such step
    only in their tensors' values and addresses and in their steps.

    Attributes:
        device: The device of all tensors but the steps.
        addresses: The addresses of all parameters and of the tensors of their states. The same
            list as in the step before if none of them has changed.
        grad_addresses: The addresses of all gradients; likewise.
        prepared: What backends have computed from the entries, for their next step.
    """

    device: torch.device
    addresses: list[int]
    grad_addresses: list[int]
    prepared: dict[Any, Any] = field(default_factory=dict)


class Backend(Protocol):
    """A module that computes the step of the parameters of one param group on one device.

    The optimizer calls ``step`` for whole parameters. For parts of sharded matrices it calls
    ``statistics`` and ``update``, and adds up the sums of all processes between them. For matrices
    whose gradients are freed during backward it calls ``fold`` for each gradient, and then
    ``step_folded``, or ``update`` for parts of sharded matrices.
    """

    @property
    def DEVICE_TYPES(self) -> tuple[str, ...]:  # noqa: N802
        """The ``torch.device.type`` of parameters that it steps; empty: any."""

    @property
    def CAPTURABLE(self) -> bool:  # noqa: N802
        """Whether it steps entries whose step only the device knows."""

    def statistics(self, entries: list[Entry], /) -> list[Sums | None]:
        """Sums the squares of the gradients: None for entries of fewer than two dimensions."""

    def update(
        self, entries: list[Entry], roots: list[Roots | None], settings: Settings, /
    ) -> None:
        """Updates parameters and momentum by the roots, and the second moments of vectors.

        The entries are the entries of the last call of ``statistics``. An entry without a gradient
        is updated by its stored momentum, which does not change.
        """

    def fold(
        self,
        entry: Entry,
        folded: Folded,
        settings: Settings,
        is_first: bool,
        coefficient: Tensor | None,
        /,
    ) -> None:
        """Adds the gradient of a matrix to its momentum, sums and sketch, and does not keep it.

        Args:
            entry: A matrix; ``step`` is the number of the next step.
            folded: The sums of the earlier gradients of this step; changed in place.
            settings: The param group's settings.
            is_first: Whether the gradient is the first of this step; the momentum then decays.
            coefficient: [] float32, a factor of the gradient; None: 1.
        """

    def step_folded(self, entries: list[Entry], sums: list[Sums], settings: Settings, /) -> None:
        """Does the step of whole matrices whose gradients were folded: stripes and update."""

    def step(self, entries: list[Entry], settings: Settings, known: Known | None = None, /) -> None:
        """Does the whole step: statistics, stripes and update.

        Args:
            entries: Whole parameters on one device.
            settings: The param group's settings.
            known: What is known of the entries, for ``step_known``; None: nothing.
        """

    def step_known(self, known: Known, steps: list[int], settings: Settings, /) -> bool:
        """Does the whole step of known entries, if an earlier ``step`` has prepared it.

        Args:
            known: What is known of the entries.
            steps: The number of this step for each entry.
            settings: The param group's settings.

        Returns:
            Whether it has done the step. False: it needs the entries.
        """


class Batch(NamedTuple):
    """The whole parameters of one param group on one device, and the backend that steps them."""

    backend: Backend
    settings: Settings
    entries: list[Entry]
