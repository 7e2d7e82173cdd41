"""The measurement of the momentum's codes, on random gradients."""

import pytest
import torch

from benchmarks.momentum_codes import AFTER, BEFORE, CODES, Momenta, other_rounding, render, summary

BETA1 = 0.9


@pytest.fixture(scope="module")
def results() -> dict:
    generator = torch.Generator().manual_seed(0)
    like = torch.zeros(64, 256)
    momenta = Momenta(like, BETA1, seed=1)
    for step in range(BEFORE + AFTER):
        grad = torch.randn(like.shape, generator=generator)
        momenta.step(grad, torch.ones_like(like), begin=step == BEFORE)
    return {"windows": [summary(BEFORE, [momenta])], "learning_rate": 1e-3, "seed": 1}


def test_the_exact_momentum_has_the_known_response(results: dict):
    exact = results["windows"][0]["codes"]["float32"]
    weights = (1 - BETA1) * BETA1 ** torch.arange(AFTER)
    assert exact["response"] == pytest.approx(weights.sum().item(), rel=1e-4)
    age = (weights * torch.arange(AFTER)).sum() / weights.sum()
    assert exact["age"] == pytest.approx(age.item(), rel=1e-3)
    assert exact["update_rms"] == exact["cosine"] == 1.0


def test_only_four_bits_change_the_update(results: dict):
    codes = results["windows"][0]["codes"]
    exact = codes["float32"]
    for name in ("bfloat16", "int8"):
        assert codes[name]["cosine"] > 0.9998
        assert codes[name]["response"] == pytest.approx(exact["response"], rel=0.01)
    # rounding to the nearest value loses small gradients, the root's rounding does not
    assert codes["int4, nearest value"]["response"] < 0.97 * exact["response"]
    assert codes["int4"]["response"] > exact["response"]
    assert codes["int4, at random"]["response"] == pytest.approx(exact["response"], rel=0.03)


def test_rounding_at_random_is_unbiased():
    generator = torch.Generator().manual_seed(0)
    values = torch.linspace(-1, 1, 128).expand(4000, -1)
    kept = other_rounding(at_random=True)(values, generator)
    assert (kept.mean(0) - values[0]).abs().max() < 0.01


def test_a_block_of_zeros_stays_zero():
    for at_random in (False, True):
        code = other_rounding(at_random)
        assert not code(torch.zeros(2, 200), torch.Generator()).any()


def test_the_table_has_every_code(results: dict):
    table = render(results)
    assert all(name in table for name in CODES)
