"""Time a step's work on the host, without a GPU: the Triton backend beside fused AdamW.

    python -m benchmarks.host_time    # two minutes on one core

The host must prepare the launches of a step faster than a GPU runs them. This measures the
processor time of ``step()`` where no kernel runs:

- The tensors have a model's number and its packed projections, but are small, and are on the CPU.
- The Triton backend takes them for tensors on a GPU. Its launches are left out. The second kind of
  row has Triton's part of each launch up to its lookup of the compiled kernel (compiled for sm_90).
  Both leave out the call of the CUDA driver, a few microseconds for each launch.
- Fused AdamW steps tensors of four elements on the CPU, by the same Python code as on a GPU. One
  more row has its Python code alone: the two calls into torch's C++ code are left out.

Every step has new gradient tensors, as after ``zero_grad``: at the addresses of the step before, as
from torch's caching allocator in a steady training loop, or at others. Each round has a turn of
every optimizer; the table has medians of the rounds, and the median of their ratios.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.measuring import is_steady, quartiles
from benchmarks.model_shapes import Weight, meta_model, meta_weights
from benchmarks.optimizer_peers import LR, plain_groups
from striped_hf.cli import UserError, run
from striped_hf.optim import StripedAdamW
from striped_hf.results import environment, markdown_table, write_json

RESULTS = "benchmarks/results/host_time.json"
MODELS = ("gpt2", "gpt2-xl")
BASELINE = "adamw_fused"
STRIPED = {
    "striped float32": {"momentum_dtype": "float32"},
    "striped int8": {"momentum_dtype": "int8"},
    "striped int8, lagged": {"momentum_dtype": "int8", "lagged": True},
}
_STEPS = 5  # in a turn

Memory = list[list[torch.Tensor]]  # for each step of a turn, tensors with the gradients' memory


class _Driver:
    """A driver of Triton for a GPU that need not exist."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


class _Unlaunched:
    """A kernel whose launches end at Triton's lookup of the compiled kernel, or do nothing."""

    looks_up = False

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(**arguments: Any) -> None:
            if _Unlaunched.looks_up:
                self.kernel.warmup(grid=grid, **arguments)

        return launch


@contextmanager
def on_a_pretended_gpu() -> Iterator[None]:
    """Lets the Triton backend step tensors on the CPU, without its kernels."""
    try:
        import triton

        with patch.object(torch.cuda, "is_available", lambda: True):
            from striped_hf.optim.backends.triton import (
                INTERPRETED,
                backend,
                statistics_kernels,
                stripes_kernels,
                update_kernels,
            )
    except ImportError as error:
        raise UserError(f"the Triton backend cannot be imported: {error}") from error
    if INTERPRETED:
        raise UserError("Triton would interpret its kernels: unset TRITON_INTERPRET")
    triton.runtime.driver.set_active(_Driver())
    with ExitStack() as patches:
        patches.enter_context(patch.object(backend, "DEVICE_TYPES", ("cpu",)))
        for module in (statistics_kernels, stripes_kernels, update_kernels):
            for name, kernel in list(vars(module).items()):
                if name.endswith("_kernel"):
                    patches.enter_context(patch.object(module, name, _Unlaunched(kernel)))
        yield


def small_weights(weights: list[Weight], elements: int | None = None) -> list[Weight]:
    """Returns small parameters with gradients in place of a model's.

    Args:
        weights: The model's weights, on the meta device.
        elements: The number of elements of each; None: matrices stay matrices.
    """
    small = []
    for weight in weights:
        if elements is not None:
            shape: tuple[int, ...] = (elements,)
        elif weight.param.dim() < 2:
            shape = (16,)
        else:  # each block of columns as wide as a tile
            shape = (16, 128 * weight.blocks[1])
        param = torch.nn.Parameter(torch.zeros(shape))
        param.grad = torch.zeros(shape)
        small.append(
            Weight(weight.name, param, weight.weight_decay, weight.blocks, weight.embedding)
        )
    return small


def striped_groups(weights: list[Weight]) -> list[dict[str, Any]]:
    """Returns the two groups of ``plain_groups``, with a list of blocks each."""
    groups = plain_groups(weights)
    for group in groups:
        group["blocks"] = [
            weight.blocks for weight in weights if weight.weight_decay == group["weight_decay"]
        ]
    return groups


@contextmanager
def _without_kernels() -> Iterator[None]:
    """Leaves out the calls of fused AdamW into torch's C++ code."""
    with (
        patch.object(torch, "_fused_adamw_", lambda *_, **__: None),
        patch.object(torch, "_foreach_add_", lambda *_: None),
    ):
        yield


def turn_ms(step: Callable[[], Any], params: list[Any], memory: Memory) -> float:
    """Returns the median processor time of a few steps, in milliseconds.

    Args:
        step: Does a step.
        params: The parameters.
        memory: The memory of the gradients. Nothing is written to it: where it is on a GPU, it
            does not fill the processor's caches.
    """
    times = []
    for tensors in memory:
        for param, tensor in zip(params, tensors, strict=True):
            param.grad = tensor.detach()
        begin = time.thread_time()
        step()
        times.append(1e3 * (time.thread_time() - begin))
    return statistics.median(times)


def gradients_memory(params: list[Any], new_addresses: bool) -> Memory:
    """Returns the gradients' memory in each step of a turn: always the same, or other memory."""
    grads = [param.grad for param in params]
    if not new_addresses:
        return [grads] * _STEPS
    return [list(map(torch.zeros_like, grads)) for _ in range(_STEPS)]


def measure(model: str, rounds: int) -> dict[str, Any]:
    """Returns the rows of one model."""
    weights = meta_weights(meta_model(model))
    four = small_weights(weights, elements=4)
    adamw = torch.optim.AdamW(plain_groups(four), lr=LR, fused=True)
    matrices = small_weights(weights)
    optimizers = {
        name: StripedAdamW(striped_groups(matrices), LR, backend="triton", **options)
        for name, options in STRIPED.items()
    }
    of_adamw, of_striped = ([weight.param for weight in some] for some in (four, matrices))

    def turns(four_elements: Memory, tiles: Memory) -> Iterator[tuple[str, float]]:
        yield BASELINE, turn_ms(adamw.step, of_adamw, four_elements)
        with _without_kernels():
            yield f"{BASELINE}, Python code", turn_ms(adamw.step, of_adamw, four_elements)
        for name, optimizer in optimizers.items():
            for _Unlaunched.looks_up in (False, True):
                suffix = ", with Triton's lookup" if _Unlaunched.looks_up else ""
                yield name + suffix, turn_ms(optimizer.step, of_striped, tiles)

    rows = []
    for new_addresses in (False, True):
        found: dict[str, list[float]] = {}
        memory = [gradients_memory(of, new_addresses) for of in (of_adamw, of_striped)]
        for round_ in range(-1, rounds):  # round -1 compiles and warms up
            for name, ms in turns(*memory):
                if round_ >= 0:
                    found.setdefault(name, []).append(ms)
        baseline = found[BASELINE]
        for name, times in found.items():
            low, ratio, high = quartiles([a / b for a, b in zip(times, baseline, strict=True)])
            rows.append(
                {
                    "optimizer": name,
                    "new_addresses": new_addresses,
                    "ms": statistics.median(times),
                    "ratio": ratio,
                    "ratio_quartiles": [low, high],
                    "usable": is_steady(baseline),
                }
            )
    return {"name": model, "tensors": len(weights), "rows": rows}


def render(results: dict[str, Any]) -> str:
    """Makes the Markdown table of a results file."""
    models = results["models"]
    header = ["optimizer", "gradients' addresses"]
    for model in models:
        name = f"`{model['name']}`, {model['tensors']} tensors"
        header += [f"{name}, ms", "ratio to fused AdamW (quartiles)"]
    lines = []
    for of_models in zip(*(model["rows"] for model in models), strict=True):
        first = of_models[0]
        line = [first["optimizer"], "other" if first["new_addresses"] else "the same"]
        for row in of_models:
            low, high = row["ratio_quartiles"]
            is_usable = row["usable"]
            line.append(f"{row['ms']:.2f}" if is_usable else "not steady")
            line.append(f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})" if is_usable else "")
        lines.append(line)
    return markdown_table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--results", default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with on_a_pretended_gpu():
        models = [measure(model, args.rounds) for model in args.models]
    results = {"environment": environment("cpu"), "rounds": args.rounds, "models": models}
    write_json(args.results, results)
    print(render(results))


if __name__ == "__main__":
    run(main)
