"""LayerwiseStripedAdamW on sharded parameters, in real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import layerwise_cases as cases
import pytest
from process_group import run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("case", "processes"),
    [
        *((cases.float32_momentum, n) for n in (2, 3)),
        (cases.every_format, 3),
        (cases.master_bits, 3),
        (cases.accumulation, 2),
        (cases.clipping, 3),
        (cases.loss_in_chunks, 2),
        (cases.resuming, 2),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_sharded_layerwise(case: Any, processes: int, tmp_path: Path) -> None:
    error = run(case, processes, tmp_path)
    assert error is None, error
