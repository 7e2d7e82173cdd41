"""Growing batches: their sizes, tokens and learning rates, against a plain loop, and resumed."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments, set_seed

from striped_hf.data import RandomWindows, collate, open_split, write_data_set
from striped_hf.trainer.pretraining import PretrainingTrainer, growing_accumulation

BLOCK, BATCH, FULL, STEPS, WARMUP_STEPS = 16, 2, 5, 8, 3
ROUND = BATCH * BLOCK  # tokens
GROWTH = 12 * ROUND


@pytest.fixture
def windows(tmp_path):
    tokens = (np.arange(3000) + np.random.default_rng(0).integers(0, 3, 3000)) % 40
    write_data_set(
        tmp_path / "data",
        {"train": tokens, "val": tokens[:100]},
        vocab_size=40,
        source={"name": "counting", "url": None, "sha256": None},
        tokenizer_name="numbers",
    )
    return RandomWindows(open_split(tmp_path / "data", "train"), BLOCK, STEPS * FULL * BATCH, 7)


def make_model(dropout=0.0):
    set_seed(1)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64,
            n_positions=BLOCK,
            n_layer=1,
            n_head=2,
            n_embd=16,
            **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout),
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def make_trainer(windows, folder, growth=GROWTH, model=None, **settings):
    settings = {
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine_warmup_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": WARMUP_STEPS,
        "weight_decay": 0.0,
        "adam_epsilon": 1e-4,  # otherwise steps on gradients near 0 have full size
        "max_grad_norm": 0.5,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": FULL,
        "logging_steps": 1,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **settings,
    }
    return PretrainingTrainer(
        model=model or make_model(),
        args=TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=windows,
        eval_dataset=windows,
        data_collator=collate,
        batch_size_warmup=growth,
    )


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def rate(tokens):
    """The schedule's rate at a token, counted in full steps; it stays at the minimum at the end."""
    step = tokens // (FULL * ROUND)
    if step < WARMUP_STEPS:
        return 1e-2 * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS + 1) / (STEPS - WARMUP_STEPS)
    return 1e-3 + 0.5 * (1 + math.cos(math.pi * progress)) * 9e-3


@pytest.mark.parametrize(
    ("full", "total", "warmup"), [(5, 40, 12), (40, 4000, 1000.5), (8, 24, 24), (40, 400, 0.3)]
)
def test_batches_grow_linearly_with_the_tokens(full, total, warmup):
    sizes = growing_accumulation(full, total, warmup)
    assert sizes.sum() == total
    before = sizes.cumsum() - sizes
    assert sizes[0] == 1
    for size, done in zip(sizes[:-1], before[:-1], strict=True):
        exact = full if done >= warmup else 1 + (full - 1) * done / warmup
        assert exact - 1 < size <= exact
    assert 0 < sizes[-1] <= full


def test_training_equals_a_plain_loop(windows, tmp_path):
    """Losses, weights, learning rates and token counts are equal in every step."""
    trainer = make_trainer(windows, tmp_path)
    trainer.train()

    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.0, eps=1e-4)
    start, losses, rates, tokens = 0, [], [], []
    total = STEPS * FULL * BATCH
    while start < total:
        rounds = min(FULL, 1 + (FULL - 1) * start * BLOCK // GROWTH)
        end = min(start + rounds * BATCH, total)
        batch = windows.__getitems__(range(start, end))
        logits = model(input_ids=batch["input_ids"]).logits
        loss = cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        rates.append(rate(start * BLOCK))
        optimizer.param_groups[0]["lr"] = rates[-1]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        start = end
        tokens.append(start * BLOCK)

    assert len(losses) > STEPS + 3
    assert trainer.state.global_step == trainer.args.max_steps == len(losses)
    entries = logged(trainer)
    assert [entry["num_input_tokens_seen"] for entry in entries] == tokens
    assert [entry["learning_rate"] for entry in entries] == pytest.approx(rates, rel=1e-12)
    # transformers 4.57 rounds logged figures to 4 digits
    assert [entry["loss"] for entry in entries] == pytest.approx(losses, rel=2e-5)
    for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_full_batches_equal_accumulation_in_trainer(windows, tmp_path):
    """Without growth all batches are full; with growth over one token all but the first one are."""
    plain = make_trainer(windows, tmp_path, growth=0)
    plain.train()
    assert plain.args.gradient_accumulation_steps == FULL
    assert len(logged(plain)) == STEPS
    tokens = [entry["num_input_tokens_seen"] for entry in logged(plain)]
    assert tokens == [step * FULL * ROUND for step in range(1, STEPS + 1)]
    rates = [rate(count - FULL * ROUND) for count in tokens]
    assert [e["learning_rate"] for e in logged(plain)] == pytest.approx(rates, rel=1e-12)
    grown = make_trainer(windows, tmp_path, growth=1, lr_scheduler_type="constant")
    assert grown.args.max_steps == STEPS + 1


@pytest.mark.parametrize("growth", [GROWTH, 0])
def test_resumed_run_equals_the_uninterrupted_one(windows, tmp_path, growth):
    flags = {"save_strategy": "steps", "save_steps": 5, "optim": "striped_adamw_8bit"}
    whole = make_trainer(windows, tmp_path, growth, make_model(dropout=0.1), **flags)
    whole.train()
    again = make_trainer(windows, tmp_path, growth, make_model(dropout=0.1), **flags)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    keys = ("step", "loss", "learning_rate", "num_input_tokens_seen")
    assert [[e[k] for k in keys] for e in logged(again)] == [
        [e[k] for k in keys] for e in logged(whole)
    ]
    for ours, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("growth", "settings", "message"),
    [
        (-1, {}, "batch_size_warmup=-1: pass a number of tokens up to the run's 1,280"),
        (1281, {}, "batch_size_warmup=1281: pass"),
        (100, {"gradient_accumulation_steps": 1}, "gradient_accumulation_steps is 1"),
    ],
)
def test_impossible_growth_is_an_error(windows, tmp_path, growth, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(windows, tmp_path, growth, **settings)


def test_a_schedule_that_is_not_a_function_of_the_step_is_an_error(windows, tmp_path):
    settings = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": None}
    settings |= {"eval_strategy": "steps", "eval_steps": 100}
    trainer = make_trainer(windows, tmp_path, **settings)
    with pytest.raises(
        ValueError, match=r"lr_scheduler_type=.*a function of the step: pass another"
    ):
        trainer.train()
