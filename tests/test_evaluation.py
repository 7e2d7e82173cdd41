"""The exact loss: every target weighs the same, on one process and on two."""

import json
import math
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel

from striped_hf.data import ContiguousBlocks, open_split, write_data_set
from striped_hf.evaluation import TokenLoss, evaluate_data_set, evaluate_loss, largest_batch

SCRIPT = """
import json, sys, torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM
from striped_hf.data import ContiguousBlocks, collate, open_split
from striped_hf.evaluation import evaluate_loss

accelerator = Accelerator(cpu=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
blocks = ContiguousBlocks(open_split(sys.argv[2], "val"), 32)
blocks = torch.utils.data.Subset(blocks, range(len(blocks) - 7, len(blocks)))
model, loader = accelerator.prepare(model, DataLoader(blocks, batch_size=2, collate_fn=collate))
result = evaluate_loss(model, loader, accelerator) | {"processes": accelerator.num_processes}
if accelerator.is_main_process:
    print(json.dumps(result))
"""


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=11, n_positions=8, n_layer=1, n_head=2, n_embd=8, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def batch(*targets):
    labels = torch.tensor(targets)
    return {"input_ids": labels.clamp(min=0), "shift_labels": labels}


def test_targets_weigh_the_same_in_unequal_batches(model):
    batches = [batch([1, 2, 3, 4], [5, 6, -100, -100]), batch([7, -100, -100, -100])]
    result = evaluate_loss(model, batches, Accelerator(cpu=True))
    losses = []
    model.eval()
    for one in batches:
        log_probabilities = model(one["input_ids"]).logits.double().log_softmax(-1)
        for row, labels in zip(log_probabilities, one["shift_labels"], strict=True):
            losses += [-row[i, t].item() for i, t in enumerate(labels.tolist()) if t != -100]
    assert result["tokens"] == len(losses) == 7
    assert result["loss"] == pytest.approx(sum(losses) / 7, abs=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))


@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_mode_as_it_was(model, training):
    model.train(training)
    evaluate_loss(model, [batch([1, 2])], Accelerator(cpu=True))
    assert model.training is training


def test_no_targets(model):
    with pytest.raises(ValueError, match="no targets"):
        evaluate_loss(model, [batch([-100, -100])], Accelerator(cpu=True))


def test_no_batches(model):
    with pytest.raises(ValueError, match="no targets"):
        evaluate_loss(model, [], Accelerator(cpu=True))


def test_metric_weighs_tokens_and_not_batches():
    metric = TokenLoss(keep_in_memory=True)
    metric.add_batch(losses=[2.0, 12.0], tokens=[1, 4])
    metric.add_batch(losses=[6.0, 0.0], tokens=[3, 0])  # the last one is masked all over
    found = metric.compute()
    # 20 nats of 8 tokens; residuals of the three sequences: -0.5, 2 and -1.5
    assert found["loss"] == 2.5
    assert found["tokens"] == 8
    assert found["perplexity"] == pytest.approx(math.exp(2.5))
    assert found["standard_error"] == pytest.approx(math.sqrt(6.5 * 3 / 2) / 8)


def test_standard_error_is_the_scatter_of_repeated_samples():
    """The tokens of a sequence have much in common: one by one they would tell too little."""
    torch.manual_seed(0)
    means, errors = [], []
    for _ in range(150):
        tokens = torch.randint(1, 40, (50,))
        sums = tokens * (3 + torch.randn(50)) + tokens.sqrt() * torch.randn(50)
        found = TokenLoss(keep_in_memory=True).compute(losses=sums, tokens=tokens)
        means.append(found["loss"])
        errors.append(found["standard_error"])
    scatter = torch.tensor(means).std().item()
    assert sum(errors) / len(errors) == pytest.approx(scatter, rel=0.2)


def test_one_sequence_has_no_standard_error():
    found = TokenLoss(keep_in_memory=True).compute(losses=[3.0], tokens=[2])
    assert found["loss"] == 1.5
    assert found["standard_error"] is None


def test_perplexity_of_a_diverged_model():
    found = TokenLoss(keep_in_memory=True).compute(losses=[1e4, 1e4], tokens=[1, 1])
    assert found["perplexity"] == math.inf


@pytest.fixture
def blocks(tmp_path):
    torch.manual_seed(0)
    ids = torch.randint(11, (100,)).numpy()
    write_data_set(
        tmp_path,
        {"val": ids},
        vocab_size=11,
        source={"name": "numbers", "url": None, "sha256": "0" * 64},
        tokenizer_name="none",
    )
    return ContiguousBlocks(open_split(tmp_path, "val"), 8)


def test_batches_shrink_until_they_fit(model, blocks):
    sizes = []

    def device(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 9:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    accelerator = Accelerator(cpu=True)
    whole = evaluate_data_set(model, blocks, 8, accelerator, "val")
    model.register_forward_pre_hook(device, with_kwargs=True)
    found = evaluate_data_set(model, blocks, 8, accelerator, "val")
    assert sizes == [13, 11, 9, 4]  # and then all of the blocks
    assert found["tokens"] == whole["tokens"] == 99
    assert found["loss"] == pytest.approx(whole["loss"], abs=1e-6)


def test_other_errors_are_no_reason_for_smaller_batches(model, blocks):
    def broken(module, args, kwargs):
        raise RuntimeError("another one")

    model.register_forward_pre_hook(broken, with_kwargs=True)
    with pytest.raises(RuntimeError, match="another one"):
        evaluate_data_set(model, blocks, 8, Accelerator(cpu=True), "val")


@pytest.mark.parametrize(
    ("block_size", "vocab_size", "expected"),
    [(64, 65, 64), (1024, 50257, 1), (512, 5000, 34), (8192, 128256, 1)],
)
def test_largest_batch_of_a_cpu_has_a_gibibyte_of_logits(block_size, vocab_size, expected):
    assert largest_batch(block_size, vocab_size, torch.device("cpu")) == expected


@pytest.mark.slow
def test_two_processes_agree_with_one(tiny_run, docs_data, tmp_path):
    """7 blocks, the last one padded, over 2 processes with batches of 2: one block is a copy."""
    (tmp_path / "two_processes.py").write_text(SCRIPT, encoding="utf-8")
    results = []
    for processes in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        run = subprocess.run(
            [
                sys.executable,
                *launch,
                str(processes),
                "two_processes.py",
                str(tiny_run),
                str(docs_data),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert run.returncode == 0, run.stderr
        results.append(json.loads(run.stdout.splitlines()[-1]))
    one, two = results
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["tokens"] == two["tokens"]
    assert one["loss"] == pytest.approx(two["loss"], abs=1e-6)
