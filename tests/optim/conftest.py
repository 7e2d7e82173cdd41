"""Fixtures of the optimizer's tests, and one deterministic hypothesis profile."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# before a test imports the kernels: without a GPU they run in Triton's interpreter
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

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
