"""The two phases of a step without stored gradients, for the rows of ``gpu_kernels.py``."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_timing import LONG_SLEEP_CYCLES, device_ms, host_ms, kernel_ms
from benchmarks.measuring import quartiles, seconds
from benchmarks.model_shapes import Weight
from benchmarks.optimizer_peers import striped
from striped_hf import LayerwiseStripedAdamW
from striped_hf.trainer.memory import tensor_bytes


@dataclass(frozen=True)
class Phase:
    """One phase of a step in two phases.

    Args:
        momentum_dtype: As for ``StripedAdamW``.
        folds: Whether the phase is the folding of all gradients, or the step after it.
        accumulates: Whether several gradients might come before the step.
    """

    momentum_dtype: str
    folds: bool
    accumulates: bool = False

    def __str__(self) -> str:
        name = "fold" if self.folds else "folded step"
        return f"{self.momentum_dtype} {name}{', accumulating' if self.accumulates else ''}"


PHASES = (
    Phase("int8", folds=True),
    Phase("int8", folds=False),
    Phase("int8", folds=True, accumulates=True),
    Phase("int4", folds=True),
)


def time_phase(
    phase: Phase, weights: list[Weight], baseline: Callable[[], Any], rounds: int
) -> dict[str, Any]:
    """Builds a layerwise optimizer and returns what was measured of one phase of its steps."""
    device = weights[0].param.device
    settings = {"gradient_accumulation": phase.accumulates}
    build = striped(phase.momentum_dtype, "triton", LayerwiseStripedAdamW, **settings)
    optimizer = build(weights)
    optimizer.remove_hooks()
    matrices = [weight.param for weight in weights if weight.param.dim() >= 2]
    grads = [param.grad for param in matrices]

    @torch.no_grad()
    def fold() -> None:
        for param, grad in zip(matrices, grads, strict=True):
            optimizer._fold(param, grad)

    def without_gradients(call: Callable[[], Any], measured: Callable[..., Any]) -> Any:
        """Measures a call while matrices have no gradients, as after a backward pass."""
        for param in matrices:
            param.grad = None
        try:
            return measured(device, call)
        finally:
            for param, grad in zip(matrices, grads, strict=True):
                param.grad = grad

    def time_phases(measured: Callable[..., Any]) -> Any:
        """Takes a step, and measures the phase in it."""
        ways = (measured, _only_call) if phase.folds else (_only_call, measured)
        folded, stepped = map(without_gradients, (fold, optimizer.step), ways)
        optimizer.remove_hooks()  # the step attaches them
        return folded if phase.folds else stepped

    def on_device(device: torch.device, call: Callable[[], Any]) -> float:
        return device_ms(device, call, LONG_SLEEP_CYCLES)

    row: dict[str, Any] = {"first_step_s": time_phases(seconds)}
    time_phases(seconds)
    ours, theirs = [], []
    for _ in range(rounds):
        theirs.append(device_ms(device, baseline))
        ours.append(time_phases(on_device))
    row["device_ms"] = statistics.median(ours)
    low, ratio, high = quartiles([a / b for a, b in zip(ours, theirs, strict=True)])
    row |= {"ratio": ratio, "ratio_quartiles": [low, high]}
    row["host_ms"] = statistics.median(
        time_phases(lambda device, call: host_ms(device, call, 1)) for _ in range(rounds)
    )
    row["wall_ms"] = 1e3 * statistics.median(time_phases(seconds) for _ in range(rounds))
    row["kernels_ms"] = time_phases(lambda device, call: kernel_ms(device, call, 1))
    of_params = sum(param.nbytes for param in matrices)
    of_momentum = tensor_bytes(
        [
            value
            for param in matrices
            for key, value in optimizer.state[param].items()
            if key in ("exp_avg", "exp_avg_scale")
        ]
    )
    # read and written: the momentum, and the gradient read; or the parameter, and the momentum read
    moved = of_params + 2 * of_momentum if phase.folds else 2 * of_params + of_momentum
    row["gb_s"] = moved / row["device_ms"] / 1e6
    row["bytes_per_param"] = moved / sum(param.numel() for param in matrices)
    return row


def _only_call(_: torch.device, call: Callable[[], Any]) -> None:
    call()
