"""Layerwise optimizers in real runs of Trainer, TRL and accelerate, beside the ordinary ones."""

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.data import DataLoader
from trainer_runs import (
    WIDE,
    Counting,
    arguments,
    losses,
    optimizer_of,
    tiny_model,
    tiny_tokenizer,
)
from transformers import PreTrainedModel, Trainer, TrainerCallback

import striped_hf.losses
from striped_hf import LayerwiseStripedAdamW, StripedAdamW, optimizer_cls_and_kwargs
from striped_hf.optim.blocks import is_marked
from striped_hf.trainer.causal_lm import CausalLMTrainer
from striped_hf.trainer.layerwise import extend_accelerator

# the norm is above all norms here, so that nothing is clipped
EXACT = {"max_grad_norm": 100.0}
Run = Callable[..., Trainer]


def wide_model(kind: str = "gpt2") -> PreTrainedModel:
    return tiny_model(kind, WIDE, vocab_size=WIDE)


class Kept(TrainerCallback):
    """Lists the large matrices that have a gradient before each step."""

    def __init__(self) -> None:
        self.names: list[list[str]] = []

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        params = model.named_parameters()
        self.names.append([n for n, p in params if p.numel() >= WIDE**2 and p.grad is not None])


def run(
    folder: Path,
    optim: str,
    model: PreTrainedModel | None = None,
    callback: TrainerCallback | None = None,
    resume_from: Path | None = None,
    trainer_class: type[Trainer] = Trainer,
    **changes: Any,
) -> Trainer:
    trainer = trainer_class(
        model or wide_model(),
        arguments(folder, **{"max_steps": 3, "learning_rate": 1e-3, "optim": optim, **changes}),
        train_dataset=Counting(),
        eval_dataset=Counting(),
        callbacks=[callback] if callback else None,
    )
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    return trainer


def norms(trainer: Trainer) -> list[float]:
    return [e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e]


def evaluated(trainer: Trainer) -> list[float]:
    return [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]


def assert_same(left: Trainer, right: Trainer) -> None:
    """The same losses and weights, to the bit."""
    assert losses(left) == losses(right)
    assert len(losses(left)) == left.args.max_steps
    weights = dict(right.model.named_parameters())
    for name, param in left.model.named_parameters():
        assert torch.equal(param, weights[name]), name


# each: changes of the arguments, and of the model
FEATURES: dict[str, tuple[dict[str, Any], Callable[[], PreTrainedModel]]] = {}


def feature(name: str, **changes: Any) -> Any:
    def add(model: Callable[[], PreTrainedModel]) -> Callable[[], PreTrainedModel]:
        FEATURES[name] = (changes, model)
        return model

    return add


feature("cosine")(wide_model)
feature("linear with warmup", lr_scheduler_type="linear", warmup_steps=2)(wide_model)
feature("no clipping", max_grad_norm=0.0)(wide_model)
feature("untied embeddings")(lambda: wide_model("llama"))
feature("bf16 autocast", bf16=True)(wide_model)
feature("bf16 weights")(lambda: wide_model("llama").to(torch.bfloat16))
feature("bf16 weights and master_bits", optim_args="master_bits=24")(
    lambda: wide_model("llama").to(torch.bfloat16)
)
feature("NEFTune", neftune_noise_alpha=5)(wide_model)
for reentrant in (True, False):
    feature(
        f"checkpointing, use_reentrant={reentrant}",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )(wide_model)


@feature("frozen")
def frozen() -> PreTrainedModel:
    model = wide_model()
    model.transformer.h[0].requires_grad_(False)
    return model


@feature("unused")
def unused() -> PreTrainedModel:
    model = wide_model("llama")
    model.unused = nn.Linear(WIDE, WIDE)
    return model


@feature("shared")
def shared() -> PreTrainedModel:
    model = wide_model()
    first, second = model.transformer.h
    second.mlp.c_fc.weight = first.mlp.c_fc.weight
    return model


@pytest.mark.parametrize("name", FEATURES)
def test_a_run_is_the_ordinary_one(tmp_path: Path, name: str) -> None:
    changes, make_model = FEATURES[name]
    changes = {**EXACT, **changes}
    ordinary_kept, kept = Kept(), Kept()
    ordinary = run(tmp_path, "striped_adamw", make_model(), ordinary_kept, **changes)
    layerwise = run(tmp_path, "striped_adamw_layerwise", make_model(), kept, **changes)
    assert type(optimizer_of(layerwise)) is LayerwiseStripedAdamW
    assert layerwise.model.is_gradient_checkpointing == ("gradient_checkpointing" in changes)
    assert_same(layerwise, ordinary)
    assert all(len(names) > 4 for names in ordinary_kept.names)
    assert kept.names == [[], [], []]
    # torch's norm of bfloat16 gradients is a bfloat16
    is_bfloat16 = layerwise.model.dtype == torch.bfloat16
    assert norms(layerwise) == pytest.approx(norms(ordinary), rel=0.004 if is_bfloat16 else 1e-5)
    # transformers 4.57 logs no norm where it does not clip
    assert len(norms(layerwise)) == 3 or changes["max_grad_norm"] == 0


class Generating(TrainerCallback):
    """Generates after each evaluation."""

    def on_evaluate(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)


def test_evaluation_and_generation_in_between(tmp_path: Path) -> None:
    changes = {"eval_strategy": "steps", "eval_steps": 1, **EXACT}
    ordinary, layerwise = (
        run(tmp_path, optim, callback=Generating(), **changes)
        for optim in ("striped_adamw", "striped_adamw_layerwise")
    )
    assert_same(layerwise, ordinary)
    assert evaluated(layerwise) == evaluated(ordinary)
    assert len(evaluated(layerwise)) == 3


@pytest.mark.slow
def test_a_compiled_model(tmp_path: Path) -> None:
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    kept = Kept()
    ordinary, layerwise = (
        run(tmp_path, optim, callback=kept, **EXACT, **compiled)
        for optim in ("striped_adamw", "striped_adamw_layerwise")
    )
    assert isinstance(layerwise.model_wrapped, torch._dynamo.OptimizedModule)
    assert_same(layerwise, ordinary)
    assert kept.names[-3:] == [[], [], []]


# -------------------------------------------------------------------------------------------------
# coded momentum, clipping and accumulation
# -------------------------------------------------------------------------------------------------

# of losses over 12 steps, relative; measured: 0.0001, 0.0015, 0.007 and 0.018. Without clipping the
# last losses differ by 0.04.
SCATTER = {"8-bit": 0.001, "4-bit": 0.005, "clipped": 0.02, "accumulated": 0.04}
LONG = {"max_steps": 12, "lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trainer]:
    """A run of 12 steps of a Llama, once for each optimizer and norm."""

    @cache
    def train(optim: str, max_grad_norm: float) -> Trainer:
        folder = tmp_path_factory.mktemp(optim)
        return run(folder, optim, wide_model("llama"), max_grad_norm=max_grad_norm, **LONG)

    return train


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_losses_with_coded_momentum(long_run: Any, bits: str) -> None:
    layerwise, ordinary = (
        long_run(f"striped_adamw_{bits}{suffix}", 0.0) for suffix in ("_layerwise", "")
    )
    rel = SCATTER[f"{bits[0]}-bit"]
    assert losses(layerwise) == pytest.approx(losses(ordinary), rel=rel)
    assert norms(layerwise) == pytest.approx(norms(ordinary), rel=2 * rel)


def test_losses_with_clipping(long_run: Any) -> None:
    layerwise, ordinary = (
        long_run(f"striped_adamw_8bit{suffix}", 1.0) for suffix in ("_layerwise", "")
    )
    assert losses(layerwise) == pytest.approx(losses(ordinary), rel=SCATTER["clipped"])
    # the first step is clipped as usual, and the second gradient is of the same weights
    assert norms(layerwise)[:2] == pytest.approx(norms(ordinary)[:2], rel=1e-3)
    assert min(norms(ordinary)) > 2  # each step is clipped


def test_losses_with_accumulation_and_clipping(long_run: Any, tmp_path: Path) -> None:
    accumulated = run(
        tmp_path,
        "striped_adamw_8bit_layerwise",
        wide_model("llama"),
        kept := Kept(),
        gradient_accumulation_steps=4,
        per_device_train_batch_size=2,
        max_grad_norm=1.0,
        **LONG,
    )
    # without dropout it has the gradients of the whole batch
    ordinary = long_run("striped_adamw_8bit", 1.0)
    assert losses(accumulated) == pytest.approx(losses(ordinary), rel=SCATTER["accumulated"])
    assert norms(accumulated)[0] == pytest.approx(norms(ordinary)[0], rel=0.1)  # an estimate
    assert kept.names == [[]] * 12


def test_the_first_step_is_clipped_to_the_norm(tmp_path: Path) -> None:
    trainer = run(tmp_path, "striped_adamw_layerwise", max_steps=1, max_grad_norm=0.1)
    assert norms(trainer)[0] > 1
    momenta = [state["exp_avg"] for state in optimizer_of(trainer).state.values()]
    assert torch.nn.utils.get_total_norm(momenta).item() / 0.1 == pytest.approx(0.1, rel=1e-4)


# -------------------------------------------------------------------------------------------------
# the loss in chunks
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("passes", [1, 2])
def test_an_untied_heads_gradient_is_folded_as_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, passes: int
) -> None:
    monkeypatch.setattr(striped_hf.losses, "_CHUNK_LOGITS", 1 << 12)
    blocks: list[int] = []  # rows of each
    original = striped_hf.losses._weight_gradient

    def counted(*args: Any) -> Iterator[tuple[slice, torch.Tensor]]:
        for rows, block in original(*args):
            blocks.append(len(block))
            yield rows, block

    monkeypatch.setattr(striped_hf.losses, "_weight_gradient", counted)
    changes = {"remove_unused_columns": False, "gradient_accumulation_steps": passes, **EXACT}
    whole = run(
        tmp_path,
        "striped_adamw_layerwise",
        wide_model(kind),
        trainer_class=WholeLogits,
        **changes,
    )
    assert not blocks
    kept = Kept()
    in_chunks = run(
        tmp_path,
        "striped_adamw_layerwise",
        wide_model(kind),
        kept,
        trainer_class=CausalLMTrainer,
        **changes,
    )
    assert kept.names == [[], [], []]
    # 3 steps, and in each backward pass blocks of 32 of the 256 rows
    assert blocks == ([32] * 8 * 3 * passes if kind == "llama" else [])
    assert losses(in_chunks) == pytest.approx(losses(whole), rel=1e-4)
    assert norms(in_chunks) == pytest.approx(norms(whole), rel=1e-4)


class WholeLogits(CausalLMTrainer):
    chunked_loss = False


def test_values_that_are_not_finite_are_counted_in_all_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(striped_hf.losses, "_CHUNK_LOGITS", 1 << 12)

    def count(trainer_class: type[Trainer]) -> int:
        model = wide_model("llama")
        with torch.no_grad():
            model.model.norm.weight[0] = float("nan")
        changes = {"remove_unused_columns": False, "max_steps": 1, "learning_rate": 0.0}
        optim = "striped_adamw_layerwise"
        trainer = run(tmp_path, optim, model, trainer_class=trainer_class, **changes)
        (found,) = (
            e["nonfinite_values"] for e in trainer.state.log_history if "nonfinite_values" in e
        )
        return found

    assert count(CausalLMTrainer) == count(WholeLogits) >= WIDE**2


# -------------------------------------------------------------------------------------------------
# checkpoints
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["striped_adamw_8bit_layerwise", "striped_adamw_4bit_layerwise"])
def test_resuming_is_as_if_never_stopped(tmp_path: Path, optim: str) -> None:
    changes = {
        "max_steps": 4,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = run(tmp_path, optim, **changes)
    rest = run(tmp_path, optim, resume_from=tmp_path / "checkpoint-2", **changes)
    assert rest.state.global_step == 4
    assert_same(rest, whole)
    assert norms(rest) == norms(whole)
    state, expected = (optimizer_of(trainer).state_dict() for trainer in (rest, whole))
    assert state["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(state["state"], expected["state"], rtol=0, atol=0)


def test_an_ordinary_run_goes_on_layerwise(tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "save_steps": 2, **EXACT}
    ordinary = run(tmp_path, "striped_adamw", **changes)
    checkpoint = tmp_path / "checkpoint-2"
    layerwise = run(tmp_path, "striped_adamw_layerwise", resume_from=checkpoint, **changes)
    assert_same(layerwise, ordinary)


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    trainer = run(
        tmp_path,
        "striped_adamw_8bit_layerwise",
        # the rate soars, so that an early checkpoint is the best one
        lr_scheduler_type="constant",
        learning_rate=0.1,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
    )
    losses_of_checkpoints = evaluated(trainer)
    best = min(losses_of_checkpoints)
    assert best < losses_of_checkpoints[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best)


# -------------------------------------------------------------------------------------------------
# several backward passes
# -------------------------------------------------------------------------------------------------


class TwoLosses(Trainer):
    """Has two backward passes for each step."""

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        super().training_step(model, dict(inputs), *args, **kwargs)
        return super().training_step(model, dict(inputs), *args, **kwargs)


def test_a_second_backward_pass_is_refused_or_announced(tmp_path: Path) -> None:
    optim = "striped_adamw_8bit_layerwise"
    with pytest.raises(RuntimeError, match=r"second gradient.*'gradient_accumulation=true'"):
        run(tmp_path, optim, trainer_class=TwoLosses)
    announced = {"optim_args": "gradient_accumulation=true"}
    layerwise = run(tmp_path, optim, wide_model("llama"), trainer_class=TwoLosses, **announced)
    ordinary = run(tmp_path, "striped_adamw_8bit", wide_model("llama"), trainer_class=TwoLosses)
    assert losses(layerwise) == pytest.approx(losses(ordinary), rel=SCATTER["accumulated"])


def test_checkpointed_layers_that_share_a_matrix(tmp_path: Path) -> None:
    """Reentrant checkpointing completes a gradient once for each of the layers."""

    def changes(reentrant: bool) -> dict[str, Any]:
        kwargs = {"use_reentrant": reentrant}
        return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs} | EXACT

    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        run(tmp_path, "striped_adamw_layerwise", shared(), **changes(True))
    ordinary, layerwise = (
        run(tmp_path, optim, shared(), **changes(False))
        for optim in ("striped_adamw", "striped_adamw_layerwise")
    )
    assert_same(layerwise, ordinary)


class OutOfMemory(Trainer):
    """Runs out of memory after a backward pass of more than four sequences."""

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(model, inputs, *args, **kwargs)
        if len(inputs["input_ids"]) > 4:
            raise RuntimeError("CUDA out of memory.")
        return loss


def test_a_run_begins_again_with_smaller_batches(tmp_path: Path) -> None:
    trainer = run(
        tmp_path,
        "striped_adamw_8bit_layerwise",
        trainer_class=OutOfMemory,
        per_device_train_batch_size=5,
        auto_find_batch_size=True,
    )
    assert trainer.state.train_batch_size <= 4
    assert trainer.state.global_step == 3
    assert losses(trainer)[-1] < losses(trainer)[0]


# -------------------------------------------------------------------------------------------------
# what is refused
# -------------------------------------------------------------------------------------------------

REFUSED = {
    "nesterov": ({"optim_args": "nesterov=true"}, "nesterov=True needs each gradient"),
    "lagged": ({"optim_args": "lagged=true"}, "lagged=True needs each gradient"),
    "fp16": ({"fp16": True}, r"fp16=True: .*bfloat16 \(bf16=True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_are_refused_at_once(tmp_path: Path, name: str) -> None:
    changes, message = REFUSED[name]
    args = arguments(tmp_path, optim="striped_adamw_8bit_layerwise", **changes)
    with pytest.raises(ValueError, match=message):
        optimizer_cls_and_kwargs(args)
    with pytest.raises(ValueError, match=message):
        Trainer.get_optimizer_cls_and_kwargs(args)


def test_accumulation_is_an_argument_of_layerwise_optimizers_only(tmp_path: Path) -> None:
    args = arguments(tmp_path, optim="striped_adamw", optim_args="gradient_accumulation=true")
    with pytest.raises(ValueError, match="unknown key 'gradient_accumulation'"):
        optimizer_cls_and_kwargs(args)


def test_the_public_way(tmp_path: Path) -> None:
    args = arguments(
        tmp_path, optim="striped_adamw_4bit_layerwise", max_steps=2, gradient_accumulation_steps=2
    )
    model = wide_model()
    cls, kwargs = optimizer_cls_and_kwargs(args, model)
    assert cls is LayerwiseStripedAdamW
    assert (kwargs["momentum_dtype"], kwargs["max_grad_norm"]) == ("int4", 1.0)
    assert kwargs["gradient_accumulation"] is True
    args.optim = "adamw_torch"
    trainer = Trainer(model, args, train_dataset=Counting(), optimizer_cls_and_kwargs=(cls, kwargs))
    trainer.add_callback(kept := Kept())
    trainer.train()
    assert kept.names == [[], []]
    assert len(losses(trainer)) == 2
    # as with a name, packed projections are marked
    marked = [p for p in model.parameters() if is_marked(p)]
    assert [p.shape for p in marked] == [(WIDE, 3 * WIDE)] * 2


# -------------------------------------------------------------------------------------------------
# PEFT and TRL
# -------------------------------------------------------------------------------------------------


def test_adapters_and_modules_to_save(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def train(optim: str, callback: TrainerCallback) -> Trainer:
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
        model = peft.get_peft_model(wide_model("llama"), config)
        return run(tmp_path, optim, model, callback, **EXACT)

    ordinary_kept, kept = Kept(), Kept()
    ordinary = train("striped_adamw", ordinary_kept)
    layerwise = train("striped_adamw_layerwise", kept)
    assert_same(layerwise, ordinary)
    (name,) = ordinary_kept.names[0]
    assert "modules_to_save" in name
    assert kept.names == [[], [], []]


def test_sft_trainer(tmp_path: Path) -> None:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    data = [Counting()[i]["input_ids"].tolist() for i in range(32)]

    def train(optim: str) -> Trainer:
        args = trl.SFTConfig(
            str(tmp_path),
            optim=optim,
            max_steps=3,
            per_device_train_batch_size=4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            **EXACT,
        )
        trainer = trl.SFTTrainer(
            wide_model("llama"),
            args=args,
            train_dataset=datasets.Dataset.from_dict({"input_ids": data}),
            processing_class=tiny_tokenizer(),
            callbacks=[kept],
        )
        trainer.train()
        return trainer

    kept = Kept()
    ordinary, layerwise = train("striped_adamw"), train("striped_adamw_layerwise")
    assert_same(layerwise, ordinary)
    assert norms(layerwise) == pytest.approx(norms(ordinary), rel=1e-5)
    assert kept.names[3:] == [[], [], []]


# -------------------------------------------------------------------------------------------------
# accelerate
# -------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator() -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)  # as in a new process
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def loop(
    accelerator: Accelerator, cls: type[StripedAdamW], **options: Any
) -> tuple[PreTrainedModel, list[float], list[float]]:
    """A user's own loop of three steps; returns the model, its losses and norms."""
    model = wide_model("llama")
    optimizer = cls(model.parameters(), lr=1e-3, **options)
    loader = DataLoader(Counting(), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    found: list[float] = []
    norms: list[float] = []
    for _, batch in zip(range(3 * accelerator.gradient_accumulation_steps), loader, strict=False):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norms.append(accelerator.clip_grad_norm_(model.parameters(), 1.0).item())
            optimizer.step()
            optimizer.zero_grad()
        found.append(loss.item())
    return model, found, norms


def test_a_loop_with_an_accelerator(accelerator: Accelerator) -> None:
    _, ordinary, ordinary_norms = loop(accelerator, StripedAdamW)
    _, layerwise, norms = loop(accelerator, LayerwiseStripedAdamW)
    assert layerwise == pytest.approx(ordinary, rel=SCATTER["clipped"])
    assert norms[:2] == pytest.approx(ordinary_norms[:2], rel=1e-3)
    assert len(norms) == 3


def test_an_accelerator_that_accumulates(accelerator: Accelerator) -> None:
    """The optimizer need not be told."""
    accelerator.gradient_accumulation_steps = 4
    _, ordinary, ordinary_norms = loop(accelerator, StripedAdamW, momentum_dtype="int8")
    _, layerwise, norms = loop(accelerator, LayerwiseStripedAdamW, momentum_dtype="int8")
    assert len(layerwise) == 12
    assert layerwise == pytest.approx(ordinary, rel=SCATTER["accumulated"])
    assert norms == pytest.approx(ordinary_norms, rel=0.1)  # estimates


def backward(accelerator: Accelerator, *models: nn.Module) -> None:
    batch = {key: value[None] for key, value in Counting()[0].items()}
    for model in models:
        accelerator.backward(model(**batch).loss)


def test_other_optimizers_of_the_accelerator_are_left_alone(accelerator: Accelerator) -> None:
    models = [wide_model("llama"), wide_model("llama")]
    layerwise = LayerwiseStripedAdamW(models[0].parameters())
    ordinary = torch.optim.AdamW(models[1].parameters())
    *models, _, _ = accelerator.prepare(*models, layerwise, ordinary)
    backward(accelerator, *models)
    norms = [accelerator.clip_grad_norm_(model.parameters(), 0.5).item() for model in models]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    gradients = [param.grad for param in models[1].parameters()]
    assert torch.nn.utils.get_total_norm(gradients).item() == pytest.approx(0.5, rel=1e-4)
    accelerator.clip_grad_value_(models[1].parameters(), 1e-3)
    largest = max(grad.abs().max().item() for grad in gradients)
    assert largest == pytest.approx(1e-3)


def test_clipping_that_needs_gradients_is_refused(accelerator: Accelerator) -> None:
    model, other = wide_model("llama"), nn.Linear(2, 2)
    optimizer = accelerator.prepare(LayerwiseStripedAdamW(model.parameters()))
    backward(accelerator, model)
    params = list(model.parameters())
    with pytest.raises(ValueError, match=r"11 of the 21 parameters .*max_grad_norm=0"):
        accelerator.clip_grad_norm_(params[:10], 1.0)
    with pytest.raises(ValueError, match=r"norm_type=inf: .* norm_type=2"):
        accelerator.clip_grad_norm_(params, 1.0, norm_type=float("inf"))
    with pytest.raises(ValueError, match=r"max_grad_norm=-1.0 is not above zero"):
        accelerator.clip_grad_norm_(params, -1)
    with pytest.raises(ValueError, match=r"clip_grad_value_ .* clip_grad_norm_"):
        accelerator.clip_grad_value_(params, 1.0)
    other(torch.ones(2)).sum().backward()
    with pytest.raises(ValueError, match=r"2 of the 23 parameters have a gradient, .* freeze them"):
        accelerator.clip_grad_norm_([*params, *other.parameters()], 1.0)
    optimizer.step()


def test_parameters_replaced_after_prepare_are_hooked(accelerator: Accelerator) -> None:
    model = wide_model("llama")
    wrapped = accelerator.prepare(LayerwiseStripedAdamW(model.parameters()))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    wrapped.param_groups[0]["params"] = list(model.parameters())
    backward(accelerator, model)
    assert model.lm_head.weight.grad is None


def test_float16_is_refused(accelerator: Accelerator) -> None:
    accelerator.scaler = torch.amp.GradScaler("cpu")  # which accelerate has on GPUs only
    with pytest.raises(ValueError, match=r"mixed_precision='fp16': .* bfloat16"):
        accelerator.prepare(LayerwiseStripedAdamW(wide_model().parameters()))
    accelerator.prepare(StripedAdamW(wide_model().parameters()))


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA"])
def test_what_needs_the_gradients_itself_is_refused(accelerator: Accelerator, name: str) -> None:
    # none of them runs here: what it would set
    accelerator.state.distributed_type = DistributedType[name]
    with pytest.raises(ValueError, match=rf"distributed_type={name}: .* FSDP2"):
        accelerator.prepare(LayerwiseStripedAdamW(wide_model().parameters()))


def test_unknown_internals_of_accelerate_warn() -> None:
    class Changed:
        def prepare(self) -> None: ...

    module: Any = SimpleNamespace(Accelerator=Changed)
    with pytest.warns(
        UserWarning, match=r"KeyError: 'backward'.*do not call accelerator.clip_grad"
    ):
        extend_accelerator(module)


def test_extending_again_changes_nothing() -> None:
    for _ in range(2):
        extend_accelerator(sys.modules["accelerate.accelerator"])
    for name in ("prepare", "backward", "clip_grad_norm_", "clip_grad_value_"):
        method = getattr(Accelerator, name)
        assert not hasattr(method._striped_hf_wraps, "_striped_hf_wraps")


@pytest.mark.slow
@pytest.mark.parametrize("first", ["accelerate", "striped_hf"])
def test_accelerate_alone_knows_it(first: str) -> None:
    """Without Trainer, whichever is imported first."""
    second = {"accelerate": "striped_hf", "striped_hf": "accelerate"}[first]
    script = f"""
        import {first}, {second}, sys
        import torch
        from accelerate import Accelerator
        assert hasattr(Accelerator.clip_grad_norm_, "_striped_hf_wraps")
        assert "transformers.trainer" not in sys.modules
        model = torch.nn.Linear(256, 256)
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(
            model, striped_hf.LayerwiseStripedAdamW(model.parameters())
        )
        accelerator.backward(model(torch.ones(256)).sum())
        assert model.weight.grad is None
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        assert abs(norm - 257**0.5 * 16) < 1e-3, norm
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=600)
