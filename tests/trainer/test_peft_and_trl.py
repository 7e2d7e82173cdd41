"""PEFT's LoRA and TRL's SFTTrainer, used like their users do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_runs import (
    NAMES,
    TEXT,
    Counting,
    arguments,
    losses,
    optimizer_of,
    tiny_model,
    tiny_tokenizer,
)
from transformers import Trainer

from striped_hf import StripedAdamW, optimizer_cls_and_kwargs

datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")


def lora(**changes: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], **changes)


def trained(trainer: Trainer) -> set[str]:
    """The names of the optimizer's parameters, each of which has a momentum."""
    optimizer = optimizer_of(trainer)
    assert type(optimizer) is StripedAdamW
    held = {param for group in optimizer.param_groups for param in group["params"]}
    assert all("exp_avg" in optimizer.state[param] for param in held)
    names = {name for name, param in trainer.model.named_parameters() if param in held}
    assert len(names) == len(held)
    return names


def test_lora_trains_only_its_adapters_and_resumes(tmp_path: Path) -> None:
    def run(resume: bool) -> Trainer:
        args = arguments(
            tmp_path,
            optim="striped_adamw_8bit",
            max_steps=12,
            learning_rate=3e-2,
            save_strategy="steps",
            save_steps=6,
        )
        model = peft.get_peft_model(tiny_model("llama"), lora())
        trainer = Trainer(model, args, train_dataset=Counting())
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6") if resume else None)
        return trainer

    whole, resumed = run(False), run(True)
    assert trained(whole) == {
        name for name, param in whole.model.named_parameters() if param.requires_grad
    }
    assert all(".lora_" in name for name in trained(whole))
    assert losses(whole)[-1] < losses(whole)[0] - 0.1
    assert losses(resumed) == losses(whole)
    frozen = dict(tiny_model("llama").named_parameters())
    for name, param in whole.model.get_base_model().named_parameters():
        original = frozen.get(name.replace(".base_layer", ""))
        if original is not None:
            torch.testing.assert_close(param, original, rtol=0, atol=0)


def test_lora_that_began_with_adamw_continues(tmp_path: Path) -> None:
    """All adapter parameters have weight decay, so one of Trainer's groups is empty."""

    def run(optim: str, resume_from: str | None = None) -> Trainer:
        args = arguments(tmp_path, optim=optim, save_strategy="steps", save_steps=4)
        model = peft.get_peft_model(tiny_model("llama"), lora())
        trainer = Trainer(model, args, train_dataset=Counting())
        trainer.train(resume_from_checkpoint=resume_from)
        return trainer

    adamw = run("adamw_torch")
    striped = run("striped_adamw_8bit", str(tmp_path / "checkpoint-4"))
    assert trained(striped)
    torch.testing.assert_close(losses(striped), losses(adamw), rtol=0.02, atol=0)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("way", ["name", "public"])
def test_sft_trainer(tmp_path: Path, way: str, adapters: bool) -> None:
    tokenizer = tiny_tokenizer()
    args = trl.SFTConfig(
        str(tmp_path),
        optim="striped_adamw_8bit",
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=2e-2,
        max_length=16,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    model = tiny_model("llama")
    # like a user: before SFTTrainer puts adapters into the model
    answer = optimizer_cls_and_kwargs(args, model) if way == "public" else None
    trainer = trl.SFTTrainer(
        model,
        args=args,
        train_dataset=datasets.Dataset.from_dict({"text": [TEXT[i:] for i in range(32)]}),
        processing_class=tokenizer,
        peft_config=lora() if adapters else None,
        optimizer_cls_and_kwargs=answer,
    )
    trainer.train()
    assert isinstance(trainer.model, peft.PeftModel) is adapters
    assert all(".lora_" in name for name in trained(trainer)) is adapters
    assert len(trained(trainer)) == sum(p.requires_grad for p in trainer.model.parameters())
    groups = optimizer_of(trainer).param_groups
    assert {group["momentum_dtype"] for group in groups} == {NAMES["striped_adamw_8bit"]}
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1
