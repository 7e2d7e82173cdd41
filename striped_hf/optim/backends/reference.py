"""The specification of StripedAdamW's step, in plain PyTorch on any device.

Every other backend must agree with this file. For a parameter p of shape [..., R, C] with gradient
g, at step t from 1, all in float32:

    m     <- b1 m   + (1 - b1) g
    row_i <- b2 row + (1 - b2) mean_j(g_ij^2)
    col_j <- b2 col + (1 - b2) mean_i(g_ij^2)
    a_i    = sqrt(row_i / mean(row))                  0 if mean(row) is 0
    c_j    = sqrt(col_j / (1 - b2^t))
    d_ij   = max(a_i c_j, sqrt(u_t) |m_ij|)
    p     <- p (1 - lr wd) - lr (m_ij / (1 - b1^t)) / (d_ij + eps)

(a_i c_j)^2 is the rank-one second moment of Adafactor (Shazeer and Stern 2018,
https://arxiv.org/abs/1804.04235), with Adam's bias correction. The rest is AdamW (Loshchilov and
Hutter 2019, https://arxiv.org/abs/1711.05101). 0-D and 1-D parameters keep the exact second moment,
and their step is AdamW's.

a_i c_j alone would bound no update: it may be far below AdamW's root. By the Cauchy-Schwarz
inequality AdamW's root is at least sqrt(u_t) |m_ij| (docs/algorithm.md), and so is d_ij:

    u_t = (1 - b2) / (1 - b2^t) / ((1 - b1)^2 S_t)    S_t = sum_{k < t} r^k,  r = b1^2 / b2

With ``nesterov`` m~ = b1 m + (1 - b1) g replaces m in the update and in d_ij. In u_t
(1 + b1)^2 + b1^2 (S_t - 1) then replaces S_t. m is the momentum of this step before it is coded.

With ``blocks=(br, bc)`` a matrix consists of br x bc equal blocks, and each block has its own
stripes: row is [..., R, bc], and col is [..., br, C]. The code views every matrix as
[..., br, R / br, bc, C / bc]. A stripe is then an array in which one dimension has size 1, and
blocks need no arithmetic of their own.

With ``lagged`` a_i and c_j use the stripes of the step before, and c_j the correction
1 - b2^(t - 1). One read of the gradient then serves both stripes and update, as in ADOPT, which has
a full second moment (Taniguchi et al. 2024, https://arxiv.org/abs/2411.02853). These stripes do not
include this step's gradient. If a row, a column or a whole matrix (LoRA's A) gets its first
gradient, d_ij is sqrt(u_t) |m_ij|. The first step has no step before it and uses its own stripes.

``interface.Backend`` lists the functions of a backend, over the parameters of one param group.
The main ones are ``statistics``, which turns gradients into sums of squares, and ``update``, which
turns a_i and c_j into new parameters and momentum. Between them are ``stripes`` and the only
communication that sharded parameters need (``sharded/step.py``).
For whole parameters ``step`` does all three, and a faster backend may fuse them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from striped_hf.optim import momentum, rounding
from striped_hf.optim.backends.chunks import batches, chunks, stack, unstack
from striped_hf.optim.interface import (
    LOW_BITS,
    Blocks,
    Entry,
    Folded,
    Known,
    Roots,
    Settings,
    State,
    Sums,
)

DEVICE_TYPES: tuple[str, ...] = ()  # any
CAPTURABLE = False

# the tensors of a state that an update changes; the stripes are averaged before the update
_UPDATED = ("exp_avg", "exp_avg_scale", "exp_avg_sq", LOW_BITS)


def step(entries: list[Entry], settings: Settings, known: Known | None = None) -> None:
    """Performs the step of whole parameters: ``statistics``, ``stripes`` and ``update``.

    Args:
        entries: The entries of one param group.
        settings: The param group's settings.
        known: Not used.
    """
    update(entries, stripes(entries, statistics(entries), settings), settings)


def step_known(known: Known, steps: list[int], settings: Settings) -> bool:
    """Does nothing; this backend needs the entries."""
    return False


# -------------------------------------------------------------------------------------------------
# sums of squares
# -------------------------------------------------------------------------------------------------


def statistics(entries: list[Entry]) -> list[Sums | None]:
    """Sums the squares of every gradient by row and by column.

    Returns:
        For each matrix the row sums [..., R, bc] and the column sums [..., br, C], float32; None
        for parameters of fewer than two dimensions, which need none.
    """
    sums: list[Sums | None] = [None] * len(entries)
    for batch in batches(entries):
        first = entries[batch[0]]
        if first.param.dim() < 2:
            continue
        grad = _grid(stack([entries[i].gradient for i in batch]), first.blocks)
        *matrices, rows, column_blocks, columns = grad.shape
        row_sums = grad.new_empty(*matrices, rows, column_blocks, 1, dtype=torch.float32)
        col_sums = grad.new_zeros(*matrices, 1, column_blocks, columns, dtype=torch.float32)
        for index, _ in chunks(grad.shape[1:-2], column_blocks * columns, grad.device):
            squares = grad[index].float().square()
            row_sums[index] = squares.sum(-1, keepdim=True)
            col_sums[index[: len(matrices)]] += squares.sum(-3, keepdim=True)
        row_sums, col_sums = row_sums.squeeze(-1).flatten(-3, -2), col_sums.squeeze(-3).flatten(-2)
        for i, row_sum, col_sum in zip(batch, row_sums, col_sums, strict=True):
            sums[i] = row_sum, col_sum
    return sums


# -------------------------------------------------------------------------------------------------
# stripes
# -------------------------------------------------------------------------------------------------


def stripes(
    entries: list[Entry], sums: Sequence[Sums | None], settings: Settings
) -> list[Roots | None]:
    """Averages sums into the stripes of every entry, in place, and computes their roots.

    Args:
        entries: The argument of ``statistics``; whole parameters.
        sums: The result of ``statistics``.
        settings: The param group's settings.

    Returns:
        For each matrix the roots a [..., R, bc] and c [..., br, C], float32, of the stripes that
        this step divides by; None for parameters of fewer than two dimensions.
    """
    roots: list[Roots | None] = [None] * len(entries)
    for batch in batches(entries):
        first = entries[batch[0]]
        if first.param.dim() < 2:
            continue
        rows = [entries[i].state["exp_avg_sq_row"] for i in batch]
        cols = [entries[i].state["exp_avg_sq_col"] for i in batch]
        row, col = stack(rows), stack(cols)
        row_sums, col_sums = map(stack, zip(*(sums[i] for i in batch), strict=True))  # type: ignore[misc]
        is_lagged = settings.lagged and first.step > 1
        if is_lagged:
            a, c = _row_and_column_roots(row, col, first.blocks, first.step - 1, settings)
        height = first.param.shape[-2] // first.blocks[0]
        width = first.param.shape[-1] // first.blocks[1]
        average([row, col], [row_sums, col_sums], [width, height], 2 * [settings.beta2])
        if not is_lagged:
            a, c = _row_and_column_roots(row, col, first.blocks, first.step, settings)
        for i, pair in zip(batch, zip(a, c, strict=True), strict=True):
            roots[i] = pair
        unstack(rows, row)
        unstack(cols, col)
    return roots


def average(
    stripes: list[Tensor], sums: list[Tensor], counts: list[int], beta2s: list[float]
) -> None:
    """Averages sums of squares into stripes, in place: row <- b2 row + (1 - b2) mean(g^2).

    Args:
        stripes: float32, of any shapes.
        sums: Sums of squares, of the stripes' shapes.
        counts: For each stripe, the number of squares in each of its sums.
        beta2s: For each stripe, b2.
    """
    torch._foreach_mul_(stripes, beta2s)
    weights = [(1 - beta2) / count for beta2, count in zip(beta2s, counts, strict=True)]
    torch._foreach_add_(stripes, torch._foreach_mul(sums, weights))


def roots_of(stripes: list[Tensor], divisors: list[Tensor] | list[float]) -> list[Tensor]:
    """Returns a or c of each stripe: sqrt(stripe / divisor).

    Args:
        stripes: float32, of any shapes.
        divisors: ``row_divisor(mean(row))`` for a, and 1 - b2^t for c.
    """
    if not stripes:
        return []
    quotients = torch._foreach_div(stripes, divisors)  # type: ignore[arg-type]
    flat = sqrt(torch.cat([quotient.flatten() for quotient in quotients]))
    parts = flat.split([stripe.numel() for stripe in stripes])
    return [part.view(stripe.shape) for part, stripe in zip(parts, stripes, strict=True)]


def row_divisor(mean: Tensor) -> Tensor:
    """Returns the divisor of a row stripe with this mean."""
    # 0/0 is an all-zero gradient, which moves nothing; an Inf must give NaN, like AdamW's Inf/Inf
    divisor = torch.where(mean == 0, torch.inf, mean)
    return divisor.masked_fill_(mean.isinf(), torch.nan)


def sqrt(x: Tensor) -> Tensor:
    """Returns the correctly rounded square root of float32 values."""
    # On a CPU the last bit of torch's own root depends on the element's place in the array. So the
    # bits would depend on the sharding of a parameter.
    return x.double().sqrt_().float()


def _row_and_column_roots(
    row: Tensor, col: Tensor, blocks: Blocks, step: int, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Returns a and c of stacked stripes, [n, ..., R, bc] and [n, ..., br, C], at a step."""
    row = row.unflatten(-2, (blocks[0], -1))
    (a,) = roots_of([row], [row_divisor(row.mean(-2, keepdim=True))])
    # two separate roots: row * col underflows if g is near 1e-12
    (c,) = roots_of([col], [1 - settings.beta2**step])
    return a.flatten(-3, -2), c


# -------------------------------------------------------------------------------------------------
# update
# -------------------------------------------------------------------------------------------------


def update(entries: list[Entry], roots: list[Roots | None], settings: Settings) -> None:
    """Updates parameters and momentum in place, and the second moments of vectors.

    Args:
        entries: The argument of ``statistics``.
        roots: The result of ``stripes``, or the roots of a sharded parameter.
        settings: The param group's settings.
    """
    for batch in batches(entries):
        first = entries[batch[0]]  # the batch has its shapes, dtypes, blocks and step
        keys = [key for key in _UPDATED if key in first.state]
        params = [entries[i].param for i in batch]
        states = {key: [entries[i].state[key] for i in batch] for key in keys}
        param = stack(params)
        grad = None if first.grad is None else stack([entries[i].gradient for i in batch])
        state = {key: stack(tensors) for key, tensors in states.items()}
        if first.param.dim() < 2:
            assert grad is not None  # the gradients of vectors are not folded
            _update_vectors(param, grad, state, first, settings)
        else:
            a, c = map(stack, zip(*(roots[i] for i in batch), strict=True))  # type: ignore[misc]
            _update_matrices(param, grad, state, (a, c), first, settings)
        unstack(params, param)
        for key, tensors in states.items():
            unstack(tensors, state[key])


def _update_vectors(
    param: Tensor, grad: Tensor, state: State, entry: Entry, settings: Settings
) -> None:
    """Performs AdamW's step, with the exact second moment. Tensors are [n] or [n, length]."""
    beta1, beta2 = settings.beta1, settings.beta2
    bias_correction2_sqrt = (1 - beta2**entry.step) ** 0.5
    for index, start in chunks(param.shape[1:], 1, param.device):
        g = _gradient(grad[index], settings)
        m = state["exp_avg"][index].lerp_(g, 1 - beta1)
        v = state["exp_avg_sq"][index].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = v.sqrt().div_(bias_correction2_sqrt)
        low = state[LOW_BITS][index] if LOW_BITS in state else None
        numerator = _numerator(m, g, settings)
        _update_parameter(param[index], numerator, root, start, entry, settings, low)


def _update_matrices(
    param: Tensor,
    grad: Tensor | None,
    state: State,
    roots: Roots,
    entry: Entry,
    settings: Settings,
) -> None:
    """Performs the striped step on stacks of n tensors, which ``entry`` describes.

    Without ``grad`` the momentum has this step's gradients already, and does not change.
    """
    row_blocks, column_blocks = entry.blocks
    columns = param.shape[-1]
    param = _grid(param, entry.blocks)
    low = _grid(state[LOW_BITS], entry.blocks) if LOW_BITS in state else None
    grad = None if grad is None else _grid(grad, entry.blocks)
    # [n, ..., br, R / br, bc, 1] and [n, ..., br, 1, bc, C / bc]
    a = roots[0].unflatten(-2, (row_blocks, -1)).unsqueeze(-1)
    c = roots[1].unflatten(-1, (column_blocks, -1)).unsqueeze(-3)
    codes = state["exp_avg"].unflatten(-2, (row_blocks, -1))
    scale = state.get("exp_avg_scale")
    if scale is not None:
        scale = scale.unflatten(-2, (row_blocks, -1))
    floor = momentum_floor(entry.step, settings)

    for index, start in chunks(param.shape[1:-2], columns, param.device):
        stored, stored_scale = codes[index], scale[index] if scale is not None else None
        m = momentum.decode(stored, stored_scale, entry.momentum_dtype, columns)
        numerator = m.unflatten(-1, (column_blocks, -1))
        if grad is not None:
            g = _gradient(grad[index], settings)
            numerator = _numerator(numerator.lerp_(g, 1 - settings.beta1), g, settings)
        root = a[index] * c[index[: c.dim() - 3]]
        torch.maximum(root, numerator.abs().mul_(floor), out=root)  # NaN stays NaN
        part = low[index] if low is not None else None
        _update_parameter(param[index], numerator, root, start, entry, settings, part)
        if grad is not None:
            _store_momentum(m, stored, stored_scale, entry)


def _store_momentum(m: Tensor, stored: Tensor, stored_scale: Tensor | None, entry: Entry) -> None:
    """Encodes a momentum [..., C] into its place in the state, unless it is already there."""
    if m is stored:
        return
    codes, scale = momentum.encode(m, entry.momentum_dtype)
    stored.copy_(codes)
    if stored_scale is not None and scale is not None:
        stored_scale.copy_(scale)


def momentum_floor(step: int, settings: Settings) -> float:
    """Returns sqrt(u_t): AdamW's root is at least this times |m_ij|, or Nesterov's |m~_ij|.

    It is finite for all betas and steps. For b2 = 0 and b1 > 0 it is 0 from the second step on.
    """
    beta1, beta2 = settings.beta1, settings.beta2
    inverse_sum = 1.0  # 1 / S_t
    if step > 1 and beta1 > 0:
        log_r = 2 * math.log(beta1) - (math.log(beta2) if beta2 > 0 else -math.inf)
        x = abs(log_r)  # neither overflows for r > 1 nor cancels near r = 1
        inverse_sum = math.expm1(-x) / math.expm1(-step * x) if x > 0 else 1 / step
        inverse_sum *= math.exp((1 - step) * max(log_r, 0.0))
    if settings.nesterov:
        inverse_sum /= (1 + beta1) ** 2 * inverse_sum + beta1**2 * (1 - inverse_sum)
    return ((1 - beta2) / (1 - beta2**step) * inverse_sum) ** 0.5 / (1 - beta1)


def _numerator(m: Tensor, g: Tensor, settings: Settings) -> Tensor:
    """Returns the momentum m, or Nesterov's m~."""
    return torch.lerp(m, g, 1 - settings.beta1) if settings.nesterov else m


def _update_parameter(
    param: Tensor,
    numerator: Tensor,
    root: Tensor,
    start: int,
    entry: Entry,
    settings: Settings,
    low: Tensor | None = None,
) -> None:
    """Decays and updates one chunk of stacked parameters.

    Args:
        param: [n, ...], the same chunk of n parameters; changed in place.
        numerator: The numerator of the update, without bias correction, float32.
        root: The root of the second moment, without eps; overwritten.
        start: The row-major index of the chunk's first element in ``entry``'s parameter.
        entry: A description of each of the n parameters.
        settings: The param group's settings.
        low: int32 or int8, the bits of the values that ``param`` in bfloat16 lacks; changed in
            place. int8: those after them are rounded away. None: rounded to ``param``'s dtype.
    """
    denominator = root.add_(settings.eps)
    value = param.float() if low is None else rounding.join(param, low)
    lr = float(settings.lr)
    value.mul_(1 - lr * settings.weight_decay)
    step_size = lr / (1 - settings.beta1**entry.step)
    value.addcdiv_(numerator, denominator, value=-step_size)
    if value is param:
        return
    is_rounded = low is None or low.dtype == torch.int8
    bits = None
    if is_rounded and settings.stochastic_rounding:
        # stacked parameters use the same bits: each counts its own elements
        bits = _random_bits(start, param.shape[1:], entry)
    if low is not None:
        if is_rounded:
            value = rounding.round_to_24_bits(value, bits)
        value, new_low = rounding.split(value, low.dtype)
        low.copy_(new_low)
    elif bits is not None:
        value = rounding.stochastic_round(value, param.dtype, bits)
    param.copy_(value)


def _random_bits(start: int, shape: torch.Size, entry: Entry) -> Tensor:
    """Returns the random bits of a chunk of ``entry``'s parameter, from element ``start`` on."""
    count, device = shape.numel(), entry.param.device
    columns = entry.param.shape[-1] if entry.param.dim() else 1
    if not entry.whole_stride or entry.whole_stride == columns:
        first = entry.whole_start + start
        return rounding.random_bits(first, count, entry.step, device).view(shape)
    first = entry.whole_start + start // columns * entry.whole_stride
    rows = [
        rounding.random_bits(first + i * entry.whole_stride, columns, entry.step, device)
        for i in range(count // columns)
    ]
    return torch.stack(rows).view(shape)


# -------------------------------------------------------------------------------------------------
# folding
# -------------------------------------------------------------------------------------------------


def fold(
    entry: Entry, folded: Folded, settings: Settings, is_first: bool, coefficient: Tensor | None
) -> None:
    """Adds a gradient to the momentum, sums and sketch; as ``interface.Backend.fold``.

    k is the coefficient. The random signs s_ij, each 1 or -1, are the same for all gradients of a
    step:

        m        <- b1 m + (1 - b1) k g         the first gradient of a step
        m        <- m + (1 - b1) k g            the others
        row_sum  <- row_sum + sum_j (k g_ij)^2
        col_sum  <- col_sum + sum_i (k g_ij)^2
        y_iq     <- y_iq + sum_j s_ij k g_ij    over the columns j of block q of 128 columns

    Squares of gradients do not add up to the square of their sum S, but y is linear in them, and
    the expectation of y_iq^2 is the sum of S_ij^2 over block q (Alon, Matias and Szegedy 1996,
    "The space complexity of approximating the frequency moments"). ``whole_sums`` uses it.
    """
    (sums,) = statistics([entry])
    assert sums is not None
    square = 1 if coefficient is None else coefficient.square()
    folded.row_sums.add_(sums[0] * square)
    folded.col_sums.add_(sums[1] * square)
    row_blocks, column_blocks = entry.blocks
    columns = entry.param.shape[-1]
    grad = _grid(entry.gradient.unsqueeze(0), entry.blocks)
    codes = entry.state["exp_avg"].unsqueeze(0).unflatten(-2, (row_blocks, -1))
    scale = entry.state.get("exp_avg_scale")
    if scale is not None:
        scale = scale.unsqueeze(0).unflatten(-2, (row_blocks, -1))
    sketch = folded.sketch
    if sketch is not None:
        sketch = sketch.unsqueeze(0).unflatten(-2, (row_blocks, -1))
    for index, start in chunks(grad.shape[1:-2], columns, grad.device):
        g = _gradient(grad[index], settings)
        if coefficient is not None:
            g = g * coefficient
        stored, stored_scale = codes[index], scale[index] if scale is not None else None
        m = momentum.decode(stored, stored_scale, entry.momentum_dtype, columns)
        m_grid = m.unflatten(-1, (column_blocks, -1))
        if is_first:
            m_grid.lerp_(g, 1 - settings.beta1)
        else:
            m_grid.add_(g, alpha=1 - settings.beta1)
        _store_momentum(m, stored, stored_scale, entry)
        if sketch is not None:
            bits = _random_bits(start, g.shape[1:], entry)
            signed = torch.where(bits < 0, -g, g).flatten(-2)
            sketch[index] += momentum.in_blocks(signed).sum(-1)


def step_folded(entries: list[Entry], sums: list[Sums], settings: Settings) -> None:
    """Performs the step of whole matrices whose gradients were folded: ``stripes``, ``update``.

    Args:
        entries: The entries of one param group, without gradients.
        sums: For each entry the sums of squares of the sum of its gradients.
        settings: The param group's settings.
    """
    update(entries, stripes(entries, sums, settings), settings)


def whole_sums(folded: Folded, blocks: Blocks, count: int) -> Sums:
    """Returns the sums of squares of the sum of the folded gradients, by row and by column.

    For more than one gradient they are estimates from the sketch y and the sums of the gradients'
    squares, in each block of the matrix alone. For row i, sum_q y_iq^2 has no bias. Its noise
    averages out in the row stripe. A block of 128 columns counts for the block of the matrix in
    which it begins. The sums by column are the sums of the gradients' squares, multiplied by the
    ratio of the rows' estimates to the rows' sums.

    Args:
        folded: The sums of the gradients of a step.
        blocks: (br, bc).
        count: The number of gradients.
    """
    row_sums, col_sums = folded.row_sums, folded.col_sums
    if count == 1:
        return row_sums, col_sums
    assert folded.sketch is not None
    squares, given = folded.sketch.square(), row_sums
    columns, widths = col_sums.shape[-1], squares.shape[-1]
    if columns < blocks[1] * momentum.BLOCK_SIZE:  # no block of columns begins in some blocks
        squares, given = squares.sum(-1, keepdim=True), row_sums.sum(-1, keepdim=True)
    else:
        begins = torch.arange(widths, device=squares.device) * momentum.BLOCK_SIZE
        block = begins * blocks[1] // columns
        squares = torch.zeros_like(row_sums).index_add_(-1, block, squares)
    by_row = _ratio(squares, given, count * momentum.BLOCK_SIZE)
    of_block, given_of_block = (
        each.unflatten(-2, (blocks[0], -1)).sum(-2) for each in (squares, given)
    )
    by_block = _ratio(of_block, given_of_block, count)
    cols = col_sums.unflatten(-1, (blocks[1], -1)) * by_block.unsqueeze(-1)
    return row_sums * by_row, cols.flatten(-2)


def _ratio(squares: Tensor, given: Tensor, largest: int) -> Tensor:
    """Divides squares of a sum by the sum of squares; the result is bounded by Cauchy-Schwarz."""
    ratio = squares / given
    # 0/0 belongs to zeros
    return torch.where(ratio > largest, largest, ratio).nan_to_num(nan=1.0)


def _gradient(grad: Tensor, settings: Settings) -> Tensor:
    """Returns the minimized objective's gradient, float32; a view of ``grad`` if it is float32."""
    return -grad.float() if settings.maximize else grad.float()


def _grid(x: Tensor, blocks: Blocks) -> Tensor:
    """Views [..., R, C] as [..., br, R / br, bc, C / bc]."""
    return x.unflatten(-1, (blocks[1], -1)).unflatten(-3, (blocks[0], -1))
