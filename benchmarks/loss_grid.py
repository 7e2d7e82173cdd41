"""The learning rates and seeds at which an optimizer of losses.py runs."""

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

MARGIN = 0.03  # nats; the losses of single seeds scatter by 0.01 to 0.02
MOST_RATES = 8  # of one optimizer

RateAndSeed = tuple[float, int]


def wanted(
    runs: Sequence[dict[str, Any]], rates: Sequence[float], seeds: Sequence[int]
) -> list[RateAndSeed]:
    """Returns the runs that an optimizer's row still needs, as far as its finished runs tell.

    The grid grows by a factor of 2 while its best rate is at an edge.

    Args:
        runs: The optimizer's finished runs; a ``val_loss`` of None is a run that diverged.
        rates: The rates with which its grid begins.
        seeds: All seeds.

    Returns:
        Learning rates and seeds, in the order in which they should run; nothing if the row is
        complete.
    """
    losses = {
        (run["learning_rate"], run["seed"]): math.inf
        if run["val_loss"] is None
        else run["val_loss"]
        for run in runs
    }
    first, middle = seeds[0], rates[len(rates) // 2]
    grid = sorted({*rates, *(rate for rate, _ in losses)})
    begin = [(middle, seed) for seed in seeds] + [(rate, first) for rate in grid]
    if missing := [pair for pair in dict.fromkeys(begin) if pair not in losses]:
        return missing
    lowest = min(losses[rate, first] for rate in grid)
    # if all diverged, the smallest rate counts as the best
    near = [rate for rate in grid if losses[rate, first] <= lowest + MARGIN]
    best = min(near, key=lambda rate: losses[rate, first])
    if not (missing := _beyond(grid, best, first)) and math.isfinite(lowest):
        pairs = itertools.product(near, seeds)
        if not (missing := [pair for pair in pairs if pair not in losses]):
            best = min(near, key=lambda rate: statistics.mean(losses[rate, s] for s in seeds))
            missing = _beyond(grid, best, first)
    return missing


def _beyond(grid: Sequence[float], best: float, seed: int) -> list[RateAndSeed]:
    """Returns the next run of a grid whose best rate is at an edge; nothing if it is not."""
    if len(grid) < MOST_RATES and best in (grid[0], grid[-1]):
        return [(best / 2 if best == grid[0] else best * 2, seed)]
    return []
