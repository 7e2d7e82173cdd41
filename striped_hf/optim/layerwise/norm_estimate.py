"""Estimates the norm of all gradients of a step from the first ones."""

from collections.abc import Iterable

import torch
from torch import Tensor

from striped_hf.optim.interface import State


class NormEstimate:
    """An estimate of the norm of a step's gradients while they come.

    The second moments say which share of the square of the norm to expect from each matrix. So the
    estimate is

        sqrt(sum of |G|^2 over the matrices so far * E / sum of E_k over the matrices so far)

    E_k is the expected square of matrix k, the sum of its second moment; E is the sum over all
    matrices. A common factor of all E_k, such as earlier clipping, cancels.

    It counts plain matrices only: of a sharded one each process would know another part.
    """

    def __init__(self, matrices: Iterable[tuple[Tensor, State, float]]) -> None:
        """Sums the second moments.

        Args:
            matrices: Each parameter with its state and the sum 1 - b2^t of its averages' weights.
        """
        rows: dict[torch.device, list[Tensor]] = {}
        scales: dict[torch.device, list[float]] = {}
        params: dict[torch.device, list[Tensor]] = {}
        for param, state, weights in matrices:
            row = state["exp_avg_sq_row"]  # [..., R, bc], means over C / bc columns
            rows.setdefault(row.device, []).append(row)
            scales.setdefault(row.device, []).append(param.shape[-1] / row.shape[-1] / weights)
            params.setdefault(row.device, []).append(param)
        self._expected: dict[Tensor, Tensor] = {}
        self._total: Tensor | None = None
        for device, some in rows.items():
            squares = torch._foreach_mul(torch._foreach_norm(some, 1), scales[device])
            self._expected |= zip(params[device], squares, strict=True)
            total = torch.stack(squares).sum()
            self._total = (
                total if self._total is None else self._total + total.to(self._total.device)
            )
        self._seen: tuple[Tensor, Tensor] | None = None  # squares and expected squares

    def norm(self) -> Tensor | None:
        """Returns the estimate, [] float32; None before the first gradient."""
        return None if self._seen is None else self._estimate(*self._seen)

    def add(self, param: Tensor, square: Tensor) -> None:
        """Adds the square of the norm of a matrix's gradient.

        Args:
            param: The matrix. One that had no state counts for nothing.
            square: [] float32, before clipping.
        """
        expected = self._expected.get(param)
        if expected is not None:
            seen = (square, expected)
            self._seen = seen if self._seen is None else _sum(self._seen, seen)

    def norm_by(
        self, param: Tensor, state: State, rows: slice | None, grad: Tensor
    ) -> Tensor | None:
        """Returns the estimate by one gradient alone, [] float32; None: it cannot be made.

        Args:
            param: The matrix.
            state: Its state.
            rows: The rows of the matrix that ``grad`` has; None: all.
            grad: Its gradient, before it is folded.
        """
        expected = self._expected.get(param)
        if expected is None:
            return None
        if rows is not None:
            row = state["exp_avg_sq_row"]
            expected = expected * (row[rows].sum() / row.sum())
        return self._estimate(
            torch.linalg.vector_norm(grad, dtype=torch.float32).square(), expected
        )

    def _estimate(self, square: Tensor, expected: Tensor) -> Tensor:
        assert self._total is not None
        return (square * (self._total.to(square.device) / expected)).sqrt()


def _sum(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    device = first[0].device
    return first[0] + second[0].to(device), first[1] + second[1].to(device)
