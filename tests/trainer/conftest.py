"""Fixtures for every test of the Trainer integration."""

import pytest


@pytest.fixture(autouse=True)
def no_mixed_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes bf16=True from the environment: transformers 4.57 leaves it there."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
