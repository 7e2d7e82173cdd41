"""StripedAdamW on sharded parameters, in real processes: the same numbers as on one device."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import fsdp2_trainer
import pytest
import sharded_training as cases

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

# of parameters, relative to their largest element, after 50 steps
PARAMETERS = 5e-7  # 2.3e-7 measured: the sums' order moves a step by a rounding of 6e-8 or two
STRIPES = 2e-6  # 8e-7 measured: as above, but of averages relative to themselves


@pytest.mark.parametrize(
    ("case", "processes"),
    [
        *((cases.fsdp2, n) for n in (2, 3)),
        *((cases.fifty_steps, n) for n in (2, 3)),
        *((cases.accumulation, n) for n in (2,)),
        (cases.mixed_precision, 2),
        (cases.low_precision, 3),
        (cases.cpu_offload, 2),
        (cases.by_columns, 2),
        (cases.lagged, 3),
        (cases.hybrid, 4),
        (cases.tensor_parallel, 4),
        (cases.tensor_parallel_alone, 2),
        (cases.one_exchange, 2),
        (cases.whole_state_dicts, 2),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_sharded(case: Any, processes: int, tmp_path: Path) -> None:
    error = cases.run(case, processes, tmp_path)
    assert error is None, error


@pytest.mark.parametrize("state_dict_type", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
@pytest.mark.parametrize("way", [fsdp2_trainer.through_trainer, fsdp2_trainer.through_accelerate])
def test_trainer_and_accelerate_resume(way: Any, state_dict_type: str, tmp_path: Path) -> None:
    error = cases.run(partial(way, state_dict_type), 2, tmp_path)
    assert error is None, error


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of 1, 2 and 3 processes, in every format."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for processes in (1, 2, 3):
        error = cases.run(cases.save_checkpoints, processes, folder)
        assert error is None, error
    return folder


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_checkpoint_goes_on_on_any_number_of_processes(checkpoints: Path, processes: int) -> None:
    error = cases.run(cases.load_checkpoints, processes, checkpoints)
    assert error is None, error


def test_bad_checkpoints_change_nothing(checkpoints: Path) -> None:
    error = cases.run(cases.bad_checkpoints, 2, checkpoints)
    assert error is None, error


@pytest.fixture(scope="module")
def comparisons(tmp_path_factory: pytest.TempPathFactory, run_script: Any) -> list[dict]:
    """What the README's table is made of: every format, backend and way of sharding."""
    folder = tmp_path_factory.mktemp("comparisons")
    rows = []
    for processes in (2, 3, 4):
        output = folder / f"{processes}.json"
        arguments = ("--processes", processes, "--output", output)
        run_script("recipes/compare_sharding.py", *arguments, cwd=REPOSITORY)
        rows += json.loads(output.read_text())["comparisons"]
    return rows


def test_fifty_steps_of_every_format_agree(comparisons: list[dict]) -> None:
    assert len(comparisons) == 8 * (9 + 9 + 2)
    for row in comparisons:
        bound = 0.0 if row["exact"] else 1.0
        assert row["parameters"] <= bound * PARAMETERS, row
        assert row["stripes"] <= bound * STRIPES, row
        assert row["codes"] == 0, row
