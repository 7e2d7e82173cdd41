"""What the tests of the recipes share."""

import json
from pathlib import Path

import pytest


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
