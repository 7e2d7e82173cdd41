"""Shared by the tests of several processes."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from processes import Launch

from striped_hf.data.tokens import write_data_set


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set so small that its evaluation takes a moment: counting up, with some noise."""
    folder = tmp_path_factory.mktemp("small_data")
    noise = np.random.default_rng(0).integers(0, 3, 12_000)
    tokens = (np.arange(12_000) + noise) % 50
    splits = {"train": tokens[:10_000], "val": tokens[10_000:]}
    source = {"name": "counting", "url": None, "sha256": None}
    write_data_set(folder, splits, vocab_size=50, source=source, tokenizer_name="numbers")
    return folder


@pytest.fixture
def launched() -> Iterator[list[Launch]]:
    """A list for a test's launches; those still running at the end are killed."""
    launches: list[Launch] = []
    yield launches
    for launch in launches:
        launch.end()
