"""Measure the noise that rounding weights adds to their updates, and write it.

    python -m benchmarks.rounding_noise    # a few seconds

StripedAdamW trains matrices with gradients that do not depend on the weights: noise, with a mean of
a fifth of it. So without rounding, all matrices would move by the same displacement d, which a
float32 matrix that starts at zero gives. The table has ``|w - w_0 - d| / |d|`` after the last step:
0 is perfect, and 1 is the error of weights that do not move.
"""

import argparse

import torch
from torch import Tensor, nn

from striped_hf.optim import StripedAdamW
from striped_hf.optim.rounding import join
from striped_hf.results import environment, markdown_table, write_json

RESULTS = "benchmarks/results/rounding_noise.json"
LEARNING_RATES = (1e-3, 1e-5, 1e-6)
SHAPE = (256, 256)
STEPS = 1000
# the options of a param group, by the column's name
FORMATS: dict[str, dict[str, bool | int]] = {
    "nearest": {"stochastic_rounding": False},
    "stochastic": {},
    "master_bits": {"master_bits": 24},
}


def measure(lr: float) -> list[dict]:
    """Returns a row for each kind of weights at one learning rate."""
    torch.manual_seed(0)
    noise = torch.randn(SHAPE)
    starts = {"of 0.02": 0.02 * noise, "about 1": 1 + 0.05 * noise}
    starts = {name: start.bfloat16() for name, start in starts.items()}
    exact = nn.Parameter(torch.zeros(SHAPE))
    params = {
        (name, format_): nn.Parameter(start.clone())
        for name, start in starts.items()
        for format_ in FORMATS
    }
    groups = [{"params": [p], **FORMATS[format_]} for (_, format_), p in params.items()]
    optimizer = StripedAdamW([{"params": [exact]}, *groups], lr=lr, weight_decay=0.0)
    mean = 0.2 * torch.randn(SHAPE)
    for _ in range(STEPS):
        grad = mean + torch.randn(SHAPE)
        rounded = grad.bfloat16()
        exact.grad = rounded.float()
        for p in params.values():
            p.grad = rounded
        optimizer.step()

    def error(weights: Tensor, start: Tensor) -> float:
        moved, d = weights.double() - start.double(), exact.detach().double()
        return ((moved - d).norm() / d.norm()).item()

    rows = []
    for name, start in starts.items():
        row: dict = {"lr": lr, "weights": name}
        for format_ in FORMATS:
            p = params[name, format_]
            low = optimizer.state[p].get("param_low_bits")
            row[format_] = error(p.detach() if low is None else join(p.detach(), low), start)
        row["forward"] = error(params[name, "master_bits"].detach(), start)
        rows.append(row)
    return rows


def render(results: dict) -> str:
    """Makes the Markdown table of a results file."""
    header = (
        "learning rate",
        "weights",
        "bfloat16, to nearest",
        "bfloat16, stochastic",
        "`master_bits=24`",
        "of these, in the forward pass",
    )
    columns = (*FORMATS, "forward")
    rows = [
        (f"{row['lr']:g}", row["weights"], *(f"{row[column]:.2g}" for column in columns))
        for row in results["rows"]
    ]
    return markdown_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=RESULTS, help="results file")
    arguments = parser.parse_args()
    rows = [row for lr in LEARNING_RATES for row in measure(lr)]
    results = {"environment": environment("cpu"), "steps": STEPS, "shape": SHAPE, "rows": rows}
    write_json(arguments.output, results)
    print(render(results))


if __name__ == "__main__":
    main()
