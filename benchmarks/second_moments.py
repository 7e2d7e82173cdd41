"""Compare the factored second moment with AdamW's, along a training with AdamW.

    python data_scripts/shakespeare_char.py
    python -m benchmarks.second_moments --data_dir data/shakespeare_char

AdamW trains the model of ``losses.py --task char``. At some steps its momentum is divided by the
roots of other second moments, which are computed from AdamW's second moment of the same step: so
the difference is what each of them leaves out, and nothing else. A figure is the cosine of the
resulting update with AdamW's, over all matrices of one kind.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.loss_peers import BASELINE, PEERS, set_learning_rate
from benchmarks.loss_tasks import (
    TASKS,
    WEIGHT_DECAY,
    Run,
    backward,
    batch_loss,
    begin,
    rate_factors,
)
from striped_hf.cli import run
from striped_hf.results import begin_results, markdown_table, write_json

HEADS = 4
MIXED = 0.05  # the share of the momentum's square
KINDS = {
    "token embedding": "wte",
    "position embedding": "wpe",
    "attention: query": "attn.c_attn.0",
    "attention: key": "attn.c_attn.1",
    "attention: value": "attn.c_attn.2",
    "attention: output": "attn.c_proj",
    "MLP: input": "mlp.c_fc",
    "MLP: output": "mlp.c_proj",
}


def factored(v: Tensor) -> Tensor:
    """Returns the outer product of the means of rows and columns, divided by the mean."""
    return v.mean(1, keepdim=True) * v.mean(0, keepdim=True) / v.mean()


def by_head(v: Tensor) -> Tensor:
    """Returns the factored second moment whose blocks of columns have their own means by row."""
    return torch.cat([factored(part) for part in v.chunk(HEADS, 1)], 1)


def two_terms(v: Tensor) -> Tensor:
    """Returns a sum of two outer products, by Lee and Seung's updates for the divergence (2001)."""
    generator = torch.Generator().manual_seed(0)
    scale = v.mean().sqrt()
    left = torch.rand(v.shape[0], 2, generator=generator) * scale
    right = torch.rand(2, v.shape[1], generator=generator) * scale
    for _ in range(200):
        left *= (v / (left @ right)) @ right.T / right.sum(1)
        right *= left.T @ (v / (left @ right)) / left.sum(0)[:, None]
    return left @ right


def with_codes(levels: int, octaves: float) -> Callable[[Tensor], Tensor]:
    """Returns a function that corrects each element by the nearest of some factors.

    Args:
        levels: How many factors below 1, and above 1.
        octaves: The distance of two factors.
    """

    def corrected(v: Tensor) -> Tensor:
        stripes = factored(v)
        level = ((v / stripes).log2() / octaves).round().clamp(-levels, levels)
        return stripes * (level * octaves).exp2()

    return corrected


SECOND_MOMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "stripes": factored,
    "stripes by head": by_head,
    "two stripes": two_terms,
    "3 factors per element": with_codes(1, 1.0),
    "15 factors per element": with_codes(7, 0.5),
}
WITH_MOMENTUM = f"stripes and {MIXED:.0%} of the momentum's square"


def parts_of(name: str, *tensors: Tensor) -> list[tuple[str, list[Tensor]]]:
    """Returns the kind of a matrix and its tensors; a packed projection has three parts."""
    if "c_attn" in name:
        thirds = zip(*(each.chunk(3, 1) for each in tensors), strict=True)
        parts = [(f"{name}.{i}", list(each)) for i, each in enumerate(thirds)]
    else:
        parts = [(name, list(tensors))]
    return [
        (
            next(kind for kind, module in KINDS.items() if module in part.replace(".weight", "")),
            rest,
        )
        for part, rest in parts
    ]


def measure_step(matrices: dict[str, tuple[Tensor, Tensor]], betas: tuple[float, float]) -> Any:
    """Returns the figures of one step: for each kind its spread and cosines.

    Args:
        matrices: AdamW's ``exp_avg`` and ``exp_avg_sq`` by the names of the parameters.
        betas: AdamW's betas.
    """
    ratio = (1 + betas[0]) / (1 - betas[0])  # the mean of v / m^2 for random gradients
    sums: dict[str, dict[str, Tensor]] = {}
    spread: dict[str, list[Tensor]] = {}
    for name, moments in matrices.items():
        for kind, (m, v) in parts_of(name, *moments):
            # rows of the position embedding's and of rare tokens have no gradient yet
            v = v.clamp(min=v.mean() * 1e-12)
            exact = m / v.sqrt()
            estimates = {key: estimate(v) for key, estimate in SECOND_MOMENTS.items()}
            mixed = (1 - MIXED) * estimates["stripes"] + MIXED * ratio * m.square()
            estimates[WITH_MOMENTUM] = mixed
            spread.setdefault(kind, []).append((v / estimates["stripes"]).log().std())
            for key, estimate in estimates.items():
                update = m / estimate.sqrt()
                products = ((update * exact).sum(), update.square().sum(), exact.square().sum())
                before = sums.setdefault(kind, {}).get(key, torch.zeros(3))
                sums[kind][key] = before + torch.stack(products)
    return {
        kind: {
            "spread": torch.stack(spread[kind]).mean().item(),
            "rms": {key: math.sqrt(s[1] / s[2]) for key, s in of_kind.items()},
            "cosine": {key: (s[0] / (s[1] * s[2]).sqrt()).item() for key, s in of_kind.items()},
        }
        for kind, of_kind in sums.items()
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Trains with AdamW until the last of the steps; writes the results after each of them."""
    task = TASKS["char"]
    peer = PEERS[BASELINE]
    this = Run(task, peer, args.learning_rate, args.seed, args.data_dir, "", "cpu")
    model, windows = begin(this)
    optimizer = peer.build(model, args.learning_rate, task.betas, WEIGHT_DECAY)
    settings = {"learning_rate": args.learning_rate, "seed": args.seed, "steps": []}
    results = begin_results(args.results, settings, resume=False)
    factors = rate_factors(task)
    for step in tqdm(range(max(args.steps)), "second moments"):
        backward(batch_loss(model, windows, step, this), model)
        set_learning_rate(optimizer, args.learning_rate * factors[step])
        optimizer.step()
        model.zero_grad()
        if step + 1 in args.steps:
            matrices = {
                name: (optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"])
                for name, p in model.named_parameters()
                if p.dim() == 2
            }
            kinds = measure_step(matrices, task.betas)
            results["steps"].append({"step": step + 1, "kinds": kinds})
            results["complete"] = step + 1 == max(args.steps)
            write_json(args.results, results)
    return results


def render(results: dict[str, Any]) -> str:
    """Makes the Markdown table of a results file: the means over the steps."""
    steps = results["steps"]

    def mean(kind: str, key: str, estimate: str | None = None) -> float:
        values = [each["kinds"][kind][key] for each in steps]
        values = values if estimate is None else [value[estimate] for value in values]
        return sum(values) / len(values)

    estimates = [*SECOND_MOMENTS, WITH_MOMENTUM]
    rows = [
        (
            kind,
            f"{mean(kind, 'spread'):.2f}",
            f"{mean(kind, 'rms', 'stripes'):.2f}",
            *(f"{mean(kind, 'cosine', each):.3f}" for each in estimates),
        )
        for kind in KINDS
    ]
    header = ("matrices", "spread", "rms", *estimates)
    at = ", ".join(f"{each['step']:,}" for each in steps)
    return (
        f"{markdown_table(header, rows)}\n\nLearning rate {results['learning_rate']:g}, seed "
        f"{results['seed']}; means over steps {at}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", default="data/shakespeare_char")
    parser.add_argument("--learning_rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, nargs="+", default=[200, 600, 1200, 2000])
    parser.add_argument("--results", default="out/second_moments.json")
    print(render(measure(parser.parse_args())))


if __name__ == "__main__":
    run(main)
