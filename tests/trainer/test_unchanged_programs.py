"""Training programs that do not import striped_hf, started like their users do."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_peft_and_trl import TEXT, tiny_tokenizer
from trainer_runs import tiny_model

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# the entry point of the console command
STRIPED_HF_RUN = (sys.executable, "-c", "from striped_hf.runner import main; main()")
DDP = ("launch", "--config_file", REPOSITORY / "recipes" / "accelerate" / "ddp.yaml")
pytestmark = pytest.mark.slow

# like transformers' examples/pytorch/language-modeling/run_clm.py
EXAMPLE = """
import gc
import json
import sys
from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "the model"})


@dataclass
class DataTrainingArguments:
    train_file: str = field(metadata={"help": "texts, as JSON lines"})


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    data = load_dataset("json", data_files=data_args.train_file, split="train")
    data = data.map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=16), remove_columns=["text"]
    )
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path),
        args=training_args,
        train_dataset=data,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    trainer.save_state()
    rank = training_args.process_index
    with open(f"{training_args.output_dir}/rank{rank}.json", "w") as file:
        seen = {"processes": training_args.world_size, "argv": sys.argv, "name": __name__}
        json.dump(seen | {"imported": "striped_hf" in dir(sys.modules["__main__"])}, file)


if __name__ == "__main__":
    main()
    # else the threads of gloo may abort the process at its end: see striped_hf.cli
    if torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, a data set, and the example script."""
    folder = tmp_path_factory.mktemp("programs")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "data").mkdir()
    lines = [json.dumps({"text": TEXT[i:]}) for i in range(32)]
    (folder / "data" / "train.jsonl").write_text("\n".join(lines))
    (folder / "example.py").write_text(EXAMPLE)
    return folder


def run(folder: Path, *command: object) -> str:
    environment = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_DATASETS_CACHE": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout + finished.stderr


def training(output_dir: str, optim: str) -> tuple[object, ...]:
    flags = ("--optim", optim, "--max_steps", 2, "--save_steps", 2, "--report_to", "none")
    flags += ("--per_device_train_batch_size", 4, "--logging_steps", 1, "--learning_rate", "1e-2")
    return (*flags, "--output_dir", output_dir, "--use_cpu", "true")


def saved_state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint-2" / "optimizer.pt", weights_only=True)


def assert_striped(folder: Path, momentum_dtype: str) -> None:
    saved = saved_state(folder)
    assert {group["momentum_dtype"] for group in saved["param_groups"]} == {momentum_dtype}
    keys = {key for state in saved["state"].values() for key in state}
    assert {"exp_avg", "exp_avg_sq_row", "exp_avg_sq_col"} <= keys


@pytest.mark.parametrize("way", ["python -m striped_hf", "striped-hf-run"])
def test_an_example_script(way: str, folder: Path) -> None:
    start = (sys.executable, "-m", "striped_hf")
    start = (*STRIPED_HF_RUN, sys.executable) if way == "striped-hf-run" else start
    arguments = ("--model_name_or_path", "model", "--train_file", "data/train.jsonl")
    out = f"example-{way[0]}"
    arguments += training(out, "striped_adamw_4bit")
    run(folder, *start, "example.py", *arguments)
    assert_striped(folder / out, "int4")
    seen = json.loads((folder / out / "rank0.json").read_text())
    assert seen == {
        "processes": 1,
        "argv": ["example.py", *map(str, arguments)],
        "name": "__main__",
        "imported": False,
    }


@pytest.mark.parametrize("way", ["accelerate launch -m striped_hf", "striped-hf-run"])
def test_accelerate_launch_on_two_processes(way: str, folder: Path) -> None:
    launch = (sys.executable, "-m", "accelerate.commands.accelerate_cli", *DDP)
    start = (*launch, "-m", "striped_hf")
    start = (*STRIPED_HF_RUN, *launch) if way == "striped-hf-run" else start
    arguments = ("--model_name_or_path", "model", "--train_file", "data/train.jsonl")
    out = f"ddp-{way[0]}"
    run(folder, *start, "example.py", *arguments, *training(out, "striped_adamw"))
    assert_striped(folder / out, "float32")
    for rank in range(2):
        seen = json.loads((folder / out / f"rank{rank}.json").read_text())
        assert (seen["processes"], seen["name"], seen["imported"]) == (2, "__main__", False)
        assert seen["argv"][0] == "example.py"


def test_trl_sft(folder: Path) -> None:
    """TRL's command line starts the training in child processes."""
    pytest.importorskip("trl")
    arguments = ("--model_name_or_path", "model", "--dataset_name", "data", "--bf16", "false")
    arguments += ("--max_length", 16, *training("sft", "striped_adamw_8bit"))
    run(folder, *STRIPED_HF_RUN, BIN / "trl", "sft", *arguments)
    # the tiny model's matrices are too narrow for codes: check the format in the groups
    assert_striped(folder / "sft", "int8")
