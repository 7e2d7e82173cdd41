"""The arguments that reach the optimizer, by its name and by the public interface."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from trainer_runs import (
    NAMES,
    Counting,
    arguments,
    losses,
    optimizer_of,
    packed_count,
    stepped,
    tiny_model,
    train,
)
from transformers import Trainer

from striped_hf import StripedAdamW, optimizer_cls_and_kwargs

# the arguments of the optimizer


def test_the_arguments_arrive_in_the_optimizer(tmp_path: Path) -> None:
    args = arguments(
        tmp_path,
        optim="striped_adamw_8bit",
        optim_args="momentum_dtype=bfloat16, backend=reference,nesterov=True,maximize=FALSE,"
        "stochastic_rounding=none,lagged=true,master_bits=24",
        learning_rate=2e-3,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
        weight_decay=0.2,
    )
    optimizer = Trainer(tiny_model("gpt2"), args).create_optimizer()
    assert type(optimizer) is StripedAdamW
    assert optimizer.backend == "reference"
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (2e-3, (0.8, 0.95), 1e-6)
        assert group["momentum_dtype"] == "bfloat16"
        assert (group["nesterov"], group["maximize"]) == (True, False)
        assert (group["stochastic_rounding"], group["lagged"]) == (None, True)
        assert group["master_bits"] == 24
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.2, 0.0}


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), ("NONE", None)])
def test_booleans_are_not_strings(text: str, value: bool | None) -> None:
    args = arguments("out", optim="striped_adamw", optim_args=f"stochastic_rounding={text}")
    _, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    assert kwargs["stochastic_rounding"] is value


BAD_OPTIM_ARGS = {
    "momentum_dtype=int9": ("momentum_dtype='int9'", "float32, bfloat16, int8, int4"),
    "momentum_dtype=Int8": ("momentum_dtype='Int8'", "float32, bfloat16, int8, int4"),
    "backend=cuda": ("backend='cuda'", "reference"),
    "nesterov=1": ("nesterov='1'", "true, false"),
    "nesterov=none": ("nesterov='none'", "true, false"),
    "maximize=yes": ("maximize='yes'", "true, false"),
    "maximize=": ("maximize=''", "true, false"),
    "stochastic_rounding=maybe": ("stochastic_rounding='maybe'", "true, false, none"),
    "master_bits=32": ("master_bits='32'", "none, 24"),
    "momentum=int8": ("'momentum'", "momentum_dtype, backend, maximize, nesterov"),
    "nesterov": ("'nesterov'", "key=value"),
    "nesterov=true,": ("''", "key=value"),
    "=true": ("''", "momentum_dtype, backend"),
    "nesterov=true,nesterov=false": ("nesterov twice", "once"),
    "blocks=(1,3)": ("blocks", "param group", "optimizer_cls_and_kwargs"),
    "lr=1e-3": ("lr", "TrainingArguments.learning_rate"),
    "learning_rate=1e-3": ("learning_rate", "TrainingArguments.learning_rate"),
    "betas=0.9": ("betas", "adam_beta1", "adam_beta2"),
    "beta2=0.9": ("beta2", "TrainingArguments.adam_beta2"),
    "eps=1e-6": ("eps", "TrainingArguments.adam_epsilon"),
    "weight_decay=0.1": ("weight_decay", "TrainingArguments.weight_decay"),
}


@pytest.mark.parametrize("optim_args", BAD_OPTIM_ARGS)
def test_bad_optim_args_say_what_to_pass(optim_args: str) -> None:
    args = arguments("out", optim="striped_adamw", optim_args=optim_args)
    model = tiny_model("gpt2")
    for call in (Trainer.get_optimizer_cls_and_kwargs, optimizer_cls_and_kwargs):
        with pytest.raises(ValueError, match="optim_args") as caught:
            call(args, model)
        assert repr(optim_args) in str(caught.value)
        for part in BAD_OPTIM_ARGS[optim_args]:
            assert part in str(caught.value)


@pytest.mark.parametrize("model", [None, tiny_model("gpt2")], ids=["without", "with"])
def test_the_caller_builds_the_groups(model: nn.Module | None) -> None:
    args = arguments("out", optim="striped_adamw_8bit")
    for call in (Trainer.get_optimizer_cls_and_kwargs, optimizer_cls_and_kwargs):
        cls, kwargs = call(args, model)
        assert cls is StripedAdamW
        assert "params" not in kwargs
        cls([nn.Parameter(torch.zeros(2, 2))], **kwargs)
    assert kwargs["weight_decay"] == 0.1  # without Trainer no param group has the decay


# the public interface


@pytest.mark.parametrize(
    ("optim", "optim_args", "momentum_dtype"),
    [
        *((name, None, momentum_dtype) for name, momentum_dtype in NAMES.items()),
        ("adamw_torch", None, "float32"),
        ("adamw_torch_fused", "momentum_dtype=int8", "int8"),
    ],
)
def test_the_public_interface_trains_like_the_name(
    tmp_path: Path, optim: str, optim_args: str | None, momentum_dtype: str
) -> None:
    model = tiny_model("gpt2")
    args = arguments(tmp_path, optim=optim, optim_args=optim_args)
    trainer = Trainer(
        model,
        args,
        train_dataset=Counting(),
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, model),
    )
    trainer.train()
    (name,) = (name for name in NAMES if NAMES[name] == momentum_dtype)
    named = train("gpt2", tmp_path, optim=name)
    assert losses(trainer) == losses(named)
    for ours, theirs in zip(
        optimizer_of(trainer).param_groups, optimizer_of(named).param_groups, strict=True
    ):
        for key in ("blocks", "weight_decay", "momentum_dtype"):
            assert ours[key] == theirs[key]
        assert len(ours["params"]) == len(theirs["params"])
    assert packed_count(optimizer_of(trainer)) == packed_count(optimizer_of(named)) == 2


def test_the_same_class_and_arguments_work_in_two_trainers() -> None:
    model, args = tiny_model("gpt2"), arguments("out", optim="striped_adamw")
    answer = optimizer_cls_and_kwargs(args, model)
    for _ in range(2):
        trainer = Trainer(model, args, optimizer_cls_and_kwargs=answer)
        assert packed_count(stepped(trainer.create_optimizer(), model)) == 2
    # and a direct call of the class works, too
    cls, kwargs = answer
    assert packed_count(stepped(cls(model.parameters(), **kwargs), model)) == 2


@pytest.mark.parametrize("with_model", [True, False])
def test_the_public_interface_marks_the_packed_projections_of_the_trained_model(
    with_model: bool,
) -> None:
    model = tiny_model("gpt2")
    args = arguments("out", optim="adamw_torch")
    answer = optimizer_cls_and_kwargs(args, model if with_model else None)
    model = copy.deepcopy(model)  # a model without marked parameters
    trainer = Trainer(model, args, optimizer_cls_and_kwargs=answer)
    assert packed_count(stepped(trainer.create_optimizer(), model)) == 2


def test_the_groups_are_built_when_training_begins() -> None:
    model, args = tiny_model("gpt2"), arguments("out", optim="striped_adamw")
    answer = optimizer_cls_and_kwargs(args, model)
    model.resize_token_embeddings(80, mean_resizing=False)  # another parameter
    model.transformer.h[0].requires_grad_(False)
    optimizer = Trainer(model, args, optimizer_cls_and_kwargs=answer).create_optimizer()
    params = {param for group in optimizer.param_groups for param in group["params"]}
    assert params == {param for param in model.parameters() if param.requires_grad}


def test_each_new_model_of_model_init_has_its_blocks(tmp_path: Path) -> None:
    """A hyperparameter search makes a new model for each trial."""
    trainer = Trainer(
        args=arguments(tmp_path, optim="striped_adamw_8bit", max_steps=2),
        model_init=lambda: tiny_model("gpt2"),
        train_dataset=Counting(),
    )
    for _ in range(2):
        trainer.train()
        optimizer = optimizer_of(trainer)
        assert {p for group in optimizer.param_groups for p in group["params"]} == set(
            trainer.model.parameters()
        )
        assert packed_count(optimizer) == 2
