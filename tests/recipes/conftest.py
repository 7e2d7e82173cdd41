"""What the tests of the recipes share."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import GPT2Config, GPT2LMHeadModel

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with a configuration only: GPT-2 with three narrow layers."""
    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    folder.mkdir()
    config = {
        "model_type": "gpt2",
        "vocab_size": 512,
        "n_positions": 64,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 2,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The folder of a model with 11 tokens and a context of 16, and random weights."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=11,
        n_positions=16,
        n_layer=1,
        n_head=2,
        n_embd=8,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def run_here(monkeypatch, capsys, tmp_path) -> Callable[..., str]:
    """Runs a recipe in this process, in ``tmp_path``; returns what it printed.

    It has to end with the error message ``fails`` where that is given. (Starting a process takes
    seconds; for recipes that are called with many arguments.)
    """

    def run(recipe: str, *arguments: object, fails: str | None = None) -> str:
        AcceleratorState._reset_state(reset_partial_state=True)  # as in a new process
        script = str(REPOSITORY / "recipes" / recipe)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        if fails is None:
            runpy.run_path(script, run_name="__main__")
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(script, run_name="__main__")
        # argparse's own errors are printed
        message = capsys.readouterr().err if caught.value.code == 2 else str(caught.value)
        assert fails in message
        assert "Traceback" not in message
        return message

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)
