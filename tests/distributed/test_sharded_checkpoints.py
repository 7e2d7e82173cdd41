"""Checkpoints of sharded parameters and their StripedAdamW, in real processes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import checkpoint_cases as cases
import fsdp2_trainer
import pytest
from process_group import run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("state_dict_type", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
@pytest.mark.parametrize("way", [fsdp2_trainer.through_trainer, fsdp2_trainer.through_accelerate])
def test_trainer_and_accelerate_resume(way: Any, state_dict_type: str, tmp_path: Path) -> None:
    error = run(partial(way, state_dict_type), 2, tmp_path)
    assert error is None, error


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a folder with the checkpoints of 1, 2 and 3 processes, in every format."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for processes in (1, 2, 3):
        error = run(cases.save_checkpoints, processes, folder)
        assert error is None, error
    return folder


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_any_number_of_processes_can_resume_a_checkpoint(checkpoints: Path, processes: int) -> None:
    error = run(cases.load_checkpoints, processes, checkpoints)
    assert error is None, error


def test_bad_checkpoints_change_nothing(checkpoints: Path) -> None:
    error = run(cases.bad_checkpoints, 2, checkpoints)
    assert error is None, error


def test_whole_state_dicts(tmp_path: Path) -> None:
    error = run(cases.whole_state_dicts, 2, tmp_path)
    assert error is None, error


def test_sharded_training_continues_from_adamw(tmp_path: Path) -> None:
    error = run(cases.adamw_checkpoints, 2, tmp_path)
    assert error is None, error
