"""The README: its tables are those of the results files, and its commands run."""

import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import QUIET

from benchmarks import render_tables

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")

FEW = ("--max_steps", "2", "--eval_steps", "1", "--save_steps", "1", "--logging_steps", "1", *QUIET)
# what makes each script's command small; the shape of the command stays the README's
SMALL = {
    "train_shakespeare_char.py": (*FEW, "--n_layer", "1", "--n_head", "2", "--n_embd", "32"),
    "finetune_shakespeare.py": (*FEW, "--gradient_accumulation_steps", "1"),
    "openwebtext.py": ("--data_files", "novels.parquet", "--num_proc", "1"),
    "compare_optimizers.py": (*FEW, "--n_layer", "1"),
    "sample.py": ("--max_new_tokens", "5"),
    "eval_baselines.py": ("--max_blocks", "2", "--results", "baselines.json"),
    "eval_zero_shot.py": (
        *("--results", "zero_shot.json", "--tasks", "wikitext"),
        # the harness is an extra
        *(["lambada"] if importlib.util.find_spec("lm_eval") else []),
    ),
    "benchmarks.optimizers": (
        *("--optimizers", "striped_int8", "--block_size", "32", "--results", "memory.json"),
    ),
    "benchmarks.training_step": (
        *("--rounds", "1", "--steps", "2", "--variants", "recipe", "--results", "step.json"),
    ),
}


def bash_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    return [
        line
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
        if line and not line.startswith("#")
    ]


def test_tables_are_those_of_the_results_files():
    assert render_tables.render(README) == README


def test_finetune_prose_is_that_of_the_results_file():
    path = REPOSITORY / "recipes" / "results" / "finetune_stories260k.json"
    history = json.loads(path.read_text(encoding="utf-8"))["runs"][0]["history"]
    assert history["eval_steps"][0] == 0
    assert f"begins at {history['eval_losses'][0]:.2f}" in " ".join(README.split())


def test_python_examples_run(tiny_run, tmp_path, docs_data):
    """The snippets, one after another, with a model and data that the reader would have."""
    model, using_names, public_way, plain, watching = (
        "from transformers import AutoModelForCausalLM\n"
        "from striped_hf.data import ContiguousBlocks, open_split\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tiny_run)!r})\n"
        f"blocks = ContiguousBlocks(open_split({str(docs_data)!r}, 'val'), 32)\n"
        "dataset = [{k: v for k, v in blocks[i].items() if k != 'shift_labels'} for i in (0, 1)]\n",
        *re.findall(r"```python\n(.*?)```", README, flags=re.S),
    )
    script = "\n".join((model, using_names, public_way, watching, "trainer.train()", plain))
    script += "\nassert len(optimizer.param_groups) == 2\n"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=1200
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_commands_run(test_data, tmp_path):
    """Every command, in order, in a folder where a reader would stand; scripts' own tests cover the
    ones marked as needing a GPU. Downloads are replaced by --input."""
    for name in ("benchmarks", "recipes", "data_scripts"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "stories260K").symlink_to(test_data / "stories260K")
    (tmp_path / "novels.parquet").symlink_to(test_data / "novels" / "val.parquet")
    for path in ("wikitext-2-raw/wiki.test.raw", "lambada/lambada_test.jsonl"):
        with (test_data / path).open(encoding="utf-8") as lines:
            text = "".join(itertools.islice(lines, 20))
        (tmp_path / Path(path).name).write_text(text, encoding="utf-8")
    ran = set()
    for line in bash_commands():
        command, _, needs = line.partition("#")
        words = shlex.split(command)
        if words[0] == "make":  # the demo and the tests themselves
            assert words[1] in ("demo", "test", "bench", "gpu")
            continue
        path = next((word for word in words if word.endswith(".py")), "")
        script = Path(path).name
        if words[1] == "-m":
            script = words[2]
            path = f"{script.replace('.', '/')}.py"
        assert (REPOSITORY / path).is_file(), line
        if "GPU" in needs or ("network" in needs and "data_scripts" not in path):
            continue
        if words[:2] == ["accelerate", "launch"]:
            words[:2] = ["python", "-m", "accelerate.commands.launch"]
        assert words[0] == "python", line
        if script.startswith("shakespeare"):
            words += ["--input", str(test_data / "tinyshakespeare" / "input.txt")]
        finished = subprocess.run(
            [sys.executable, *words[1:], *SMALL.get(script, ())],
            cwd=tmp_path,
            env={**os.environ, "TIKTOKEN_CACHE_DIR": str(test_data / "tiktoken_cache")},
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert finished.returncode == 0, line + finished.stdout + finished.stderr
        ran.add(script)
    assert ran >= {*SMALL, "shakespeare_char.py", "shakespeare.py", "python_docs.py"}
