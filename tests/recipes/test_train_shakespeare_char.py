"""The character recipe: its training, its folder, resuming and its errors."""

import json
import math
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny import QUIET, STEPS, TINY, read_run
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from striped_hf.data import open_split

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = "recipes/train_shakespeare_char.py"
pytestmark = pytest.mark.slow


def test_run_folder_is_a_model_folder(tiny_run):
    model = AutoModelForCausalLM.from_pretrained(tiny_run)
    tokenizer = AutoTokenizer.from_pretrained(tiny_run)
    assert model.config.n_positions == 32
    assert model.config.vocab_size == len(tokenizer)
    text = "The statement  has\ntwo lines"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    generate = pipeline("text-generation", model=str(tiny_run), device="cpu")
    out = generate("The ", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert out.startswith("The ")
    assert len(out) == 9


def test_run_json_has_the_measurements(tiny_run, docs_data):
    run = read_run(tiny_run)
    val = open_split(docs_data, "val")
    model = AutoModelForCausalLM.from_pretrained(tiny_run)
    assert (run["optim"], run["optim_args"]) == ("striped_adamw_8bit", "nesterov=true")
    assert run["steps"] == 20
    assert run["tokens"] == 20 * 12 * 32
    assert run["eval_tokens"] == len(val) - 1
    assert run["parameters"] == model.num_parameters()
    assert run["state_bytes_per_param"] == run["state_bytes"] / run["parameters"]
    assert 1 < run["state_bytes_per_param"] < 2
    assert run["peak_memory_mib"] > 100
    assert run["median_step_ms"] > 0
    # it has learned: the loss of a uniform guess is log(vocabulary)
    assert run["eval_loss"] < math.log(val.vocab_size) - 0.5
    assert abs(run["eval_loss"] - run["train_loss"]) < 0.5
    assert run["environment"]["torch"] == torch.__version__


def test_the_model_card_describes_the_run(tiny_run):
    card = ModelCard.load(tiny_run / "README.md")
    run = read_run(tiny_run)
    assert card.data.library_name == "transformers"
    assert card.data.eval_results[0].metric_value == run["eval_loss"]
    for part in ("train_shakespeare_char.py", "`striped_adamw_8bit`", f"{run['eval_loss']:.4f}"):
        assert part in card.text
    assert run["command"] in card.text


def test_resumed_run_equals_the_uninterrupted_one(tiny_run, docs_data, run_script, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run / "checkpoint-10", folder / "checkpoint-10")
    run_script(
        RECIPE,
        *(*TINY, *STEPS, *QUIET, "--data_dir", docs_data, "--output_dir", folder),
        *("--resume_from_checkpoint", "last"),
        cwd=tmp_path,
    )
    resumed, whole = (load_file(f / "model.safetensors") for f in (folder, tiny_run))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert read_run(folder)["eval_loss"] == read_run(tiny_run)["eval_loss"]


def test_resuming_without_a_checkpoint_is_an_error(docs_data, run_here, tmp_path):
    flags = ("--data_dir", docs_data, "--output_dir", tmp_path, "--resume_from_checkpoint", "last")
    run_here(RECIPE, *flags, fails="has no checkpoint yet")


def test_trains_on_data_that_nanogpt_prepared(docs_data, run_here, tmp_path):
    # only a part: without meta.json the model has GPT-2's 50,257 tokens, and all would take long
    for split, count in (("train", 20_000), ("val", 2_000)):
        tokens = (docs_data / f"{split}.bin").read_bytes()[: 2 * count]
        (tmp_path / f"{split}.bin").write_bytes(tokens)
    out = tmp_path / "run"
    flags = ("--max_steps", 2, "--eval_strategy", "no", "--save_strategy", "no")
    flags += ("--load_best_model_at_end", "false", "--data_dir", tmp_path, "--output_dir", out)
    flags += ("--optim", "adamw_torch_fused")
    run_here(RECIPE, *TINY, *QUIET, *flags)
    assert read_run(out)["steps"] == 2
    # AdamW does not accept the default optimizer's arguments
    assert read_run(out)["optim_args"] is None
    assert not (out / "tokenizer.json").exists()
    # meta.pkl has the characters of the data
    symbols = {i: c for c, i in AutoTokenizer.from_pretrained(docs_data).get_vocab().items()}
    meta = {"vocab_size": len(symbols), "itos": symbols, "stoi": {}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    run_here(RECIPE, *TINY, *QUIET, *flags)
    sampled = ("--start", "The ", "--num_samples", 1, "--max_new_tokens", 5)
    assert run_here("recipes/sample.py", out, *sampled).startswith("The ")


def test_runs_under_accelerate_launch(docs_data, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    flags = ("--max_steps", 2, "--eval_steps", 2, "--save_steps", 2, "--data_dir", docs_data)
    command = [*launch, REPOSITORY / RECIPE, *TINY, *QUIET, *flags, "--output_dir", tmp_path]
    finished = subprocess.run(
        list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=1200
    )
    assert finished.returncode == 0, finished.stderr
    assert read_run(tmp_path)["steps"] == 2


def test_missing_data_ends_with_one_line(run_script, tmp_path):
    error = run_script(RECIPE, "--data_dir", tmp_path / "no", cwd=tmp_path, status=1).stderr
    assert "Traceback" not in error
    assert "prepare the data first" in error.splitlines()[-1]


def test_damaged_data_ends_with_one_line(docs_data, run_here, tmp_path):
    data = shutil.copytree(docs_data, tmp_path / "data")
    with (data / "train.bin").open("r+b") as file:
        file.truncate(1000)
    run_here(RECIPE, "--data_dir", data, fails="holds 500 tokens")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--preset", "tpu"), "choose one of gpu, cpu"),
        (("--optim", "striped_adam"), "striped_adamw_8bit"),
        (("--learning", "1"), "--learning"),
    ],
)
def test_wrong_flags_are_named(run_here, flags, message):
    run_here(RECIPE, *flags, fails=message)


def test_logs_have_both_losses(tiny_run):
    state = json.loads((tiny_run / "trainer_state.json").read_text(encoding="utf-8"))
    assert {e["step"] for e in state["log_history"] if "loss" in e} == {10, 20}
    assert {e["step"] for e in state["log_history"] if "eval_loss" in e} == {10, 20}
