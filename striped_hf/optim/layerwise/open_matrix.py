"""A matrix between the first gradient of a step and the step."""

from dataclasses import replace

import torch
from torch import Tensor

from striped_hf.optim import momentum
from striped_hf.optim.backends import reference
from striped_hf.optim.backends.chunks import chunks
from striped_hf.optim.checks import problem_of_state
from striped_hf.optim.interface import Backend, Entry, Folded, Settings, State, Sums
from striped_hf.optim.plain import has_values, plain_gradient, plain_parameter
from striped_hf.optim.sharded.layout import Piece, is_sharded
from striped_hf.optim.sharded.step import local_gradient
from striped_hf.optim.state import Description

_MOMENTUM = ("exp_avg", "exp_avg_scale")


class OpenMatrix:
    """A matrix whose momentum already has gradients of the next step.

    For a sharded matrix it holds this process's part.

    Attributes:
        description: The parameter's description.
        momentum: ``exp_avg`` and perhaps ``exp_avg_scale``: the state's tensors, or for an int4
            momentum that gets several gradients an int8 copy.
        momentum_dtype: The format of ``momentum``.
        folded: The sums of the gradients.
        count: The number of folded gradients.
        coefficient: [] float32, the factor with which gradients are folded; None: 1.
    """

    def __init__(self, description: Description, state: State, accumulates: bool) -> None:
        """Creates the tensors that the first gradient needs.

        Args:
            description: The parameter's description.
            state: Its state.
            accumulates: Whether several gradients may come.
        """
        self.description = description
        self.momentum_dtype = description.momentum_dtype
        self.momentum = {key: _local(state[key]) for key in _MOMENTUM if key in state}
        self.count = 0
        self.coefficient: Tensor | None = None
        # re-encoding 4-bit codes for each gradient would add up to errors larger than the momentum
        if accumulates and self.momentum_dtype == "int4":
            self.momentum_dtype = "int8"
            self.momentum = recoded(self.momentum, "int4", "int8", description.shape[-1])
        row, col = _local(state["exp_avg_sq_row"]), _local(state["exp_avg_sq_col"])
        sketch = None
        if accumulates:
            columns = momentum.scale_columns(self.momentum["exp_avg"].shape[-1])
            sketch = row.new_zeros((*row.shape[:-1], columns))
        self.folded = Folded(torch.zeros_like(row), torch.zeros_like(col), sketch)

    @property
    def replaces_momentum(self) -> bool:
        """Whether the state should not have the momentum until ``close``."""
        return self._has_copy and self.description.layout is None

    @property
    def _has_copy(self) -> bool:
        return self.momentum_dtype != self.description.momentum_dtype

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces that backends step as one tensor each; for a plain matrix the whole."""
        if self.description.layout is None:
            return (Piece((), (), self.description.blocks, 0, 0),)
        return self.description.layout.pieces

    def fold(
        self,
        grad: Tensor,
        step: int,
        backend: Backend,
        settings: Settings,
        rows: slice | None = None,
    ) -> None:
        """Adds a gradient, or some rows of one. ``count`` is for the caller to change.

        Args:
            grad: The gradient, with the parameter's shape, or the gradient of ``rows``.
            step: The number of the next step.
            backend: The backend that computes.
            settings: The param group's settings.
            rows: Rows of a plain matrix without blocks; None: all rows of any matrix.
        """
        layout, pieces = self.description.layout, self.pieces
        local = plain_gradient(grad) if layout is None else local_gradient(grad, layout)
        if rows is not None:
            pieces = (Piece((rows,), (), (1, 1), rows.start * grad.shape[-1], 0),)
        for piece in pieces:
            part = local if rows is not None else local[piece.index]
            entry = Entry(
                param=part,  # only its shape counts
                grad=part,
                state=self._momentum_of(piece),
                momentum_dtype=self.momentum_dtype,
                blocks=piece.blocks,
                step=step,
                whole_start=piece.whole_start,
                whole_stride=piece.whole_stride,
            )
            folded = self._folded_of(piece)
            backend.fold(entry, folded, settings, self.count == 0, self.coefficient)

    def square_norm(self) -> Tensor:
        """Returns the square of the norm of the sum of the gradients before clipping: [] float32.

        For several gradients it is an estimate. For a sharded matrix it is this process's part.
        """
        if self.count == 1:
            square = self.folded.row_sums.sum()
        else:
            assert self.folded.sketch is not None
            square = self.folded.sketch.square().sum()
        return square if self.coefficient is None else square / self.coefficient.square()

    def multiply(self, factor: Tensor) -> None:
        """Multiplies the momentum and the gradients in the sums.

        Args:
            factor: [] float32.
        """
        if factor.device.type == "cpu" and has_values(factor) and factor == 1:
            return
        self.momentum.get("exp_avg_scale", self.momentum["exp_avg"]).mul_(factor)
        self.folded.row_sums.mul_(factor.square())
        self.folded.col_sums.mul_(factor.square())
        if self.folded.sketch is not None:
            self.folded.sketch.mul_(factor)

    def sums(self) -> Sums:
        """Returns the sums of squares of the sum of the added gradients, shaped as the stripes.

        For several gradients they are an estimate, made for each piece alone.
        """
        if self.count == 1:
            return self.folded.row_sums, self.folded.col_sums
        row_sums, col_sums = (torch.zeros_like(sums) for sums in self.folded[:2])
        for piece in self.pieces:
            row_sums[piece.index], col_sums[piece.col_index] = reference.whole_sums(
                self._folded_of(piece), piece.blocks, self.count
            )
        return row_sums, col_sums

    def entries(self, entries: list[Entry]) -> list[Entry]:
        """Returns entries, one for each piece, with the momentum that includes the gradients."""
        return [
            entry._replace(
                state={**entry.state, **self._momentum_of(piece)},
                momentum_dtype=self.momentum_dtype,
            )
            for piece, entry in zip(self.pieces, entries, strict=True)
        ]

    @property
    def needs_exchange(self) -> bool:
        """Whether its stripes need the sums of other processes."""
        layout = self.description.layout
        return layout is not None and layout.needs_exchange

    def whole(
        self, param: Tensor, state: State, step: int
    ) -> tuple[list[Entry], list[tuple[Tensor, Tensor]]]:
        """Returns the entry by which a backend steps a matrix that is not sharded.

        Args:
            param: The parameter.
            state: Its state.
            step: The number of the step.

        Returns:
            An entry. If no kernel can step the parameter, also the parameter and the copy that is
            stepped in its place.
        """
        plain = plain_parameter(param)
        rest = {key: state[key] for key in self.description.keys if key not in _MOMENTUM}
        entry = Entry(plain, None, rest, self.momentum_dtype, self.description.blocks, step)
        return self.entries([entry]), [] if plain is param else [(param, plain)]

    def problem_of_state(self, param: Tensor, state: State) -> str | None:
        """Explains why the parameter cannot be stepped by its state and its momentum; None: it can.

        Args:
            param: The parameter.
            state: Its state.
        """
        description = self.description
        if self.replaces_momentum:
            state = {**state, **self.momentum}
            description = replace(description, momentum_dtype=self.momentum_dtype)
        return problem_of_state(param, state, description)

    def close(self, state: State) -> None:
        """Stores the momentum in the state if it was kept in another format."""
        if not self._has_copy:
            return
        stored, columns = self.description.momentum_dtype, self.momentum["exp_avg"].shape[-1]
        for key, value in recoded(self.momentum, self.momentum_dtype, stored, columns).items():
            if key in state:
                _local(state[key]).copy_(value)
            else:
                state[key] = value
        # frees the copy before the next matrix needs memory
        self.momentum_dtype = stored
        self.momentum = {key: _local(state[key]) for key in _MOMENTUM}

    def _momentum_of(self, piece: Piece) -> State:
        return {key: value[piece.index] for key, value in self.momentum.items()}

    def _folded_of(self, piece: Piece) -> Folded:
        row_sums, col_sums, sketch = self.folded
        return Folded(
            row_sums[piece.index],
            col_sums[piece.col_index],
            None if sketch is None else sketch[piece.index],
        )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if is_sharded(tensor) else tensor


def recoded(of_state: State, before: str, after: str, columns: int) -> State:
    """Converts a momentum to another integer format.

    Args:
        of_state: ``exp_avg`` and ``exp_avg_scale``.
        before: Their format.
        after: The format of the result.
        columns: The number of the momentum's columns.
    """
    codes, scale = of_state["exp_avg"], of_state["exp_avg_scale"]
    shape = torch.Size((*codes.shape[:-1], columns))
    new = momentum.init(shape, after, codes.device)
    rows = shape[:-1]
    new_codes, new_scale = new["exp_avg"].unsqueeze(0), new["exp_avg_scale"].unsqueeze(0)
    for index, _ in chunks(rows, columns, codes.device):
        part = codes.unsqueeze(0)[index], scale.unsqueeze(0)[index]
        values = momentum.decode(*part, before, columns)
        encoded, scales = momentum.encode(values, after)
        assert scales is not None
        new_codes[index] = encoded
        new_scale[index] = scales
    return new
