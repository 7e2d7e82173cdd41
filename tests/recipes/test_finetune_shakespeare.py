"""Finetuning: a pretrained model's folder and data in its tokens."""

import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import QUIET, read_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from striped_hf.data.characters import character_tokenizer
from striped_hf.data.prepare import write_characters

RECIPE = "recipes/finetune_shakespeare.py"
FEW = ("--max_steps", 2, "--eval_steps", 1, "--save_steps", 1, "--gradient_accumulation_steps", 2)
pytestmark = pytest.mark.slow


def test_finetunes_a_local_model(tiny_run, docs_data, run_script, tmp_path):
    flags = ("--model_name_or_path", tiny_run, "--data_dir", docs_data, "--block_size", 32)
    done = run_script(
        *(RECIPE, *flags, *FEW, *QUIET, "--learning_rate", "1e-3", "--output_dir", "run"),
        cwd=tmp_path,
    )
    run = read_run(tmp_path / "run")
    assert run["tokens"] == 2 * 2 * 1 * 32
    assert run["eval_loss"] < read_run(tiny_run)["eval_loss"]
    assert f"{read_run(tiny_run)['eval_loss']:.4f} before" in done.stdout
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    # a correct run prints no warnings
    assert not any(word in done.stderr for word in ("loss_type", "missing keys", "Traceback"))
    assert "finetuned from" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


def test_stories260k_learns_shakespeare_in_its_tokens(test_data, run_script, tmp_path):
    model = test_data / "stories260K"
    text = test_data / "tinyshakespeare" / "input.txt"
    run_script(
        *("data_scripts/shakespeare.py", "--input", text, "--tokenizer", model),
        *("--output_dir", "data"),
        cwd=tmp_path,
    )
    flags = ("--model_name_or_path", model, "--data_dir", "data", "--block_size", 512)
    steps = ("--max_steps", 3, "--eval_steps", 3, "--save_steps", 3)
    done = run_script(RECIPE, *flags, *steps, *QUIET, "--output_dir", "run", cwd=tmp_path)
    before = float(done.stdout.split("val loss ")[-1].split()[0])
    # the published run falls from 4.94 to 4.00 in 20 steps
    assert before == pytest.approx(4.936, abs=0.01)
    assert read_run(tmp_path / "run")["eval_loss"] < before - 0.1


@pytest.mark.parametrize(
    ("asked", "trained"),
    [
        ((), "float32"),
        (("--bf16",), "float32, bfloat16 autocast"),
        (("--dtype", "bfloat16"), "bfloat16"),
        (("--dtype", "auto"), "bfloat16"),
    ],
)
def test_dtype_is_the_given_one(tiny_run, docs_data, run_here, tmp_path, asked, trained):
    """The dtype of the checkpoint matters for ``auto`` only."""
    model = AutoModelForCausalLM.from_pretrained(tiny_run, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_run).save_pretrained(tmp_path / "model")
    flags = ("--model_name_or_path", "model", "--data_dir", docs_data, "--block_size", 32)
    run_here(RECIPE, *flags, *FEW, *QUIET, *asked, "--output_dir", "run")
    assert read_run(tmp_path / "run")["dtype"] == trained
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert f"| dtype of the weights | {trained} |" in card
    weights = load_file(tmp_path / "run" / "model.safetensors").values()
    assert {str(weight.dtype) for weight in weights} == {f"torch.{trained.split(',')[0]}"}


def test_auto_does_not_train_float16_weights(tiny_run, docs_data, run_here, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_run, dtype=torch.float16)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_run).save_pretrained(tmp_path / "model")
    flags = ("--model_name_or_path", "model", "--data_dir", docs_data, "--block_size", 32)
    message = "--dtype auto: model was saved in float16, in which gradients would underflow: pass"
    run_here(RECIPE, *flags, "--dtype", "auto", fails=f"{message} --dtype bfloat16")


def test_data_in_other_tokens_is_an_error(tiny_run, test_data, run_here, tmp_path):
    """This does not depend on how the data was prepared, and on how few ids it has."""
    character_tokenizer("abc").save_pretrained(tmp_path / "others")
    write_characters(tmp_path / "others", "abc" * 200, {"name": "abc", "url": None, "sha256": ""})
    (tmp_path / "nanogpt").mkdir()
    for split in ("train", "val"):
        shutil.copy(tmp_path / "others" / f"{split}.bin", tmp_path / "nanogpt")
    flags = ("--model_name_or_path", tiny_run, "--block_size", 32, "--data_dir")
    for data in ("others", "nanogpt"):
        run_here(RECIPE, *flags, data, fails=f"--data_dir {data} does not have the tokens of")
    symbols = dict(enumerate("abc"))
    (tmp_path / "nanogpt" / "meta.pkl").write_bytes(pickle.dumps({"itos": symbols}))
    run_here(RECIPE, *flags, "nanogpt", fails="nanogpt does not have the tokens of")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dtype", "float16"), "--dtype float16: choose one of float32, bfloat16, auto"),
        (("--block_size", 33), "pass --block_size 32 or less"),
        (("--block_size", 32, "--data_dir", "no"), "prepare the data first"),
    ],
)
def test_mistakes_end_with_one_line(tiny_run, docs_data, run_here, flags, message):
    common = ("--model_name_or_path", tiny_run, "--data_dir", docs_data)
    run_here(RECIPE, *common, *flags, fails=message)
