"""Fixtures of the tests of the recipes."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel


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
