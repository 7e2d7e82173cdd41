"""A convolutional model in transformers.Trainer: its kernels are recognised by their modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from trainer_runs import NAMES, arguments, losses, optimizer_of
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, set_seed


class Quadrants(Dataset[dict[str, torch.Tensor]]):
    """Images of noise with one brighter quadrant, which is the label."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = torch.rand((3, 16, 16), generator=torch.Generator().manual_seed(index))
        label = index % 4
        top, left = 8 * (label // 2), 8 * (label % 2)
        image[:, top : top + 8, left : left + 8] += 1
        return {"pixel_values": image, "labels": label}


def train(folder: Path, optim: str, channels_last: bool, resume: Path | None = None) -> Trainer:
    set_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4
    )
    model = ResNetForImageClassification(config)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    settings = arguments(
        folder, optim=optim, save_strategy="steps", save_steps=4, remove_unused_columns=False
    )
    trainer = Trainer(model, settings, train_dataset=Quadrants())
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("optim", NAMES)
def test_a_resnet_learns_and_resumes(optim: str, channels_last: bool, tmp_path: Path) -> None:
    trainer = train(tmp_path / "run", optim, channels_last)
    adamw = train(tmp_path / "adamw", "adamw_torch", channels_last)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert abs(losses(trainer)[-1] - losses(adamw)[-1]) < 0.3
    states = optimizer_of(trainer).state
    kernels = [m.weight for m in trainer.model.modules() if isinstance(m, nn.Conv2d)]
    assert len(kernels) >= 5
    for kernel in kernels:
        assert states[kernel]["exp_avg_sq_row"].shape == (kernel.shape[0], 1)
        assert states[kernel]["exp_avg_sq_col"].shape == (1, kernel[0].numel())
    resumed = train(tmp_path / "run", optim, channels_last, tmp_path / "run" / "checkpoint-4")
    for p, q in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
