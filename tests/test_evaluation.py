"""The exact loss: every target weighs the same, on one process and on two."""

import json
import math
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel

from striped_hf.evaluation import evaluate_loss

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


@pytest.mark.slow
def test_two_processes_agree_with_one(tiny_run, docs_data, tmp_path):
    """7 blocks, the last one padded, over 2 processes with batches of 2: one block is a copy."""
    (tmp_path / "evaluate.py").write_text(SCRIPT, encoding="utf-8")
    results = []
    for processes in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        run = subprocess.run(
            [sys.executable, *launch, str(processes), "evaluate.py", str(tiny_run), str(docs_data)],
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
