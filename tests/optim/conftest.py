"""Fixtures of the optimizer's tests, and one deterministic hypothesis profile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from striped_hf.optim import backends

settings.register_profile("striped", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("striped")


@pytest.fixture(
    scope="session",
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ],
)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _same_random_numbers_in_every_test() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(20240607)
        yield


@pytest.fixture(scope="module", params=["reference", "cpu"])
def every_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Lets ``backend="auto"`` choose each backend for CPUs in turn."""
    try:
        backends.resolve(request.param, "cpu")
    except RuntimeError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends._FASTEST, "cpu", request.param)
        backends.resolve.cache_clear()
        yield request.param
    backends.resolve.cache_clear()
