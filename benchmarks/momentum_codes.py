"""Measure what the codes of the momentum do to an update: its size, its noise and its memory.

    python data_scripts/shakespeare_char.py
    python -m benchmarks.momentum_codes --data_dir data/shakespeare_char

StripedAdamW with float32 momentum trains the model of ``losses.py --task char``. In some windows of
the training every code keeps a momentum of its own of the same gradients. So the codes change
nothing in the training, and all of them see the same gradients. The command compares their updates
with the exact momentum's, each divided by AdamW's root.

The memory of a code is its response to an impulse. At the middle of a window a second momentum of
each code gets a random gradient in addition, with the magnitudes of the true one. Its part in the
difference of the two momenta, j steps later, is (1 - b1) b1^j for the exact momentum. The sum over
j is the response to a gradient that lasts, and the mean of j is the age of what the momentum holds.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.loss_peers import PEERS, set_learning_rate
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
from striped_hf.optim import momentum
from striped_hf.results import environment, markdown_table, write_json

TRAINED_BY = "striped_float32"
BEFORE, AFTER = 50, 50  # steps of a window before the impulse, and from it on
EXACT = "float32"

# from a momentum and random bits to the momentum that is kept
Code = Callable[[Tensor, torch.Generator], Tensor]


def stored(momentum_dtype: str) -> Code:
    """Returns the code of one of StripedAdamW's formats."""

    def code(values: Tensor, generator: torch.Generator) -> Tensor:
        kept = momentum.encode(values, momentum_dtype)
        return momentum.decode(*kept, momentum_dtype, values.shape[-1])

    return code


def other_rounding(at_random: bool) -> Code:
    """Returns a code with the levels of ``int4`` and another rounding.

    Args:
        at_random: Whether a value goes to one of its two levels at random, so that the mean is the
            value; otherwise it goes to the nearest level. (``int4`` rounds the square root.)
    """
    qmax = momentum.QMAX["int4"]

    def code(values: Tensor, generator: torch.Generator) -> Tensor:
        blocks = momentum.in_blocks(values)
        scale = blocks.abs().amax(-1, keepdim=True)
        squares = (blocks.abs() / scale).nan_to_num_(0.0) * qmax**2
        low = squares.sqrt().floor_().clamp_(max=qmax - 1)
        part = (squares - low**2) / (2 * low + 1)  # between the levels low^2 and (low + 1)^2
        limit = torch.rand(part.shape, generator=generator) if at_random else 0.5
        levels = (low + (part > limit)).square_() / qmax**2
        return (levels.copysign_(blocks) * scale).flatten(-2)[..., : values.shape[-1]]

    return code


CODES: dict[str, Code] = {
    EXACT: stored("float32"),
    "bfloat16": stored("bfloat16"),
    "int8": stored("int8"),
    "int4": stored("int4"),
    "int4, nearest value": other_rounding(at_random=False),
    "int4, at random": other_rounding(at_random=True),
}


class Momenta:
    """The momenta of one matrix in every code, with and without the impulse."""

    def __init__(self, like: Tensor, beta1: float, seed: int) -> None:
        self.beta1 = beta1
        self.generator = torch.Generator().manual_seed(seed)
        self.plain = {name: torch.zeros_like(like) for name in CODES}
        self.hit: dict[str, Tensor] = {}
        self.impulse = torch.zeros_like(like)
        self.weights: dict[str, list[float]] = {name: [] for name in CODES}
        # sums of squares of updates, and of products with the exact update
        self.sums = {name: [0.0, 0.0] for name in CODES}

    def step(self, grad: Tensor, root: Tensor, begin: bool) -> None:
        """Averages a gradient into all momenta; ``begin`` adds the impulse to it."""
        if begin:
            signs = torch.randint(0, 2, grad.shape, generator=self.generator) * 2 - 1
            self.impulse = grad.abs() * signs
            self.hit = {name: kept.clone() for name, kept in self.plain.items()}
        exact = self.plain[EXACT].lerp(grad, 1 - self.beta1)
        for name, code in CODES.items():
            # the update uses the momentum before it is coded
            used = self.plain[name].lerp(grad, 1 - self.beta1)
            self.plain[name] = code(used, self.generator)
            if not self.hit:
                continue
            ratio = used / root
            self.sums[name][0] += ratio.square().sum().item()
            self.sums[name][1] += (ratio * exact / root).sum().item()
            added = grad + self.impulse if begin else grad
            used_hit = self.hit[name].lerp(added, 1 - self.beta1)
            self.hit[name] = code(used_hit, self.generator)
            # divided by the root, so that no element outweighs the others
            impulse = self.impulse / root
            weight = ((used_hit - used) / root * impulse).sum() / impulse.square().sum()
            self.weights[name].append(weight.item())


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Trains until the end of the last window; writes the results after each window."""
    task = TASKS["char"]
    peer = PEERS[TRAINED_BY]
    this = Run(task, peer, args.learning_rate, args.seed, args.data_dir, "", "cpu")
    model, windows = begin(this)
    optimizer = peer.build(model, args.learning_rate, task.betas, WEIGHT_DECAY)
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    squares = {name: torch.zeros_like(p) for name, p in matrices.items()}
    momenta: dict[str, Momenta] = {}
    results: dict[str, Any] = {
        "environment": environment("cpu"),
        "complete": False,
        **{key: getattr(args, key) for key in ("learning_rate", "seed")},
        "windows": [],
    }
    beta1, beta2 = task.betas
    factors = rate_factors(task)
    for step in tqdm(range(max(args.impulses) + AFTER), "momentum codes"):
        backward(batch_loss(model, windows, step, this), model)
        impulse = next((at for at in args.impulses if at - BEFORE <= step < at + AFTER), None)
        for number, (name, param) in enumerate(matrices.items()):
            grad = param.grad
            squares[name].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            if impulse is None:
                continue
            if step == impulse - BEFORE:
                momenta[name] = Momenta(grad, beta1, number)
            root = (squares[name] / (1 - beta2 ** (step + 1))).sqrt_().add_(1e-8)
            momenta[name].step(grad, root, begin=step == impulse)
        set_learning_rate(optimizer, args.learning_rate * factors[step])
        optimizer.step()
        model.zero_grad()
        if impulse is not None and step == impulse + AFTER - 1:
            results["windows"].append(summary(impulse, list(momenta.values())))
            results["complete"] = impulse == max(args.impulses)
            write_json(args.results, results)
    return results


def summary(impulse: int, momenta: list[Momenta]) -> dict[str, Any]:
    """Returns the figures of a window: sums over all matrices, and means of the responses."""
    codes = {}
    exact = sum(each.sums[EXACT][0] for each in momenta)
    for name in CODES:
        own = sum(each.sums[name][0] for each in momenta)
        product = sum(each.sums[name][1] for each in momenta)
        weights = torch.tensor([each.weights[name] for each in momenta]).mean(0)
        codes[name] = {
            "update_rms": (own / exact) ** 0.5,
            "cosine": product / (own * exact) ** 0.5,
            "response": weights.sum().item(),
            "age": ((weights * torch.arange(len(weights))).sum() / weights.sum()).item(),
        }
    return {"step": impulse, "codes": codes}


def render(results: dict[str, Any]) -> str:
    """Makes the Markdown table of a results file: the means over the windows."""
    windows = [window["codes"] for window in results["windows"]]

    def mean(code: str, key: str, relative: bool = False) -> str:
        values = [w[code][key] / (w[EXACT][key] if relative else 1) for w in windows]
        return f"{sum(values) / len(values):.3f}"

    rows = [
        (
            f"`{code}`" if code in momentum.MOMENTUM_DTYPES else code,
            mean(code, "update_rms"),
            mean(code, "cosine"),
            mean(code, "response", relative=True),
            mean(code, "age", relative=True),
        )
        for code in CODES
    ]
    header = (
        *("momentum", "rms of the update", "cosine with the exact update"),
        *("response to a lasting gradient", "mean age of the gradients"),
    )
    steps = " and ".join(f"{window['step']:,}" for window in results["windows"])
    return (
        f"{markdown_table(header, rows)}\n\nThe exact momentum is 1. Learning rate "
        f"{results['learning_rate']:g}, seed {results['seed']}, around step {steps}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", default="data/shakespeare_char")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--impulses", type=int, nargs="+", default=[200, 1000, 1800], help="steps of the impulses"
    )
    parser.add_argument("--results", default="out/momentum_codes.json")
    args = parser.parse_args()
    args.impulses.sort()
    print(render(measure(args)))


if __name__ == "__main__":
    run(main)
