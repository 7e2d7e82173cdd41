"""Real ``Trainer`` runs with each name: common features of training, and resuming."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_runs import NAMES, arguments, losses, optimizer_of, tiny_model, train
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from striped_hf import StripedAdamW
from striped_hf.optim import momentum

MODELS = ("gpt2", "llama")
every_run = [
    pytest.mark.parametrize("name", NAMES),
    pytest.mark.parametrize("kind", MODELS),
]


def for_every_run(test: Any) -> Any:
    for mark in every_run:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run without any of the features, once for each model and name."""

    @cache
    def run(kind: str, name: str) -> Trainer:
        return train(kind, tmp_path_factory.mktemp("plain"), optim=name)

    return run


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return dict(trainer.model.state_dict())


def assert_same(left: Any, right: Any) -> None:
    """Asserts equal bits and dtypes, also inside dicts and lists."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    else:
        assert left == right


@for_every_run
def test_a_name_trains_with_its_momentum(plain: Any, kind: str, name: str) -> None:
    trainer = plain(kind, name)
    optimizer = optimizer_of(trainer)
    assert type(optimizer) is StripedAdamW
    for group in optimizer.param_groups:
        assert group["momentum_dtype"] == NAMES[name]
        for param in group["params"]:
            # some matrices of this model are too small for codes
            stored = momentum.storage_format(param.shape, NAMES[name])
            assert ("exp_avg_scale" in optimizer.state[param]) == (stored in ("int8", "int4"))
    matrices = [p for group in optimizer.param_groups for p in group["params"] if p.dim() == 2]
    assert {momentum.storage_format(p.shape, NAMES[name]) for p in matrices} == {NAMES[name]}
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.4


@for_every_run
def test_accumulated_gradients_train_like_one_batch(
    plain: Any, tmp_path: Path, kind: str, name: str
) -> None:
    # dropout would draw different masks
    changes = {"optim": name, "max_steps": 4}
    halves, whole = (
        train_without_dropout(kind, tmp_path, **changes, **batch)
        for batch in (
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
            {"per_device_train_batch_size": 8},
        )
    )
    assert optimizer_of(halves).state[next(halves.model.parameters())]["step"] == 4
    torch.testing.assert_close(losses(halves), losses(whole), rtol=1e-3, atol=0)


def train_without_dropout(kind: str, output_dir: Path, **changes: Any) -> Trainer:
    from trainer_runs import Counting

    model = tiny_model(kind)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer = Trainer(model, arguments(output_dir, **changes), train_dataset=Counting())
    trainer.train()
    return trainer


@for_every_run
def test_the_optimizer_sees_clipped_gradients(tmp_path: Path, kind: str, name: str) -> None:
    trainer = train(kind, tmp_path, optim=name, max_steps=1, max_grad_norm=0.1)
    assert trainer.state.log_history[0]["grad_norm"] > 0.5  # the logged norm is before clipping
    optimizer = optimizer_of(trainer)
    squares = 0.0
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state[param]
            stored = momentum.storage_format(param.shape, group["momentum_dtype"])
            exp_avg = momentum.decode(
                state["exp_avg"], state.get("exp_avg_scale"), stored, param.shape[-1]
            )
            squares += exp_avg.square().sum().item()
    # after one step the momentum is (1 - beta1) times the gradient
    assert squares**0.5 / 0.1 == pytest.approx(0.1, rel=0.03)


@for_every_run
def test_bf16_autocast_keeps_float32_weights_and_trains(
    plain: Any, tmp_path: Path, kind: str, name: str
) -> None:
    trainer = train(kind, tmp_path, optim=name, bf16=True)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert losses(trainer) != losses(plain(kind, name))  # the forward pass was in bf16
    torch.testing.assert_close(losses(trainer), losses(plain(kind, name)), rtol=0.03, atol=0)


@for_every_run
def test_gradient_checkpointing_changes_nothing(
    plain: Any, tmp_path: Path, kind: str, name: str
) -> None:
    trainer = train(kind, tmp_path, optim=name, gradient_checkpointing=True)
    assert trainer.model.is_gradient_checkpointing
    torch.testing.assert_close(losses(trainer), losses(plain(kind, name)), rtol=1e-3, atol=0)


@pytest.mark.slow
@for_every_run
def test_torch_compile_changes_little(plain: Any, tmp_path: Path, kind: str, name: str) -> None:
    # Trace only: generating kernels takes minutes. The test is for the search of parameters in the
    # wrapped model.
    trainer = train(
        kind,
        tmp_path,
        optim=name,
        torch_compile=True,
        torch_compile_backend="aot_eager",
        max_steps=3,
    )
    assert isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)
    compiled, eager = (optimizer_of(run) for run in (trainer, plain(kind, name)))
    for ours, theirs in zip(compiled.param_groups, eager.param_groups, strict=True):
        for key in ("blocks", "weight_decay", "momentum_dtype"):
            assert ours[key] == theirs[key]
    # the schedule is shorter
    expected = losses(plain(kind, name))[:3]
    torch.testing.assert_close(losses(trainer), expected, rtol=0.02, atol=0)


@for_every_run
def test_the_best_model_is_loaded_at_the_end(tmp_path: Path, kind: str, name: str) -> None:
    trainer = train(
        kind,
        tmp_path,
        optim=name,
        # the learning rate rises steeply, so an early checkpoint is the best one
        lr_scheduler_type="constant",
        learning_rate=0.1,
        max_steps=6,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
    )
    evaluated = {
        entry["step"]: entry["eval_loss"]
        for entry in trainer.state.log_history
        if "eval_loss" in entry
    }
    best = min(evaluated, key=lambda step: evaluated[step])
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[best])


@for_every_run
def test_a_resumed_run_equals_the_run_without_a_stop(tmp_path: Path, kind: str, name: str) -> None:
    whole = train(kind, tmp_path / "whole", optim=name, save_strategy="steps", save_steps=3)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    rest = train(kind, tmp_path / "rest", resume_from=checkpoint, optim=name)
    assert rest.state.global_step == whole.state.global_step == 8
    assert_same(weights(rest), weights(whole))
    assert_same(optimizer_of(rest).state_dict(), optimizer_of(whole).state_dict())
    assert losses(rest) == losses(whole)


def test_master_bits_of_a_bfloat16_model_are_resumed(tmp_path: Path) -> None:
    changes = {"optim": "striped_adamw_8bit", "dtype": torch.bfloat16, "learning_rate": 1e-5}
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = train("llama", tmp_path / "whole", **changes, **saving, optim_args="master_bits=24")
    kept = [state["param_low_bits"] for state in optimizer_of(whole).state.values()]
    assert any(low.dtype == torch.int8 and low.any() for low in kept)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    rest = train("llama", tmp_path, checkpoint, **changes, optim_args="master_bits=24")
    assert_same(weights(rest), weights(whole))
    assert_same(optimizer_of(rest).state_dict(), optimizer_of(whole).state_dict())
    with pytest.raises(ValueError, match=r"master_bits=24.*construct it with master_bits=24"):
        train("llama", tmp_path, checkpoint, **changes)


@pytest.mark.parametrize("other", ["striped_adamw_8bit", "striped_adamw_4bit"])
def test_resuming_with_another_momentum_format_is_an_error(tmp_path: Path, other: str) -> None:
    train("gpt2", tmp_path, optim="striped_adamw", max_steps=2, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match=r"momentum_dtype='float32'.*momentum_dtype='int"):
        train("gpt2", tmp_path, resume_from=tmp_path / "checkpoint-1", optim=other)


@pytest.mark.parametrize(
    ("optim", "name"),
    [*(("adamw_torch", name) for name in NAMES), ("adamw_torch_fused", "striped_adamw_8bit")],
)
@pytest.mark.parametrize("kind", MODELS)
def test_a_run_that_began_with_adamw_continues(
    begun: Any, tmp_path: Path, kind: str, optim: str, name: str
) -> None:
    adamw, checkpoint, changes = begun(kind, optim)
    striped = train(kind, tmp_path, resume_from=checkpoint, optim=name, **changes)
    assert type(optimizer_of(striped)) is StripedAdamW
    for state in optimizer_of(striped).state.values():
        assert state["step"] == 24
    # every group follows the schedule
    assert len({group["lr"] for group in optimizer_of(striped).param_groups}) == 1
    assert max(losses(striped)[12:]) < losses(adamw)[11] + 0.05
    torch.testing.assert_close(losses(striped)[12:], losses(adamw)[12:], rtol=0.05, atol=0)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of AdamW with a checkpoint in the middle, once for each model and kind of AdamW."""

    @cache
    def run(kind: str, optim: str) -> tuple[Trainer, Path, dict[str, Any]]:
        changes = {"max_steps": 24, "learning_rate": 3e-3}
        folder = tmp_path_factory.mktemp(optim)
        adamw = train(kind, folder, optim=optim, save_strategy="steps", save_steps=12, **changes)
        return adamw, folder / "checkpoint-12", changes

    return run


def test_a_finished_run_resumes_from_its_last_checkpoint(tmp_path: Path) -> None:
    changes = {"optim": "striped_adamw_8bit", "save_strategy": "steps", "save_steps": 4}
    train("gpt2", tmp_path, max_steps=4, lr_scheduler_type="constant", **changes)
    last = get_last_checkpoint(str(tmp_path))
    assert last is not None
    longer = train("gpt2", tmp_path, Path(last), lr_scheduler_type="constant", **changes)
    assert longer.state.global_step == 8
    assert losses(longer)[-1] < losses(longer)[0]
