"""The comparison of second moments, on second moments of a known form."""

import pytest
import torch

from benchmarks.second_moments import HEADS, KINDS, WITH_MOMENTUM, measure_step, render

BETAS = (0.9, 0.99)


def random_positive(*shape: int) -> torch.Tensor:
    return torch.randn(shape).exp()


def figures(name: str, v: torch.Tensor) -> dict:
    torch.manual_seed(1)
    return measure_step({name: (torch.randn(v.shape), v)}, BETAS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_stripes_leave_out_nothing_of_an_outer_product():
    row, col = random_positive(60, 1), random_positive(1, 128)
    figures_of = figures("h.0.mlp.c_fc.weight", row * col)["MLP: input"]
    assert figures_of["spread"] == pytest.approx(0, abs=1e-5)
    assert figures_of["cosine"]["stripes"] == pytest.approx(1, abs=1e-5)
    assert figures_of["rms"]["stripes"] == pytest.approx(1, abs=1e-5)
    assert figures_of["cosine"][WITH_MOMENTUM] < 0.999  # it changes a right second moment


def test_packed_parts_have_stripes_of_their_own():
    parts = [random_positive(60, 1) * random_positive(1, 128) for _ in range(3)]
    figures_of = figures("h.0.attn.c_attn.weight", torch.cat(parts, 1))
    assert list(figures_of) == ["attention: query", "attention: key", "attention: value"]
    for each in figures_of.values():
        assert each["cosine"]["stripes"] == pytest.approx(1, abs=1e-5)


def test_each_second_moment_keeps_what_it_has_numbers_for():
    heads = [random_positive(60, 1) * random_positive(1, 32) for _ in range(HEADS)]
    cosine = figures("attn.c_proj.weight", torch.cat(heads, 1))["attention: output"]["cosine"]
    assert cosine["stripes by head"] == pytest.approx(1, abs=1e-5)
    assert cosine["stripes"] < 0.95
    terms = random_positive(60, 2) @ random_positive(2, 128)
    cosine = figures("mlp.c_proj.weight", terms)["MLP: output"]["cosine"]
    assert cosine["two stripes"] > 0.9999 > cosine["stripes"]
    cosine = figures("wte.weight", random_positive(65, 128))["token embedding"]["cosine"]
    assert cosine["stripes"] < cosine["3 factors per element"] < 0.99
    assert cosine["15 factors per element"] > 0.99


def test_the_table_has_a_row_for_each_kind_of_matrix():
    shapes = {"wte": 65, "wpe": 64, "attn.c_proj": 128, "mlp.c_fc": 128, "mlp.c_proj": 512}
    matrices = {name: (torch.randn(n, 128), random_positive(n, 128)) for name, n in shapes.items()}
    matrices["attn.c_attn"] = torch.randn(128, 384), random_positive(128, 384)
    kinds = measure_step(matrices, BETAS)
    steps = [{"step": step, "kinds": kinds} for step in (200, 1600)]
    table = render({"steps": steps, "learning_rate": 4e-3, "seed": 1})
    assert [kind in table for kind in KINDS] == [True] * len(KINDS)
    assert "steps 200, 1,600" in table
