"""Fixtures of the tests of several processes."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from processes import Launch

from striped_hf.data.tokens import write_data_set


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a data set with a short evaluation: it counts up, with some noise."""
    folder = tmp_path_factory.mktemp("small_data")
    noise = np.random.default_rng(0).integers(0, 3, 12_000)
    tokens = (np.arange(12_000) + noise) % 50
    splits = {"train": tokens[:10_000], "val": tokens[10_000:]}
    source = {"name": "counting", "url": None, "sha256": None}
    write_data_set(folder, splits, vocab_size=50, source=source, tokenizer_name="numbers")
    return folder


@pytest.fixture
def launched() -> Iterator[list[Launch]]:
    """Yields a list for a test's launches, and kills the ones that still run at the end."""
    launches: list[Launch] = []
    yield launches
    for launch in launches:
        launch.end()
