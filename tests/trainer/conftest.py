"""What every test of the Trainer integration begins with."""

import pytest


@pytest.fixture(autouse=True)
def no_mixed_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 4.57 leaves bf16=True in the environment, where the next test would read it."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
