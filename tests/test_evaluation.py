"""The exact loss: every target has the same weight, on one process and on two."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from striped_hf.data import ContiguousBlocks, open_split, write_data_set
from striped_hf.evaluation import evaluate_data_set, evaluate_loss, largest_batch, mean_token_loss
from striped_hf.metric import TokenLoss

SCRIPT = """
import json, sys, torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM
from striped_hf.cli import run
from striped_hf.data import ContiguousBlocks, collate, open_split
from striped_hf.evaluation import evaluate_loss

def main():
    accelerator = Accelerator(cpu=True)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    blocks = ContiguousBlocks(open_split(sys.argv[2], "val"), 32)
    blocks = torch.utils.data.Subset(blocks, range(len(blocks) - 7, len(blocks)))
    model, loader = accelerator.prepare(model, DataLoader(blocks, batch_size=2, collate_fn=collate))
    result = evaluate_loss(model, loader, accelerator) | {"processes": accelerator.num_processes}
    if accelerator.is_main_process:
        print(json.dumps(result))

run(main)
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


def test_targets_have_the_same_weight_in_unequal_batches(model):
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


def large_vocabulary(kind):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50_257, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        config = GPT2Config(n_positions=64, n_layer=1, n_head=1, n_embd=8, **sizes)
        return GPT2LMHeadModel(config)
    # this model caps its logits before the loss, so the loss must use the model's logits
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    sizes |= {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, **heads}
    return Gemma2ForCausalLM(Gemma2Config(final_logit_softcapping=0.5, **sizes))


@pytest.fixture
def own_accelerator():
    """A new accelerator; all accelerators of a process share the precision that this test sets."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("own_accelerator")
@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_losses_in_chunks_equal_the_losses_from_whole_logits(kind, mixed_precision):
    """There are several chunks of positions, and sequences without a target."""
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    model = accelerator.prepare_model(large_vocabulary(kind).eval(), evaluation_mode=True)
    labels = torch.randint(50_257, (16, 64))
    labels[3] = labels[5, 40:] = -100
    inputs = {"input_ids": labels.clamp(min=0), "shift_labels": labels}
    before = model.loss_function
    found = evaluate_loss(model, [inputs], accelerator)
    with torch.no_grad():
        logits = model(inputs["input_ids"]).logits
    assert logits.shape == (16, 64, 50_257)  # the model has its output layer again
    assert model.loss_function is before
    losses = torch.nn.functional.cross_entropy(
        logits.double().flatten(0, 1), labels.flatten(), reduction="none"
    ).view(labels.shape)
    whole = mean_token_loss(losses.sum(1).tolist(), (labels != -100).sum(1).tolist())
    assert found.pop("standard_error") == pytest.approx(whole.pop("standard_error"), rel=1e-4)
    assert found == pytest.approx(whole, rel=1e-6)


MEMORY = """
import torch
from accelerate import Accelerator
from test_evaluation import large_vocabulary
from striped_hf.evaluation import evaluate_loss
from benchmarks.measuring import return_freed_memory, temporary_bytes

return_freed_memory()
model = large_vocabulary("gpt2")
labels = torch.randint(50_257, (64, 64))
batch = {"input_ids": labels, "shift_labels": labels}
accelerator = Accelerator(cpu=True)
evaluate_loss(model, [{name: ids[:1] for name, ids in batch.items()}], accelerator)
print(temporary_bytes(torch.device("cpu"), lambda: evaluate_loss(model, [batch], accelerator)))
"""


@pytest.mark.slow
def test_the_whole_logits_are_never_in_memory():
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", MEMORY],
        cwd=here,
        env=os.environ | {"PYTHONPATH": f"{here.parent}:{here}"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    if run.stdout.strip() == "None":
        pytest.skip("this system does not tell a process's peak memory")
    whole = 64 * 64 * 50_257 * 4
    assert int(run.stdout) < 0.5 * whole, f"{int(run.stdout) >> 20} MiB of {whole >> 20}"


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_stays_the_same(model, training):
    model.train(training)
    evaluate_loss(model, [batch([1, 2])], Accelerator(cpu=True))
    assert model.training is training


def test_data_without_targets_is_an_error(model):
    with pytest.raises(ValueError, match="no targets"):
        evaluate_loss(model, [batch([-100, -100])], Accelerator(cpu=True))


def test_data_without_batches_is_an_error(model):
    with pytest.raises(ValueError, match="no targets"):
        evaluate_loss(model, [], Accelerator(cpu=True))


def test_the_metric_weights_tokens_not_batches():
    metric = TokenLoss(keep_in_memory=True)
    metric.add_batch(losses=[2.0, 12.0], tokens=[1, 4])
    metric.add_batch(losses=[6.0, 0.0], tokens=[3, 0])  # the last sequence has no targets
    found = metric.compute()
    # 20 nats over 8 tokens; residuals of the three sequences: -0.5, 2 and -1.5
    assert found["loss"] == 2.5
    assert found["tokens"] == 8
    assert found["perplexity"] == pytest.approx(math.exp(2.5))
    assert found["standard_error"] == pytest.approx(math.sqrt(6.5 * 3 / 2) / 8)


def test_standard_error_is_the_scatter_of_repeated_samples():
    """Tokens of a sequence are not independent: their scatter would be too small."""
    torch.manual_seed(0)
    means, errors = [], []
    for _ in range(150):
        tokens = torch.randint(1, 40, (50,))
        sums = tokens * (3 + torch.randn(50)) + tokens.sqrt() * torch.randn(50)
        found = mean_token_loss(sums.tolist(), tokens.tolist())
        means.append(found["loss"])
        errors.append(found["standard_error"])
    scatter = torch.tensor(means).std().item()
    assert sum(errors) / len(errors) == pytest.approx(scatter, rel=0.2)


def test_one_sequence_has_no_standard_error():
    found = mean_token_loss([3.0], [2])
    assert found["loss"] == 1.5
    assert found["standard_error"] is None


def test_the_perplexity_of_a_diverged_model_is_infinite():
    found = mean_token_loss([1e4, 1e4], [1, 1])
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
    assert sizes == [13, 11, 9, 4]  # and then all blocks
    assert found["tokens"] == whole["tokens"] == 99
    assert found["loss"] == pytest.approx(whole["loss"], abs=1e-6)


def test_other_errors_do_not_make_batches_smaller(model, blocks):
    def broken(module, args, kwargs):
        raise RuntimeError("another one")

    model.register_forward_pre_hook(broken, with_kwargs=True)
    with pytest.raises(RuntimeError, match="another one"):
        evaluate_data_set(model, blocks, 8, Accelerator(cpu=True), "val")


@pytest.mark.parametrize(
    ("block_size", "width", "expected"),
    [(64, 65, 64), (1024, 50257, 1), (512, 5000, 34), (8192, 128256, 1)],
)
def test_the_largest_batch_on_a_cpu_has_a_gibibyte_of_logits(block_size, width, expected):
    assert largest_batch(block_size, width, torch.device("cpu")) == expected


@pytest.mark.slow
def test_two_processes_agree_with_one(tiny_run, docs_data, tmp_path):
    """2 processes with batches of 2 evaluate 7 blocks: the last is padded, and one is a copy."""
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
            timeout=1200,
        )
        assert run.returncode == 0, run.stderr
        results.append(json.loads(run.stdout.splitlines()[-1]))
    one, two = results
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["tokens"] == two["tokens"]
    assert one["loss"] == pytest.approx(two["loss"], abs=1e-6)
