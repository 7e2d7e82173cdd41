"""Processes that step different parameters: all of them raise an error, and none hangs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import agreement_cases as cases
import pytest
from process_group import run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("case", "processes"),
    [
        (cases.another_order, 3),
        (cases.another_number, 2),
        (cases.a_change_after_some_steps, 2),
        (cases.a_change_on_all, 2),
        (cases.gradients_on_some, 2),
        (cases.no_gradient_of_an_empty_part, 3),
        (cases.sharded_again, 2),
        (cases.sharded_again_on_one, 2),
        (cases.one_cannot_step, 2),
        (cases.rows_of_cut_columns, 2),
        (cases.gradients_that_are_partial, 2),
        (cases.two_dimensions, 4),
        (cases.two_meshes, 4),
        (cases.refused_placements, 2),
        (cases.a_mesh_of_others, 3),
        (cases.optimizers_in_another_order, 2),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_agreement(case: Any, processes: int, tmp_path: Path) -> None:
    error = run(case, processes, tmp_path, minutes=1)
    assert error is None, error
