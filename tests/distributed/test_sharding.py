"""StripedAdamW on sharded parameters, in real processes: the same numbers as on one device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import training_cases as cases
from process_group import run

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

# the differences of parameters, relative to their largest element, after 50 steps
PARAMETERS = 5e-7  # 2.3e-7 measured: the sums' order changes a step by one or two roundings of 6e-8
STRIPES = 2e-6  # 8e-7 measured: the same for averages, relative to themselves


@pytest.mark.parametrize(
    ("case", "processes"),
    [
        *((cases.fsdp2, n) for n in (2, 3)),
        *((cases.fifty_steps, n) for n in (2, 3)),
        *((cases.accumulation, n) for n in (2,)),
        (cases.mixed_precision, 2),
        (cases.low_precision, 3),
        *((cases.master_bits, n) for n in (2, 3)),
        (cases.cpu_offload, 2),
        (cases.by_columns, 2),
        *((cases.export_to_adamw, n) for n in (2, 3)),
        (cases.lagged, 3),
        (cases.hybrid, 4),
        (cases.tensor_parallel, 4),
        (cases.tensor_parallel_alone, 2),
        (cases.one_exchange, 2),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_sharded(case: Any, processes: int, tmp_path: Path) -> None:
    error = run(case, processes, tmp_path)
    assert error is None, error


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory: pytest.TempPathFactory, run_script: Any) -> list[dict]:
    """Runs the benchmark of the table in docs/: every format, backend and way of sharding.

    Of its 50 steps 20 suffice here: ``fifty_steps`` does more.
    """
    output = tmp_path_factory.mktemp("comparisons") / "comparisons.json"
    run_script("benchmarks.sharding", "--steps", 20, "--output", output, cwd=REPOSITORY)
    return json.loads(output.read_text())["comparisons"]


def test_every_format_agrees(comparisons: list[dict]) -> None:
    assert len(comparisons) == 8 * (9 + 9 + 2)
    for row in comparisons:
        bound = 0.0 if row["exact"] else 1.0
        assert row["parameters"] <= bound * PARAMETERS, row
        assert row["stripes"] <= bound * STRIPES, row
        assert row["codes"] == 0, row
