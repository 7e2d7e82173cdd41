"""The recipes' Trainer: losses without whole logits, no waits for a device, and logged losses."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_runs import Counting, arguments, losses, tiny_model
from transformers import TrainerCallback

import striped_hf.losses
from striped_hf.trainer.causal_lm import CausalLMTrainer


def shifted(index: int) -> dict[str, torch.Tensor]:
    ids = Counting()[index]["input_ids"]
    labels = ids.roll(-1)
    labels[-1 - index % 3 :] = -100  # windows with different numbers of targets
    return {"input_ids": ids, "labels": labels, "shift_labels": labels}


DATA = [shifted(i) for i in range(len(Counting()))]


def trained(output_dir: Path, kind: str = "gpt2", chunked: bool = True, **changes: Any) -> Any:
    callbacks = changes.pop("callbacks", None)
    changes = {"remove_unused_columns": False, "gradient_accumulation_steps": 2, **changes}
    trainer = CausalLMTrainer(
        tiny_model(kind),
        arguments(output_dir, **{"optim": "striped_adamw_8bit", **changes}),
        train_dataset=DATA,
        eval_dataset=DATA,
        callbacks=callbacks,
    )
    trainer.chunked_loss = chunked
    trainer.model.config.pad_token_id = None  # transformers searches for padding to warn of it
    trainer.train()
    return trainer


class Logits(TorchDispatchMode):
    """Notes whether any product gives logits for a whole batch."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.sought, self.found = (rows, columns), False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.ndim > 1:
            self.found |= (out.numel() // out.shape[-1], out.shape[-1]) == self.sought
        return out


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_is_the_same_without_whole_logits(tmp_path, monkeypatch, kind, dtype):
    changes = {"bf16": dtype == "bfloat16", "max_steps": 4, "optim": "sgd"}
    whole = trained(tmp_path, kind, chunked=False, **changes)
    monkeypatch.setattr(striped_hf.losses, "_CHUNK_LOGITS", 1 << 11)  # elements, of 8 x 16 x 64
    with Logits(8 * 16, 64) as logits:
        chunked = trained(tmp_path, kind, **changes)
    assert chunked.chunked_loss
    assert kind == "llama" or not logits.found  # the MLP is as wide as the vocabulary
    exact = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.01, "atol": 0.01}
    torch.testing.assert_close(losses(chunked), losses(whole), **exact)
    torch.testing.assert_close(chunked.model.state_dict(), whole.model.state_dict(), **exact)
    # outside training the model returns logits
    ids = torch.zeros(1, 4, dtype=torch.long)
    assert chunked.model(input_ids=ids).logits.shape == (1, 4, 64)
    assert chunked.evaluate()["eval_loss"] == pytest.approx(whole.evaluate()["eval_loss"], rel=0.01)


def test_the_check_above_finds_whole_logits(tmp_path):
    with Logits(8 * 16, 64) as logits:
        trainer = trained(tmp_path, max_steps=1)
    assert logits.found  # small logits: chunks would save nothing
    assert not trainer.chunked_loss


def test_other_losses_keep_their_logits(tmp_path, monkeypatch):
    monkeypatch.setattr(striped_hf.losses, "_CHUNK_LOGITS", 1 << 11)
    trainer = trained(tmp_path, max_steps=1, label_smoothing_factor=0.1)
    assert not trainer.chunked_loss


@pytest.mark.slow
def test_a_compiled_model_has_the_same_losses(tmp_path, monkeypatch):
    monkeypatch.setattr(striped_hf.losses, "_CHUNK_LOGITS", 1 << 11)
    changes = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
    eager = trained(tmp_path, **changes)
    torch._dynamo.reset()
    compiled = trained(tmp_path, torch_compile=True, torch_compile_backend="aot_eager", **changes)
    assert compiled.chunked_loss
    torch.testing.assert_close(losses(compiled), losses(eager), rtol=1e-3, atol=0)


class Waiting(TorchDispatchMode):
    """Counts the operations that would wait for a GPU: Python reads the value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.by_step = 0, dict.fromkeys(range(1, 9), 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and self.step:
            self.by_step[self.step] += 1
        return func(*args, **(kwargs or {}))


class Steps(TrainerCallback):
    def __init__(self, waiting: Waiting) -> None:
        self.waiting = waiting

    def on_step_begin(self, args, state, control, **kwargs):
        self.waiting.step = state.global_step + 1

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.waiting.step = 0  # the optimizer reads its step counts, which are on the CPU

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.waiting.step = state.global_step + 1


@pytest.mark.parametrize("filtered", [False, True])
def test_no_step_waits_for_the_device(tmp_path, filtered):
    with Waiting() as waiting:
        trained(
            tmp_path,
            logging_steps=4,
            logging_nan_inf_filter=filtered,
            callbacks=[Steps(waiting)],
        )
    between = [waiting.by_step[step] for step in (2, 3, 5, 6, 7)]
    if filtered:  # Trainer's default, which this test must detect
        assert all(between)
    else:
        assert between == [0] * 5
        assert waiting.by_step[8]  # Trainer reads the loss to log it


def test_losses_after_one_that_is_not_finite_are_logged(tmp_path):
    class Poisoned(CausalLMTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step == 1 else loss

    args = arguments(
        tmp_path,
        max_steps=4,
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
        optim="sgd",
    )
    trainer = Poisoned(tiny_model("gpt2"), args, train_dataset=DATA)
    # keep the gradient of a NaN out of the weights, like a float16 gradient scaler
    for param in trainer.model.parameters():
        param.register_hook(lambda grad: grad.nan_to_num(0.0))
    trainer.train()
    assert [math.isnan(loss) for loss in losses(trainer)] == [False, True, False, False]


def test_operations_are_counted_as_in_trainer(tmp_path):
    trainer = trained(tmp_path, max_steps=2)
    inputs = {"input_ids": torch.zeros(3, 5, dtype=torch.long)}
    expected = super(CausalLMTrainer, trainer).floating_point_ops(inputs)
    assert trainer.floating_point_ops(inputs) == expected
    assert trainer.state.total_flos == expected / 15 * 2 * 2 * 8 * 16
