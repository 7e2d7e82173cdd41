"""The baselines' losses against an independent computation, token by token."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from recipes.eval_baselines import render
from striped_hf.data import write_data_set
from striped_hf.data.prepare import character_tokenizer, write_characters

RECIPE = "recipes/eval_baselines.py"
SMALL = ("--block_size", 8, "--results", "results.json")


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    write_data_set(
        tmp_path / "numbers",
        {"train": rng.integers(11, size=101), "val": rng.integers(11, size=30)},
        vocab_size=11,
        source={"name": "numbers", "url": None, "sha256": "0" * 64},
        tokenizer_name="none",
    )
    return tmp_path / "numbers"


@torch.no_grad()
def block_losses(folder, ids, block_size):
    """Returns the losses of each block's targets, computed one at a time in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    losses = []
    for target in range(1, len(ids)):
        begin = (target - 1) // block_size * block_size
        if begin == target - 1:
            losses.append([])
        logits = model(torch.tensor(ids[begin:target].astype(int))[None]).logits[0, -1]
        losses[-1].append(-logits.log_softmax(-1)[int(ids[target])].item())
    return losses


def read(folder):
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return results, {row["split"]: row for row in results["losses"]}


def tokens(data, split):
    return np.fromfile(data / f"{split}.bin", "<u2")


def test_losses_cover_all_blocks(model, data, run_here, tmp_path):
    printed = run_here(RECIPE, model, "--data_dir", data, *SMALL)
    results, rows = read(tmp_path)
    for split in ("train", "val"):
        blocks = block_losses(model, tokens(data, split), 8)
        every = np.concatenate(blocks)
        assert rows[split]["tokens"] == len(every) == len(tokens(data, split)) - 1
        assert rows[split]["loss"] == pytest.approx(every.mean(), abs=1e-5)
        assert rows[split]["blocks"] == rows[split]["blocks_in_split"] == len(blocks)
        residuals = [np.sum(block) - len(block) * every.mean() for block in blocks]
        n = len(blocks)
        error = math.sqrt(n / (n - 1) * np.sum(np.square(residuals))) / len(every)
        assert rows[split]["standard_error"] == pytest.approx(error, rel=1e-4)
        assert f"{rows[split]['loss']:.4f} ± {error:.4f}" in printed
    assert results["data"] == "numbers"
    assert "100 tokens of train and 29 tokens of val in blocks of 8, float32" in printed


def test_max_blocks_are_evenly_spaced(model, data, run_here, tmp_path):
    run_here(RECIPE, model, "--data_dir", data, *SMALL, "--max_blocks", 4)
    rows = read(tmp_path)[1]
    blocks = block_losses(model, tokens(data, "train"), 8)
    chosen = np.concatenate([blocks[i] for i in (1, 4, 8, 11)])  # of 13 blocks
    assert rows["train"]["blocks"] == 4
    assert rows["train"]["loss"] == pytest.approx(chosen.mean(), abs=1e-5)
    assert rows["val"]["tokens"] == 29  # the split has only 4 blocks


def test_bf16_is_near_float32(model, data, run_here, tmp_path):
    run_here(RECIPE, model, "--data_dir", data, *SMALL)
    exact = read(tmp_path)[1]["val"]["loss"]
    printed = run_here(RECIPE, model, "--data_dir", data, *SMALL, "--bf16")
    rounded = read(tmp_path)[1]["val"]["loss"]
    assert rounded != exact
    assert rounded == pytest.approx(exact, abs=0.05)
    assert "bfloat16 autocast" in printed


def test_resume_keeps_finished_measurements(model, data, run_here, tmp_path):
    run_here(RECIPE, model, "--data_dir", data, *SMALL)
    results, rows = read(tmp_path)
    val = rows["val"]
    results["losses"] = [rows["train"] | {"loss": 99.0}]  # stopped after the train split
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    run_here(RECIPE, model, "--data_dir", data, *SMALL, "--resume")
    rows = read(tmp_path)[1]
    assert rows["train"]["loss"] == 99.0
    assert rows["val"] == val
    other = (RECIPE, model, "--data_dir", data, *SMALL, "--max_blocks", 4)
    fails = "results with other settings (max_blocks"
    run_here(*other, "--resume", fails=fails)
    assert read(tmp_path)[1]["train"]["loss"] == 99.0
    run_here(*other)
    assert read(tmp_path)[1]["train"]["loss"] < 10


def test_resume_recognises_data_by_its_content(model, data, run_here, tmp_path):
    copied = shutil.copytree(data, tmp_path / "copied" / data.name)
    run_here(RECIPE, model, "--data_dir", data, *SMALL)
    run_here(RECIPE, model, "--data_dir", copied, *SMALL, "--resume")
    tokens = np.fromfile(copied / "val.bin", "<u2")
    tokens[::-1].tofile(copied / "val.bin")
    fails = "results with other settings (fingerprints.val "
    run_here(RECIPE, model, "--data_dir", copied, *SMALL, "--resume", fails=fails)


def test_data_in_another_models_tokens_is_an_error(tmp_path, run_here, model):
    character_tokenizer("abcdefghijk").save_pretrained(model)
    source = {"name": "text", "url": None, "sha256": "0" * 64}
    write_characters(tmp_path / "own", "abcdefghijk" * 20, source)
    write_characters(tmp_path / "others", "klmnopqrstu" * 20, source)
    run_here(RECIPE, model, "--data_dir", "own", *SMALL)
    fails = "--data_dir others does not have the tokens of"
    run_here(RECIPE, model, "--data_dir", "others", *SMALL, fails=fails)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--block_size", 17), "pass --block_size 16 or less"),
        (("--block_size", 0), "--block_size 0: pass a number above 0"),
        (("--max_blocks", -1), "--max_blocks -1: pass a number above 0"),
        (("--data_dir", "no"), "prepare the data first"),
    ],
)
def test_wrong_arguments(model, data, run_here, flags, message):
    run_here(RECIPE, model, "--data_dir", data, *SMALL, *flags, fails=message)


def test_two_folders_of_the_same_name_are_an_error(model, data, run_here, tmp_path):
    shutil.copytree(model, tmp_path / "other" / "model")
    fails = "two of these have the same name"
    run_here(RECIPE, model, "other/model", "--data_dir", data, *SMALL, fails=fails)
    (tmp_path / "other" / "model").rename(tmp_path / "other" / "renamed")
    run_here(RECIPE, model, "other/renamed", "--data_dir", data, *SMALL)
    found = [(row["model"], row["split"]) for row in read(tmp_path)[0]["losses"]]
    assert found == [(name, split) for name in ("model", "renamed") for split in ("train", "val")]


def test_the_table_names_models_that_were_not_run():
    loss = {"loss": 3.1234, "standard_error": 0.01, "tokens": 1, "blocks": 1, "blocks_in_split": 1}
    row = {"model": "gpt2", "parameters": 124_439_808, **loss}
    results = {
        "data": "openwebtext",
        "block_size": 1024,
        "dtype": "float32",
        "losses": [row | {"split": "train"}, row | {"split": "val", "standard_error": None}],
    }
    lines = render(results).splitlines()
    assert lines[2] == "| `gpt2` | 124,439,808 | 3.1234 ± 0.0100 | 3.1234 | 3.11 / 3.12 |"
    assert lines[5] == "| `gpt2-xl` |  | not run here | not run here | 2.56 / 2.54 |"
