"""What every test of the Trainer integration begins with."""

import pytest


@pytest.fixture(autouse=True)
def no_mixed_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 4.57 leaves a test's bf16=True in the environment, where the next ones read it."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
