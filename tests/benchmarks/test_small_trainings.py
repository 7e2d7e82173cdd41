"""Benchmarks of losses: trainings that a stopped run continues, and their tables."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks import layerwise_losses, weight_rounding
from benchmarks.small_trainings import (
    SEEDS,
    Task,
    Training,
    character_task,
    run_trainings,
    same_but_seed,
    train,
)
from striped_hf.cli import UserError
from striped_hf.data.prepare import write_characters


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """A training of a few steps, on a text of 65 symbols."""
    text = "".join(chr(33 + (i * i) % 65) for i in range(65)) + "".join(map(chr, range(33, 98)))
    write_characters(tmp_path / "data", text * 60, {"name": "text", "url": None, "sha256": ""})
    few = {"steps": 3, "averaged": 2, "block_size": 16, "batch_size": 4, "stride": 20}
    constant = {"warmup": 1, "final_lr": 1.0}
    return replace(character_task(str(tmp_path / "data")), **few, **constant)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_a_stopped_run_continues(task, tmp_path):
    path = tmp_path / "results.json"
    trainings = [
        Training("task", optim, 1e-3, seed)
        for optim in ("adamw_torch_fused", "striped_adamw_8bit")
        for seed in SEEDS
    ]
    run_trainings(path, {"task": task}, trainings[1:4])
    first = json.loads(path.read_text(encoding="utf-8"))
    # a row with some of the seeds is in no table
    assert same_but_seed(first) == []
    run_trainings(path, {"task": task}, trainings)
    results = json.loads(path.read_text(encoding="utf-8"))
    assert results["trainings"][1:4] == first["trainings"]
    assert [len(rows) for rows in same_but_seed(results)] == [len(SEEDS)] * 2
    assert results["complete"]
    with pytest.raises(UserError, match="other settings"):
        run_trainings(path, {"task": replace(task, steps=4)}, trainings)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_layerwise_trainings_fold_all_matrices(task, monkeypatch, micro_batches):
    """With float32 momentum, no clipping and one backward pass the losses are the ordinary ones."""
    ordinary, layerwise = (
        train(
            task,
            Training("task", optim, 1e-3, 1, max_grad_norm=None, micro_batches=micro_batches),
        )
        for optim in ("striped_adamw", "striped_adamw_layerwise")
    )
    assert (layerwise == ordinary) == (micro_batches == 1)
    assert layerwise["eval_loss"] == pytest.approx(ordinary["eval_loss"], abs=0.05)


def test_noise_is_not_in_the_training_loss(task):
    """The noise comes in the third step, so the mean over the last two is the second step's."""
    training = Training("task", "striped_adamw", 1e-3, 1)
    noisy = train(task, replace(training, noise_every=3))
    second = train(replace(task, steps=2, averaged=1), training)
    assert noisy["train_loss"] == second["train_loss"]
    assert noisy["eval_loss"] != train(task, training)["eval_loss"]


@pytest.mark.parametrize(
    ("benchmark", "renderers"),
    [
        (weight_rounding, [weight_rounding.render]),
        (
            layerwise_losses,
            [layerwise_losses.render_spikes, layerwise_losses.render_accumulation],
        ),
    ],
    ids=["weight_rounding", "layerwise_losses"],
)
def test_each_group_of_trainings_is_a_row(benchmark, renderers):
    rows = [
        {**asdict(each), "train_loss": each.seed / 10, "eval_loss": None if each.seed == 2 else 2.0}
        for each in benchmark.trainings()
    ]
    assert len({repr(asdict(each)) for each in benchmark.trainings()}) == len(rows)
    tables = "\n".join(render({"trainings": rows}) for render in renderers)
    assert tables.count("0.2000 (0.1000 to 0.3000) | diverged") == len(rows) / len(SEEDS)
