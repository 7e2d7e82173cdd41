"""The specification of StripedAdamW's step, in plain PyTorch on any device.

Every other backend must agree with this file. For a parameter p of shape [..., R, C] with gradient
g, at step t from 1, all in float32:

    m     <- b1 m   + (1 - b1) g
    row_i <- b2 row + (1 - b2) mean_j(g_ij^2)
    col_j <- b2 col + (1 - b2) mean_i(g_ij^2)
    a_i    = sqrt(row_i / mean(row))                  0 where mean(row) is 0
    c_j    = sqrt(col_j / (1 - b2^t))
    p     <- p (1 - lr wd) - lr (m_ij / (1 - b1^t)) / (a_i c_j + eps)

(a_i c_j)^2 is the rank-one second moment of Adafactor (Shazeer and Stern 2018,
https://arxiv.org/abs/1804.04235), bias-corrected as in Adam; the rest is AdamW (Loshchilov and
Hutter 2019, https://arxiv.org/abs/1711.05101). 0-D and 1-D parameters keep the exact second moment,
and their step is AdamW's.

With ``blocks=(br, bc)`` the matrix is taken as br x bc equal blocks with stripes of their own: row
is [..., R, bc], col is [..., br, C]. The code sees every matrix on its grid,
[..., br, R / br, bc, C / bc], where a stripe is an array with one dimension of size 1, so that
blocks need no arithmetic of their own.

With ``lagged`` the stripes in a_i and c_j are those of the step before (and c_j's correction
1 - b2^(t - 1)), so that one reading of the gradient serves both, as ADOPT does with its full second
moment (Taniguchi et al. 2024, https://arxiv.org/abs/2411.02853). They know nothing of this step's
gradient, and would divide by eps alone where a row, a column or a whole matrix (LoRA's A) gets its
first one. So a_i c_j is at least what this gradient alone adds to AdamW's root,

    |g_ij| sqrt((1 - b2) / (1 - b2^t))

and the first step, which has no step before, uses its own stripes.

A backend is two functions over a table, the tensors of one param group: ``statistics`` turns
gradients into sums of squares, ``update`` turns a_i and c_j into new parameters and momentum.
Between them stand the ``stripes``, and the only communication that sharded parameters need
(``sharding.py``). For parameters that are whole, ``step`` does all three, and may do them better
together.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from striped_hf.optim import momentum, rounding

# Elements worked on at a time: what bounds a step's temporaries (about seven float32 arrays of this
# size, never less than one row of a matrix). On a CPU they are to stay in the cache, elsewhere to
# keep the device busy.
CHUNK_SIZE = {"cpu": 1 << 16}
DEFAULT_CHUNK_SIZE = 1 << 20

# What an update changes of a state: the stripes are averaged before it.
_UPDATED: tuple[str, ...] = ("exp_avg", "exp_avg_scale", "exp_avg_sq")


@dataclass(frozen=True)
class Settings:
    """A param group's hyperparameters: ``StripedAdamW``'s arguments of the same names,
    ``stochastic_rounding`` resolved to a bool, ``eps`` above zero. ``lr`` is a tensor where the
    optimizer is capturable and its group has one on the device.
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
    """One row of a table: a parameter, its gradient and its state, all of which a step changes in
    place but the gradient.

    ``momentum_dtype`` is the format that this parameter's momentum has (``storage_format``),
    ``blocks`` its (br, bc), and ``step`` that of the update about to be made, from 1; 0 where only
    the device knows it, in ``state["step"]``: the optimizer is capturable.

    A part of a sharded parameter has the place in the whole that stochastic rounding counts
    elements by: the row-major index ``start`` of its first element, and ``pitch``, how many
    elements each of its rows begins after the one before (0: as many as its own columns).
    """

    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    momentum_dtype: str
    blocks: tuple[int, int]
    step: int
    start: int = 0
    pitch: int = 0


Sums = tuple[Tensor, Tensor]
Roots = tuple[Tensor, Tensor]
Index = tuple[int | slice, ...]


def step(table: list[Entry], settings: Settings) -> None:
    """Takes the step of parameters that are whole: ``statistics``, ``stripes`` and ``update``.

    Args:
        table: Parameters of any shape, none empty; gradients of any floating dtype.
        settings: Of the param group.
    """
    update(table, stripes(table, statistics(table), settings), settings)


def statistics(table: list[Entry]) -> list[Sums | None]:
    """Sums the squares of every gradient by row and by column.

    Args:
        table: Parameters of any shape, none empty; gradients of any floating dtype.

    Returns:
        For each matrix the row sums [..., R, bc] and the column sums [..., br, C], float32; None
        for parameters of fewer than two dimensions, which need none.
    """
    sums: list[Sums | None] = [None] * len(table)
    for batch in _batches(table):
        first = table[batch[0]]
        if first.param.dim() < 2:
            continue
        grad = _grid(_stack([table[i].grad for i in batch]), first.blocks)
        *matrices, rows, col_blocks, columns = grad.shape
        row_sums = grad.new_empty(*matrices, rows, col_blocks, 1, dtype=torch.float32)
        col_sums = grad.new_zeros(*matrices, 1, col_blocks, columns, dtype=torch.float32)
        for index, _ in _chunks(grad.shape[1:-2], col_blocks * columns, grad.device):
            squares = grad[index].float().square()
            row_sums[index] = squares.sum(-1, keepdim=True)
            col_sums[index[: len(matrices)]] += squares.sum(-3, keepdim=True)
        row_sums, col_sums = row_sums.squeeze(-1).flatten(-3, -2), col_sums.squeeze(-3).flatten(-2)
        for i, row_sum, col_sum in zip(batch, row_sums, col_sums, strict=True):
            sums[i] = row_sum, col_sum
    return sums


def stripes(table: list[Entry], sums: list[Sums | None], settings: Settings) -> list[Roots | None]:
    """Averages sums into the stripes of every entry, in place, and takes their roots.

    Args:
        table: What was given to ``statistics``, of parameters that are whole.
        sums: What it returned.
        settings: Of the param group.

    Returns:
        For each matrix a [..., R, bc] and c [..., br, C], float32, of the stripes that this step
        divides by; None for parameters of fewer than two dimensions.
    """
    roots: list[Roots | None] = [None] * len(table)
    for batch in _batches(table):
        entries = [table[i] for i in batch]
        first = entries[0]
        if first.param.dim() < 2:
            continue
        row, col = (
            _stack([entry.state[key] for entry in entries])
            for key in ("exp_avg_sq_row", "exp_avg_sq_col")
        )
        row_sums, col_sums = map(_stack, zip(*(sums[i] for i in batch), strict=True))  # type: ignore[misc]
        lagged = settings.lagged and first.step > 1
        if lagged:
            a, c = _roots(row, col, first, first.step - 1, settings)
        rows, columns = first.param.shape[-2:]
        for stripe, squares, count in (
            (row, row_sums, columns // first.blocks[1]),
            (col, col_sums, rows // first.blocks[0]),
        ):
            stripe.mul_(settings.beta2).add_(squares * ((1 - settings.beta2) / count))
        if not lagged:
            a, c = _roots(row, col, first, first.step, settings)
        for i, pair in zip(batch, zip(a, c, strict=True), strict=True):
            roots[i] = pair
        if len(batch) > 1:  # else the stacks are views of what they stack
            for key, values in (("exp_avg_sq_row", row), ("exp_avg_sq_col", col)):
                torch._foreach_copy_([entry.state[key] for entry in entries], list(values.unbind()))
    return roots


def _roots(
    row: Tensor, col: Tensor, entry: Entry, step: int, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Returns a and c of stacked stripes, [n, ..., R, bc] and [n, ..., br, C], of a step."""
    row = row.unflatten(-2, (entry.blocks[0], -1))
    a = sqrt(row / mean_divisor(row.mean(-2, keepdim=True))).flatten(-3, -2)
    # apart from a, because row * col underflows where g is near 1e-12
    return a, sqrt(col / (1 - settings.beta2**step))


def sqrt(x: Tensor) -> Tensor:
    """Returns the correctly rounded root of float32 values."""
    # torch's own may be off by one on a CPU, depending on where in the array a value stands: bits
    # would depend on how a parameter is sharded
    return x.double().sqrt_().float()


def mean_divisor(mean: Tensor) -> Tensor:
    """Returns what rows are divided by in place of their mean."""
    # 0/0 is an all-zero gradient, which moves nothing; an Inf must be as loud as AdamW's Inf/Inf
    divisor = torch.where(mean == 0, torch.inf, mean)
    return divisor.masked_fill_(mean.isinf(), torch.nan)


def update(table: list[Entry], roots: list[Roots | None], settings: Settings) -> None:
    """Updates momentum and parameter of every entry in place, and vectors' second moments.

    Args:
        table: What was given to ``statistics``.
        roots: What ``stripes`` returned, or what stands for it where a parameter is sharded.
        settings: Of the param group.
    """
    for batch in _batches(table):
        entries = [table[i] for i in batch]
        first = entries[0]  # what the whole batch shares
        keys = [key for key in _UPDATED if key in first.state]
        state = {key: _stack([entry.state[key] for entry in entries]) for key in keys}
        param = _stack([entry.param for entry in entries])
        grad = _stack([entry.grad for entry in entries])

        if first.param.dim() < 2:
            _update_vectors(param, grad, state, first, settings)
        else:
            a, c = map(_stack, zip(*(roots[i] for i in batch), strict=True))  # type: ignore[misc]
            _update_matrices(param, grad, state, a, c, first, settings)

        if len(batch) > 1:  # else the stacks are views of what they stack
            torch._foreach_copy_([entry.param for entry in entries], list(param.unbind()))
            for key, values in state.items():
                torch._foreach_copy_([entry.state[key] for entry in entries], list(values.unbind()))


def _update_vectors(
    param: Tensor, grad: Tensor, state: dict[str, Tensor], entry: Entry, settings: Settings
) -> None:
    """AdamW's step, with the exact second moment. All tensors are [n] or [n, length]."""
    beta1, beta2 = settings.beta1, settings.beta2
    bias_correction2_sqrt = (1 - beta2**entry.step) ** 0.5
    for index, start in _chunks(param.shape[1:], 1, param.device):
        g = _ascent(grad[index], settings)
        m = state["exp_avg"][index].lerp_(g, 1 - beta1)
        v = state["exp_avg_sq"][index].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = v.sqrt().div_(bias_correction2_sqrt)
        _update_parameter(param[index], m, g, denominator, start, entry, settings)


def _update_matrices(
    param: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    a: Tensor,
    c: Tensor,
    entry: Entry,
    settings: Settings,
) -> None:
    """The striped step. The tensors are n times what ``entry`` describes."""
    row_blocks, col_blocks = entry.blocks
    columns = param.shape[-1]
    param, grad = _grid(param, entry.blocks), _grid(grad, entry.blocks)
    # [n, ..., br, R / br, bc, 1] and [n, ..., br, 1, bc, C / bc]
    a = a.unflatten(-2, (row_blocks, -1)).unsqueeze(-1)
    c = c.unflatten(-1, (col_blocks, -1)).unsqueeze(-3)
    codes = state["exp_avg"].unflatten(-2, (row_blocks, -1))
    scale = state.get("exp_avg_scale")
    if scale is not None:
        scale = scale.unflatten(-2, (row_blocks, -1))
    lagged = settings.lagged and entry.step > 1
    own_share = ((1 - settings.beta2) / (1 - settings.beta2**entry.step)) ** 0.5

    for index, start in _chunks(param.shape[1:-2], columns, param.device):
        g = _ascent(grad[index], settings)
        stored, stored_scale = codes[index], scale[index] if scale is not None else None
        m = momentum.decode(stored, stored_scale, entry.momentum_dtype, columns)
        m_grid = m.unflatten(-1, (col_blocks, -1)).lerp_(g, 1 - settings.beta1)
        denominator = a[index] * c[index[: c.dim() - 3]]
        if lagged:
            denominator = torch.maximum(denominator, g.abs() * own_share)
        _update_parameter(param[index], m_grid, g, denominator, start, entry, settings)
        if m is not stored:
            new_codes, new_scale = momentum.encode(m, entry.momentum_dtype)
            stored.copy_(new_codes)
            if stored_scale is not None:
                stored_scale.copy_(new_scale)


def _update_parameter(
    param: Tensor,
    m: Tensor,
    g: Tensor,
    denominator: Tensor,
    start: int,
    entry: Entry,
    settings: Settings,
) -> None:
    """Decays and moves one chunk of a parameter.

    Args:
        param: [n, ...], the same chunk of n stacked parameters; changed in place.
        m: This step's momentum, float32.
        g: This step's gradient, float32.
        denominator: Root of the second moment, without eps; overwritten.
        start: Row-major index in ``entry``'s parameter of the chunk's first element.
        entry: What each of the n parameters is.
        settings: Of the param group.
    """
    if settings.nesterov:
        m = torch.lerp(m, g, 1 - settings.beta1)
    denominator.add_(settings.eps)
    value, lr = param.float(), float(settings.lr)
    value.mul_(1 - lr * settings.weight_decay)
    step_size = lr / (1 - settings.beta1**entry.step)
    value.addcdiv_(m, denominator, value=-step_size)
    if value is param:
        return
    if settings.stochastic_rounding:
        # stacked parameters share their bits: each counts its own elements
        bits = _random_bits(start, param.shape[1:], entry)
        value = rounding.stochastic_round(value, param.dtype, bits)
    param.copy_(value)


def _random_bits(start: int, shape: torch.Size, entry: Entry) -> Tensor:
    """Returns the bits of a chunk of ``entry``'s parameter from its element ``start`` on."""
    count, device = shape.numel(), entry.param.device
    columns = entry.param.shape[-1] if entry.param.dim() else 1
    if not entry.pitch or entry.pitch == columns:
        return rounding.random_bits(entry.start + start, count, entry.step, device).view(shape)
    first = entry.start + start // columns * entry.pitch
    rows = [
        rounding.random_bits(first + i * entry.pitch, columns, entry.step, device)
        for i in range(count // columns)
    ]
    return torch.stack(rows).view(shape)


def _ascent(grad: Tensor, settings: Settings) -> Tensor:
    """The gradient of what is minimised, float32; a view of ``grad`` where it is that already."""
    return -grad.float() if settings.maximize else grad.float()


def _grid(x: Tensor, blocks: tuple[int, int]) -> Tensor:
    """A view of [..., R, C] as [..., br, R / br, bc, C / bc]."""
    return x.unflatten(-1, (blocks[1], -1)).unflatten(-3, (blocks[0], -1))


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """[n, ...]: a view where n is 1, so that changes in place reach the tensor, else a copy."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tuple(tensors))


def _batches(table: list[Entry]) -> Iterator[list[int]]:
    """Yields the positions in ``table`` of the entries to stack: alike, and a chunk together."""
    alike = defaultdict(list)
    for i, entry in enumerate(table):
        p = entry.param
        kind = (p.dtype, entry.grad.dtype, *entry[3:])
        alike[p.shape, p.device, kind].append(i)
    for (shape, device, _), positions in alike.items():
        size = max(1, CHUNK_SIZE.get(device.type, DEFAULT_CHUNK_SIZE) // shape.numel())
        yield from (positions[i : i + size] for i in range(0, len(positions), size))


def _chunks(shape: torch.Size, unit: int, device: torch.device) -> Iterator[tuple[Index, int]]:
    """Cuts stacked arrays into chunks that are consecutive in row-major order.

    Args:
        shape: The dimensions of one array that may be cut.
        unit: Elements behind each position of ``shape``, never cut.
        device: Decides the size of a chunk, which is at least ``unit``.

    Yields:
        The chunk's index in [n, *shape], which keeps n whole, and the row-major position in
        elements of its start in each array.
    """
    limit = CHUNK_SIZE.get(device.type, DEFAULT_CHUNK_SIZE)

    def cut(shape: torch.Size, index: Index, start: int) -> Iterator[tuple[Index, int]]:
        if shape.numel() * unit <= limit or not shape:
            yield index, start
            return
        inner = shape[1:].numel() * unit
        if inner > limit and len(shape) > 1:
            for i in range(shape[0]):
                yield from cut(shape[1:], (*index, i), start + i * inner)
        else:
            size = max(1, limit // inner)
            for i in range(0, shape[0], size):
                yield (*index, slice(i, i + size)), start + i * inner

    return cut(shape, (slice(None),), 0)
