"""The optimizers that the benchmark compares, each with its best settings.

A peer imports its package when it is built: a package that is not installed costs only its row. The
learning rate is small and the same for all. It does not affect the time of a step.
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.model_shapes import Weight
from striped_hf.optim import StripedAdamW
from striped_hf.optim.backends import resolve
from striped_hf.optim.momentum import MOMENTUM_DTYPES

LR = 1e-5
BASELINE = "adamw_fused"


@dataclass(frozen=True)
class Peer:
    """One optimizer of the benchmark.

    Args:
        name: The name of its row in the table.
        package: The distribution that contains it.
        build: Makes the optimizer for some weights.
        room: The largest size of its state and its step's temporaries, in bytes per float32
            parameter. The benchmark builds it only while that much memory is free.
        gradient_reads: How many times its rule must read the gradient in one step: once; twice if
            the update needs statistics of a whole matrix; three times if it also needs the norm of
            the update. None if arithmetic, not memory, limits its speed.
    """

    name: str
    package: str
    build: Callable[[list[Weight]], Any]
    room: float
    gradient_reads: int | None

    def version(self) -> str | None:
        """Returns the installed version of the package; None if it is not installed."""
        return installed_version(self.package)


def installed_version(package: str) -> str | None:
    """Returns the version of an installed distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class ChainedOptimizer:
    """Several optimizers that step as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> list[Any]:
        return [optimizer.state_dict() for optimizer in self.optimizers]


def states(optimizer: Any) -> dict[Tensor, Any]:
    """Returns an optimizer's state by parameter."""
    if isinstance(optimizer, ChainedOptimizer):
        return {p: s for each in optimizer.optimizers for p, s in each.state.items()}
    return dict(optimizer.state)


def plain_groups(weights: list[Weight]) -> list[dict[str, Any]]:
    """Returns Trainer's two param groups: parameters with weight decay, and without."""
    groups = []
    for decay in sorted({weight.weight_decay for weight in weights}, reverse=True):
        params = [weight.param for weight in weights if weight.weight_decay == decay]
        groups.append({"params": params, "weight_decay": decay})
    return groups


def on_gpu(weights: list[Weight]) -> bool:
    return weights[0].param.is_cuda


def adamw_fused(weights: list[Weight]) -> Any:
    return torch.optim.AdamW(plain_groups(weights), lr=LR, fused=True)


def adamw_foreach(weights: list[Weight]) -> Any:
    return torch.optim.AdamW(plain_groups(weights), lr=LR, foreach=True)


def adafactor(weights: list[Weight]) -> Any:
    # torch has foreach kernels only for GPUs; on a CPU foreach is a loop with more temporaries
    return torch.optim.Adafactor(plain_groups(weights), lr=LR, foreach=on_gpu(weights))


def muon(weights: list[Weight]) -> Any:
    # as its documentation says: Muon for hidden matrices, AdamW for everything else
    hidden = [w for w in weights if w.param.dim() == 2 and not w.embedding]
    others = [w for w in weights if w.param.dim() != 2 or w.embedding]
    return ChainedOptimizer(torch.optim.Muon(plain_groups(hidden), lr=LR), adamw_fused(others))


def transformers_adafactor(weights: list[Weight]) -> Any:
    from transformers import Adafactor

    return Adafactor(
        plain_groups(weights), lr=LR, beta1=0.9, scale_parameter=False, relative_step=False
    )


def bitsandbytes_adamw8bit(weights: list[Weight]) -> Any:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(plain_groups(weights), lr=LR)


def torchao_adamw8bit(weights: list[Weight]) -> Any:
    from torchao.optim import AdamW8bit

    return AdamW8bit(plain_groups(weights), lr=LR)  # it compiles its step itself


def torchao_adamw4bit(weights: list[Weight]) -> Any:
    from torchao.optim import AdamW4bit

    return AdamW4bit(plain_groups(weights), lr=LR)


def flashoptim_adamw(weights: list[Weight]) -> Any:
    from flashoptim import FlashAdamW

    return FlashAdamW(plain_groups(weights), lr=LR)


def optimi_adamw(weights: list[Weight]) -> Any:
    from optimi import AdamW

    return AdamW(plain_groups(weights), lr=LR)  # it chooses Triton or foreach itself


def striped(
    momentum_dtype: str, backend: str, cls: type[StripedAdamW] = StripedAdamW, **settings: bool
) -> Callable[[list[Weight]], Any]:
    """Returns a function that builds a ``cls``; ``settings`` are further options of it."""

    def build(weights: list[Weight]) -> Any:
        # raises an error with the reason if the named backend cannot run
        resolve(backend, weights[0].param.device.type)
        groups = plain_groups(weights)
        for group in groups:
            group["blocks"] = [w.blocks for w in weights if w.weight_decay == group["weight_decay"]]
        return cls(groups, lr=LR, momentum_dtype=momentum_dtype, backend=backend, **settings)

    return build


PEERS = (
    Peer(BASELINE, "torch", adamw_fused, room=8, gradient_reads=1),
    Peer("adamw_foreach", "torch", adamw_foreach, room=16, gradient_reads=1),
    Peer("adafactor", "torch", adafactor, room=12, gradient_reads=3),
    Peer("muon", "torch", muon, room=8, gradient_reads=None),
    Peer("transformers_adafactor", "transformers", transformers_adafactor, 6, gradient_reads=3),
    Peer("bitsandbytes_adamw8bit", "bitsandbytes", bitsandbytes_adamw8bit, 4, gradient_reads=1),
    Peer("torchao_adamw8bit", "torchao", torchao_adamw8bit, room=4, gradient_reads=1),
    Peer("torchao_adamw4bit", "torchao", torchao_adamw4bit, room=4, gradient_reads=1),
    Peer("flashoptim_adamw", "flashoptim", flashoptim_adamw, room=4, gradient_reads=1),
    Peer("optimi_adamw", "torch-optimi", optimi_adamw, room=16, gradient_reads=1),
)
STRIPED_ROOM = {"float32": 4.5, "bfloat16": 2.5, "int8": 1.5, "int4": 1.0}
LAGGED = ("float32", "int8")


def all_peers(backends: list[str]) -> list[Peer]:
    """Returns every peer, with StripedAdamW once for each of the backends."""
    entries = list(PEERS)
    for backend in backends:
        suffix = "" if backend == "auto" else f":{backend}"
        entries += [
            Peer(f"striped_{dtype}{suffix}", "striped_hf", striped(dtype, backend), room, 2)
            for dtype, room in STRIPED_ROOM.items()
        ]
        entries += [
            Peer(
                f"striped_{dtype}_lagged{suffix}",
                "striped_hf",
                striped(dtype, backend, lagged=True),
                STRIPED_ROOM[dtype],
                gradient_reads=1,
            )
            for dtype in LAGGED
        ]
    return entries


assert tuple(STRIPED_ROOM) == MOMENTUM_DTYPES
