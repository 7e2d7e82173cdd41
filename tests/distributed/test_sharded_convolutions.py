"""Sharded convolutions: the same numbers as on one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import convolution_cases as cases
import pytest
from process_group import run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("case", "processes"),
    [(cases.by_rows, 2), (cases.by_rows, 3), (cases.by_inputs, 2), (cases.state_dicts, 2)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_sharded_convolutions(case: Any, processes: int, tmp_path: Path) -> None:
    error = run(case, processes, tmp_path)
    assert error is None, error
