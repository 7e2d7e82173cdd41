"""Finetuning: a pretrained model's folder and data in its tokens."""

import pytest
from tiny import QUIET, read_run
from transformers import AutoModelForCausalLM

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
    assert "finetuned from" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


def test_real_model_on_shakespeare_in_its_own_tokens(test_data, run_script, tmp_path):
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
    ("flags", "message"),
    [
        (("--block_size", 33), "pass --block_size 32 or less"),
        (("--block_size", 32, "--data_dir", "no"), "prepare the data first"),
    ],
)
def test_mistakes_are_one_line(tiny_run, docs_data, run_here, flags, message):
    common = ("--model_name_or_path", tiny_run, "--data_dir", docs_data)
    run_here(RECIPE, *common, *flags, fails=message)
