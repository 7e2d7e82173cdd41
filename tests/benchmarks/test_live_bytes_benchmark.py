"""The bytes per parameter of Trainer's steps, apart from activations."""

import json

import pytest
from transformers import GPT2Config

from benchmarks import live_bytes

# at most, of weights, state and buffers, in bytes per parameter
KEPT = {
    ("striped_adamw_8bit_layerwise", 1): 3.2,
    ("striped_adamw_8bit_layerwise", 4): 3.2,
    ("striped_adamw_4bit_layerwise", 1): 2.7,
    # 8-bit codes while a step is open, and the largest matrix's 4-bit codes when it is opened
    ("striped_adamw_4bit_layerwise", 4): 3.3,
}


def small_config() -> GPT2Config:
    ids = {"bos_token_id": 1, "eos_token_id": 1}
    return GPT2Config(n_layer=4, n_head=4, n_embd=512, vocab_size=2048, n_positions=64, **ids)


@pytest.mark.slow
@pytest.mark.parametrize(("optim", "passes"), KEPT, ids=str)
def test_a_layerwise_step_keeps_few_bytes(optim: str, passes: int) -> None:
    config = small_config()
    found = live_bytes.train(config, optim, passes, 16)
    parameters = found["weights"] / 2
    assert found["kept"] <= KEPT[optim, passes] * parameters
    # the tied embedding's, one matrix's, and those of vectors and of position embeddings
    vectors = 2 * (config.n_layer * 13 + 2) * config.n_embd + 2 * 64 * config.n_embd
    assert found["gradients"] <= 2 * (2048 + 2048) * config.n_embd + vectors
    ordinary = live_bytes.train(config, optim.removesuffix("_layerwise"), passes, 16)
    assert ordinary["weights"] == found["weights"]
    assert ordinary["state"] == found["state"]
    assert ordinary["gradients"] >= 2 * parameters


def test_the_table_of_the_results_file() -> None:
    path = live_bytes.RESULTS
    with open(path, encoding="utf-8") as file:
        results = json.load(file)
    kept = {
        (row["optim"], row["passes"]): row["bytes"]["kept"] / results["parameters"]
        for row in results["rows"]
    }
    assert all(kept[key] <= most for key, most in KEPT.items())
    assert results["parameters"] == 124_439_808
    assert "| `striped_adamw_8bit_layerwise` | 4 |" in live_bytes.render(results)
