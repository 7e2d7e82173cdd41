"""The recipes' Trainer warns of 16-bit weights that are rounded to nearest."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_runs import Counting, arguments, tiny_model

from benchmarks import weight_rounding
from benchmarks.small_trainings import ADAMW, same_but_seed
from striped_hf.trainer.causal_lm import CausalLMTrainer


class OwnAdamW(torch.optim.AdamW):
    """An optimizer of another package; it may round otherwise."""


def warnings(
    output_dir: Path, caplog: pytest.LogCaptureFixture, dtype: torch.dtype, **changes: Any
) -> list[str]:
    """Trains one step; returns the warnings of rounding."""
    own = changes.pop("optimizer_cls_and_kwargs", None)
    trainer = CausalLMTrainer(
        tiny_model("gpt2").to(dtype),
        arguments(output_dir, max_steps=1, remove_unused_columns=False, **changes),
        train_dataset=Counting(),
        optimizer_cls_and_kwargs=own,
    )
    trainer.train()
    return [m for m in caplog.messages if "to the nearest number" in m]


@pytest.mark.parametrize(
    ("optim", "optim_args", "name"),
    [
        ("adamw_torch_fused", None, "AdamW"),
        ("sgd", None, "SGD"),
        ("adafactor", None, "Adafactor"),
        ("striped_adamw_8bit", "stochastic_rounding=false", "StripedAdamW"),
        (
            "striped_adamw_8bit_layerwise",
            "stochastic_rounding=false",
            "LayerwiseStripedAdamW",
        ),
    ],
)
def test_rounding_to_nearest_is_warned_of_once(tmp_path, caplog, optim, optim_args, name):
    changes = {"optim": optim, "optim_args": optim_args}
    (warning,) = warnings(tmp_path, caplog, torch.bfloat16, **changes)
    assert warning.startswith(f"{name} rounds new bfloat16 weights")
    assert "--optim striped_adamw_8bit" in warning
    assert "--dtype float32" in warning


def test_the_losses_in_the_warning_are_those_of_the_results_file(tmp_path, caplog):
    path = Path(weight_rounding.__file__).parents[1] / weight_rounding.RESULTS
    measured = json.loads(path.read_text(encoding="utf-8"))

    def mean(optim: str, dtype: str) -> str:
        (rows,) = (
            rows
            for rows in same_but_seed(measured)
            if (rows[0]["task"], rows[0]["learning_rate"]) == (weight_rounding.FINETUNE, 3e-5)
            and (rows[0]["optim"], rows[0]["dtype"], rows[0]["options"]) == (optim, dtype, {})
        )
        return f"{statistics.mean(row['eval_loss'] for row in rows):.2f}"

    (warning,) = warnings(tmp_path, caplog, torch.bfloat16, optim="adamw_torch_fused")
    exact, lost = mean(ADAMW, "float32"), mean(ADAMW, "bfloat16")
    assert f"loss of {exact} with float32 weights and of {lost} with bfloat16 weights" in warning
    assert f"reached {mean('striped_adamw_8bit', 'bfloat16')} with bfloat16 weights" in warning


@pytest.mark.parametrize(
    ("optim", "optim_args"),
    [
        ("striped_adamw_8bit", None),
        ("striped_adamw_4bit_layerwise", None),
        # the state has the bits that the weights lose
        ("striped_adamw_8bit", "stochastic_rounding=false,master_bits=24"),
    ],
)
def test_other_rounding_is_not_warned_of(tmp_path, caplog, optim, optim_args):
    changes = {"optim": optim, "optim_args": optim_args}
    assert not warnings(tmp_path, caplog, torch.bfloat16, **changes)


@pytest.mark.parametrize("bf16", [False, True])
def test_float32_weights_are_not_warned_of(tmp_path, caplog, bf16):
    """Autocast computes in bfloat16, and the weights stay float32."""
    assert not warnings(tmp_path, caplog, torch.float32, optim="adamw_torch_fused", bf16=bf16)


def test_float16_weights_are_warned_of(tmp_path, caplog):
    (warning,) = warnings(tmp_path, caplog, torch.float16, optim="sgd")
    assert "float16 weights" in warning


def test_optimizers_of_other_packages_are_not_judged(tmp_path, caplog):
    own = (OwnAdamW, {"lr": 1e-3})
    assert not warnings(tmp_path, caplog, torch.bfloat16, optimizer_cls_and_kwargs=own)
