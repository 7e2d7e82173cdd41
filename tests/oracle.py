"""The striped update a second time: float64 NumPy, written as the equations read.

The tests compare the optimizer with it. It shares no code with the package, and knows nothing of
storage formats, chunks or batches. Its loops are written to be read, not to be fast.

For a parameter of shape [..., R, C] with gradient g at step t (counted from 1)::

    m     <- b1 m   + (1 - b1) g
    row   <- b2 row + (1 - b2) mean_C(g^2)
    col   <- b2 col + (1 - b2) mean_R(g^2)
    a_i   =  sqrt(row_i / mean(row))
    c_j   =  sqrt(col_j / (1 - b2^t))
    d_ij  =  max(a_i c_j, sqrt(u_t) |m_ij|)
    p     <- p (1 - lr wd) - lr (m_ij / (1 - b1^t)) / (d_ij + eps)

block by block where the matrix is split; 0-D and 1-D parameters keep the full second moment v.

u_t is the least v_ij / (1 - b2^t) that AdamW can have where its momentum is 1 (``u``). Nesterov's
b1 m + (1 - b1) g replaces m in the update, in d_ij and in u_t.

Lagged, from the second step on, a_i and c_j are taken before row and col are updated (with b2^(t-1)
in c_j).
"""

from __future__ import annotations

import numpy as np

# a zero gradient with eps = 0 is no step, not 0/0: the denominator never falls below this
SMALLEST_DENOMINATOR = float(np.finfo(np.float32).tiny)

State = dict[str, np.ndarray]


def new_state(shape: tuple[int, ...], blocks: tuple[int, int] = (1, 1)) -> State:
    """The state before the first step, zeros: m, and v or row [..., R, bc] and col [..., br, C]."""
    if len(shape) < 2:
        return {"m": np.zeros(shape), "v": np.zeros(shape)}
    *batch, R, C = shape
    br, bc = blocks
    return {
        "m": np.zeros(shape),
        "row": np.zeros((*batch, R, bc)),
        "col": np.zeros((*batch, br, C)),
    }


def step(
    p: np.ndarray,
    g: np.ndarray,
    state: State,
    t: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    nesterov: bool = False,
    lagged: bool = False,
    blocks: tuple[int, int] = (1, 1),
    stored: np.ndarray | None = None,
) -> tuple[np.ndarray, State]:
    """One step. Nothing is changed in place; returns the new parameter and the new state.

    ``stored`` is the new momentum as it is stored, for an update that reads it from there.
    """
    lr = float(lr)
    p = np.asarray(p, dtype=np.float64)
    numerator, denominator, new = fraction(
        g,
        state,
        t,
        betas=betas,
        eps=eps,
        maximize=maximize,
        nesterov=nesterov,
        lagged=lagged,
        blocks=blocks,
        stored=stored,
    )
    with np.errstate(all="ignore"):
        return p * (1 - lr * weight_decay) - lr * numerator / denominator, new


def fraction(
    g: np.ndarray,
    state: State,
    t: int,
    *,
    betas: tuple[float, float],
    eps: float,
    maximize: bool,
    nesterov: bool,
    lagged: bool,
    blocks: tuple[int, int],
    stored: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, State]:
    """The update of one step as numerator and denominator, and the new state."""
    b1, b2 = (float(beta) for beta in betas)
    g = np.asarray(g, dtype=np.float64)
    if maximize:
        g = -g
    with np.errstate(all="ignore"):
        m = b1 * state["m"] + (1 - b1) * g
        used = b1 * m + (1 - b1) * g if nesterov else m
        used = used if stored is None else stored
        new: State = {"m": m}
        if g.ndim < 2:
            new["v"] = b2 * state["v"] + (1 - b2) * g * g
            root = np.sqrt(new["v"] / (1 - b2**t))
        else:
            new["row"], new["col"], root = _stripes(g, state, t, b2, lagged and t > 1, blocks)
            root = np.maximum(root, np.sqrt(u(t, b1, b2, nesterov)) * np.abs(used))
        denominator = np.maximum(root + float(eps), SMALLEST_DENOMINATOR)  # NaN stays NaN
        return used / (1 - b1**t), denominator, new


def u(t: int, b1: float, b2: float, nesterov: bool) -> float:
    """The least v / (1 - b2^t) of any gradients g_1 to g_t whose momentum is 1.

    With x_k = sqrt(b2^k) g_(t-k) and w_k = (the momentum's weight of g_(t-k)) / sqrt(b2^k), the
    momentum is the sum of w_k x_k, and v is (1 - b2) times the sum of x_k^2. The least sum of
    squares that has w . x = 1 is 1 / (w . w).
    """
    squares = 0.0
    for k in range(t):
        weight = (1 - b1) * b1**k
        if nesterov:
            weight = b1 * weight + ((1 - b1) if k == 0 else 0.0)
        if weight > 0:
            squares += np.inf if b2**k == 0 else weight**2 / b2**k
    return (1 - b2) / (1 - b2**t) / squares


def _stripes(
    g: np.ndarray, state: State, t: int, b2: float, lagged: bool, blocks: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The new row and col, and a_i c_j for every element."""
    *batch, R, C = g.shape
    br, bc = blocks
    height, width = R // br, C // bc
    row, col, root = state["row"].copy(), state["col"].copy(), np.zeros(g.shape)
    if g.size == 0:
        return row, col, root
    for where in np.ndindex(*batch):
        for i in range(br):
            for j in range(bc):
                rows = slice(i * height, (i + 1) * height)
                cols = slice(j * width, (j + 1) * width)
                square = g[where][rows, cols] ** 2
                r = b2 * row[where][rows, j] + (1 - b2) * square.mean(axis=1)
                c = b2 * col[where][i, cols] + (1 - b2) * square.mean(axis=0)
                if lagged:
                    r_used, c_used = row[where][rows, j].copy(), col[where][i, cols].copy()
                else:
                    r_used, c_used = r, c
                row[where][rows, j] = r
                col[where][i, cols] = c
                mean = r_used.mean()
                if mean == 0:
                    a = np.zeros_like(r_used)
                elif np.isfinite(mean):
                    a = np.sqrt(r_used / mean)
                else:
                    a = np.full_like(r_used, np.nan)
                root[where][rows, cols] = np.outer(a, np.sqrt(c_used / (1 - b2 ** (t - lagged))))
    return row, col, root
