"""Subclasses of Trainer that build their own param groups."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trainer_runs import (
    Counting,
    arguments,
    losses,
    optimizer_of,
    packed_count,
    stepped,
    tiny_model,
)
from transformers import Trainer

from striped_hf import StripedAdamW
from striped_hf.trainer import param_groups


class RatesByLayer(Trainer):
    """Builds its groups and asks Trainer for the class and its arguments."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        decaying = set(self.get_decay_parameter_names(self.model))
        for name, param in self.model.named_parameters():
            layer = int(re.findall(r"\.h\.(\d+)\.", name)[0]) if ".h." in name else 2
            decay = self.args.weight_decay if name in decaying else 0.0
            groups.setdefault((1e-2 / (1 + layer), decay), []).append(param)
        cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        kwargs.pop("lr")
        self.optimizer = cls(
            [
                {"params": params, "lr": lr, "weight_decay": decay}
                for (lr, decay), params in groups.items()
            ],
            **kwargs,
        )
        return self.optimizer


class RateOfTheEmbeddings(Trainer):
    """Puts groups into the arguments, like transformers' GaLore."""

    key = "params"

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> tuple[Any, Any]:
        cls, kwargs = super().get_optimizer_cls_and_kwargs(args, model)
        embeddings = [p for name, p in model.named_parameters() if "wte" in name]
        rest = [p for name, p in model.named_parameters() if "wte" not in name]
        kwargs[self.key] = [{"params": rest}, {"params": embeddings, "lr": 1e-4}]
        return cls, kwargs


class RateInTheDictionary(RateOfTheEmbeddings):
    key = "optimizer_dict"


class DecayOnlyOfMLPs(Trainer):
    def get_decay_parameter_names(self, model: Any) -> list[str]:
        return [n for n in super().get_decay_parameter_names(model) if ".mlp." in n]


class WithScales(Trainer):
    """Adds a parameter to the optimizer that Trainer made."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        self.scales = nn.Parameter(torch.ones(3))
        optimizer.add_param_group({"params": [self.scales], "weight_decay": 0.0, "lr": 0.5})
        return optimizer


@pytest.mark.parametrize(
    "trainer_class",
    [RatesByLayer, RateOfTheEmbeddings, RateInTheDictionary, DecayOnlyOfMLPs, WithScales],
)
def test_subclasses_build_the_same_groups_as_for_adamw(
    trainer_class: type[Trainer], tmp_path: Path
) -> None:
    model = tiny_model("gpt2")
    built = {}
    for optim in ("adamw_torch", "striped_adamw_8bit"):
        optimizer = trainer_class(model, arguments(tmp_path, optim=optim)).create_optimizer()
        built[optim] = [
            {key: group[key] for key in ("lr", "weight_decay", "betas", "eps")}
            | {"params": [p for p in group["params"] if p.shape != (3,)]}
            for group in optimizer.param_groups
        ]
    assert type(optimizer) is StripedAdamW
    for ours, theirs in zip(built["striped_adamw_8bit"], built["adamw_torch"], strict=True):
        assert all(p is q for p, q in zip(ours.pop("params"), theirs.pop("params"), strict=True))
        assert ours == theirs
    assert packed_count(stepped(optimizer, model)) == 2


def test_a_subclass_trains_and_resumes(tmp_path: Path) -> None:
    def run(resume_from: str | None) -> list[float]:
        trainer = RatesByLayer(
            tiny_model("gpt2"),
            arguments(tmp_path, optim="striped_adamw_8bit", save_strategy="steps", save_steps=4),
            train_dataset=Counting(),
        )
        trainer.train(resume_from_checkpoint=resume_from)
        rates = {group["initial_lr"] for group in optimizer_of(trainer).param_groups}
        assert rates == {1e-2, 1e-2 / 2, 1e-2 / 3}
        assert packed_count(optimizer_of(trainer)) == 2
        return losses(trainer)

    whole = run(None)
    assert whole[-1] < whole[0]
    assert run(str(tmp_path / "checkpoint-4")) == whole


def test_a_checkpoint_of_named_groups_with_lists_of_blocks_resumes(tmp_path: Path) -> None:
    """Earlier versions of this package built the groups and saved such checkpoints."""

    class Named(Trainer):
        def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
            groups = param_groups(self.model, self.args.weight_decay)
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = cls(groups, **kwargs)
            return self.optimizer

    def run(trainer_class: type[Trainer], resume_from: Path | None = None) -> list[float]:
        trainer = trainer_class(
            tiny_model("gpt2"),
            arguments(tmp_path, optim="striped_adamw_8bit", save_strategy="steps", save_steps=4),
            train_dataset=Counting(),
        )
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        return losses(trainer)

    whole = run(Named)
    saved = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert all("param_names" in group for group in saved["param_groups"])
    assert all(isinstance(group["blocks"], list) for group in saved["param_groups"])
    assert run(Trainer, tmp_path / "checkpoint-4") == whole
