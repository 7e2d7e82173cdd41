"""The pretraining recipe: its run on one process and on two, and its errors."""

import itertools
import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import QUIET, read_run
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from striped_hf.data import prepare

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = "recipes/pretrain_openwebtext.py"
# 8 windows of 32 a full step, 12 full steps; the batch grows over the first 4 of them
FEW = ("--block_size", 32, "--per_device_train_batch_size", 2, "--max_steps", 12)
FEW += ("--warmup_steps", 2, "--logging_steps", 1, "--eval_steps", 6, "--save_steps", 6)
FEW += ("--batch_size_warmup", 1024, "--optim", "striped_adamw", "--save_total_limit", 5)
FEW += ("--per_device_eval_batch_size", 256, *QUIET)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A small data set of characters: evaluating it takes a moment."""
    folder = tmp_path_factory.mktemp("letters")
    text = "".join(f"{i} times {i} is {i * i}.\n" for i in range(1000))
    prepare.write_characters(folder, text, {"name": "squares", "url": None, "sha256": None})
    return folder


@pytest.fixture(scope="module")
def flags(letters, tmp_path_factory):
    # no dropout: two processes would draw the same masks
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}
    config |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return (*FEW, "--config_name", path, "--data_dir", letters)


@pytest.fixture(scope="module")
def one_process(flags, run_script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    accumulation = ("--gradient_accumulation_steps", 4)
    done = run_script(RECIPE, *flags, *accumulation, "--output_dir", folder, cwd=folder)
    return folder, done.stdout


def history(folder):
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry for entry in state["log_history"] if "loss" in entry]


def test_a_runs_length_is_counted_in_tokens(one_process):
    folder, out = one_process
    run, log = read_run(folder), history(folder)
    assert "256 tokens a full step" in out
    assert "3,072 tokens in all" in out
    assert run["tokens"] == log[-1]["num_input_tokens_seen"] == 12 * 256
    assert run["steps"] == len(log) > 12
    tokens = [0, *(entry["num_input_tokens_seen"] for entry in log)]
    sizes = [(after - before) // 64 for before, after in itertools.pairwise(tokens)]
    assert sizes[0] == 1
    assert sorted(sizes[:-1]) == sizes[:-1]
    assert set(sizes) == {1, 2, 3, 4}
    assert run["eval_loss"] < log[0]["loss"] - 0.1
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == 64  # the number of characters, rounded up to a multiple of 64
    assert model.config.n_positions == 32
    assert model.dtype == torch.float32
    AutoTokenizer.from_pretrained(folder)


def test_two_processes_have_the_losses_of_one(one_process, flags, run_script, tmp_path):
    """Each process has half of every batch, and the batches grow in the same way."""
    results = tmp_path / "results.json"
    own = ("--batch_size", 2, "--processes", 2, "--optim", "striped_adamw", "--results", results)
    own += ("--", *flags, "--gradient_accumulation_steps", 4)
    recipe = REPOSITORY / RECIPE
    run_script("benchmarks.processes", recipe, *own, cwd=tmp_path)
    (two,) = json.loads(results.read_text())["runs"]
    one = history(one_process[0])
    assert two["processes"] == 2
    assert two["losses"] == pytest.approx([entry["loss"] for entry in one], rel=1e-5)
    assert two["tokens"] == one[-1]["num_input_tokens_seen"]
    assert two["eval_loss"] == pytest.approx(read_run(one_process[0])["eval_loss"], rel=1e-5)


def test_a_batch_that_does_not_divide_evenly_is_an_error(run_here):
    own = ("--batch_size", 3, "--processes", 1, 2)
    run_here("benchmarks.processes", RECIPE, *own, fails="divide evenly among 2 processes")


def test_resumed_run_equals_the_uninterrupted_one(one_process, flags, tmp_path, run_here):
    whole, folder = one_process[0], tmp_path / "run"
    shutil.copytree(whole / "checkpoint-12", folder / "checkpoint-12")
    resume = ("--resume_from_checkpoint", "last", "--gradient_accumulation_steps", 4)
    run_here(RECIPE, *flags, *resume, "--output_dir", folder)
    resumed, expected = (load_file(f / "model.safetensors") for f in (folder, whole))
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert read_run(folder)["tokens"] == read_run(whole)["tokens"]
    keys = ("step", "loss", "learning_rate", "num_input_tokens_seen")
    resumed, expected = ([[e[k] for k in keys] for e in history(f)] for f in (folder, whole))
    assert resumed == expected


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_other_architectures(letters, tmp_path, run_here, name):
    """The recipe's configurations have GPT-2's size, and smaller versions of them train."""
    path = REPOSITORY / "recipes" / "configs" / f"{name}_124m.json"
    config = AutoConfig.from_pretrained(path, vocab_size=50304)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    assert 123e6 < parameters < 125e6
    small = json.loads(path.read_text()) | {"num_hidden_layers": 1, "hidden_size": 24}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}
    small |= {"head_dim": 12, "dtype": "bfloat16", "pad_token_id": 1000}
    (tmp_path / "small.json").write_text(json.dumps(small))
    own = ("--config_name", tmp_path / "small.json", "--data_dir", letters)
    flags = (*FEW, *own, "--gradient_accumulation_steps", 4, "--learning_rate", 5e-3)
    run_here(RECIPE, *flags, "--output_dir", tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.config.model_type == name
    assert (model.config.vocab_size, model.config.max_position_embeddings) == (64, 32)
    assert model.dtype == torch.float32  # whatever the configuration has
    log = history(tmp_path / "run")
    assert log[-1]["loss"] < log[0]["loss"] - 0.3


def test_defaults_are_nanogpts(monkeypatch):
    """The defaults on one process and on 8 are nanoGPT's."""
    for processes in (1, 8):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        defaults = runpy.run_path(str(REPOSITORY / RECIPE))["DEFAULTS"]
        batch = defaults["per_device_train_batch_size"] * defaults["gradient_accumulation_steps"]
        assert batch * processes * 1024 == 491_520
    assert defaults["max_steps"] * 491_520 == 294_912_000_000


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--model", "gpt3"), "--model gpt3: choose one of gpt2, gpt2-medium"),
        (("--config_name", "no/such/folder"), "cannot load no/such/folder"),
        (("--batch_size_warmup", 10**12), "batch_size_warmup=1000000000000: pass"),
        (("--data_dir", "no"), "no does not exist: prepare the data first"),
    ],
)
def test_mistakes_end_with_one_line(flags, run_here, wrong, message):
    if wrong[0] == "--model":
        at = flags.index("--config_name")
        flags = (*flags[:at], *flags[at + 2 :])
    run_here(RECIPE, *flags, *wrong, "--output_dir", "run", fails=message)
