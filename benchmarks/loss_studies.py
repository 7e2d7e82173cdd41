"""Variants of StripedAdamW that show where its losses come from; no optimizers to choose from.

``losses.py --optimizers`` accepts them beside the others. Each has one part of the state in another
way: the second moment of some matrices as in AdamW, the levels of int4 with another rounding, or
noise in the momentum. One is AdamW with the momentum of int4.
"""

from functools import partial
from typing import Any

import torch

from benchmarks.loss_peers import BASELINE, PEERS, Betas, Build, Peer
from benchmarks.momentum_codes import CODES, Code
from benchmarks.optimizer_peers import ChainedOptimizer
from striped_hf.optim import StripedAdamW, momentum
from striped_hf.trainer import param_groups

# the parts of GPT-2 and of Llama, each with what the names of its matrices contain
PARTS = {
    "embeddings": ("wte", "wpe", "embed_tokens"),
    "attention": ("attn.",),
    "mlp_in": ("mlp.c_fc", "mlp.gate_proj", "mlp.up_proj"),
    "mlp_out": ("mlp.c_proj", "mlp.down_proj"),
}


def partly_exact(part: str, model: Any, lr: float, betas: Betas, weight_decay: float) -> Any:
    """StripedAdamW with float32 momentum, but AdamW for the matrices of one part."""
    chosen = {
        id(p)
        for name, p in model.named_parameters()
        if p.dim() == 2 and any(module in name for module in PARTS[part])
    }
    exact, rest = [], []
    for group in param_groups(model, weight_decay):
        pairs = [(id(p) in chosen, name, p) for name, p in group["params"]]
        if inside := [p for is_chosen, _, p in pairs if is_chosen]:
            exact.append({"params": inside, "weight_decay": group["weight_decay"]})
        if others := [(name, p) for is_chosen, name, p in pairs if not is_chosen]:
            rest.append({**group, "params": others})
    return ChainedOptimizer(
        torch.optim.AdamW(exact, lr=lr, betas=betas, fused=True),
        StripedAdamW(rest, lr=lr, betas=betas),
    )


class CodedMomentum:
    """An optimizer whose float32 momentum of matrices is a value of a code after each step."""

    def __init__(self, optimizer: torch.optim.Optimizer, code: Code) -> None:
        self.optimizer, self.code = optimizer, code
        self.generator = torch.Generator().manual_seed(0)
        self.param_groups, self.state = optimizer.param_groups, optimizer.state

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        for param, state in self.state.items():
            if param.dim() >= 2:  # vectors have no codes
                kept = state["exp_avg"]
                kept.copy_(self.code(kept, self.generator))


def coded(
    of: Build, code: str, model: Any, lr: float, betas: Betas, weight_decay: float
) -> CodedMomentum:
    return CodedMomentum(of(model, lr, betas, weight_decay), _CODES[code])


def noisy(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Adds noise without bias, of the magnitude of the random rounding between int4's levels.

    Args:
        values: The momentum, [R, C].
        generator: For the noise.
    """
    blocks = momentum.in_blocks(values)
    scale = blocks.abs().amax(-1, keepdim=True)
    # two levels around x are about 2 sqrt(x scale) / qmax apart
    spacing = 2 * (blocks.abs() * scale).sqrt() / momentum.QMAX["int4"]
    noise = torch.rand(blocks.shape, generator=generator) - 0.5
    return (blocks + spacing * noise).flatten(-2)[..., : values.shape[-1]]


_CODES = {**CODES, "noise": noisy}
_STUDIES = (
    *(
        Peer(f"striped_float32_exact_{part}", "striped_hf", partial(partly_exact, part), 3)
        for part in PARTS
    ),
    *(
        Peer(name, package, partial(coded, PEERS[of].build, code), 3)
        for name, package, of, code in (
            ("striped_int4_nearest_value", "striped_hf", "striped_float32", "int4, nearest value"),
            ("striped_int4_at_random", "striped_hf", "striped_float32", "int4, at random"),
            ("striped_float32_noise", "striped_hf", "striped_float32", "noise"),
            ("adamw_int4_momentum", "torch", BASELINE, "int4"),
        )
    ),
)
STUDIES = {peer.name: peer for peer in _STUDIES}
