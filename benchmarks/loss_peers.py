"""The optimizers whose losses benchmarks/losses.py compares, each from its released package.

A peer imports its package when it is built: a package that is not installed costs only its row.
Every optimizer has the task's betas and weight decay, and otherwise its own defaults.
"""

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.optimizer_peers import ChainedOptimizer, installed_version, states
from striped_hf.optim import StripedAdamW
from striped_hf.trainer import param_groups
from striped_hf.trainer.memory import tensor_bytes

Betas = tuple[float, float]
# model, learning rate, betas, weight decay
Build = Callable[[Any, float, Betas, float], Any]


@dataclass(frozen=True)
class Peer:
    """One optimizer.

    Args:
        name: The name of its row in the table.
        package: The distribution that contains it.
        build: Makes the optimizer for a model.
        group: The peers of a lower number run first.
        dtype: Of the model's weights.
    """

    name: str
    package: str
    build: Build
    group: int
    dtype: str = "float32"

    def version(self) -> str | None:
        """Returns the installed version of the package; None if it is not installed.

        For this project it is the last commit that changed the optimizer.
        """
        if self.package == "striped_hf":
            return _optimizer_commit()
        return installed_version(self.package)


def _optimizer_commit() -> str:
    folder = Path(__file__).resolve().parents[1] / "striped_hf" / "optim"

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments, "--", "."]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    changed = "-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
    return (git("log", "-1", "--format=%h") or "unknown") + changed


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Sets the rate of all param groups; torchao keeps it in a tensor."""
    for each in optimizer.optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]:
        for group in each.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def peer_state_bytes(optimizer: Any) -> int:
    """Counts the bytes of an optimizer's state, also of tensors in objects such as projectors."""

    def opened(value: Any) -> Any:
        if isinstance(value, (Tensor, dict, list, tuple)) or not hasattr(value, "__dict__"):
            return value
        return dict(vars(value))

    return tensor_bytes(
        [{key: opened(value) for key, value in s.items()} for s in states(optimizer).values()]
    )


def plain_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Returns Trainer's two param groups, without the settings of StripedAdamW."""
    return [
        {"params": [p for _, p in group["params"]], "weight_decay": group["weight_decay"]}
        for group in param_groups(model, weight_decay)
        if group["params"]
    ]


def hidden_matrices(model: Any) -> set[int]:
    """Returns the ids of the matrices that are neither embeddings nor the output layer."""
    outside = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    if model.get_output_embeddings() is not None:
        outside.add(id(model.get_output_embeddings().weight))
    return {id(p) for p in model.parameters() if p.dim() == 2} - outside


def split_groups(
    model: nn.Module, weight_decay: float, **options: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the param groups of the hidden matrices, with ``options``, and of all others."""
    hidden = hidden_matrices(model)
    inside, others = [], []
    for group in plain_groups(model, weight_decay):
        for chosen, found in ((True, inside), (False, others)):
            params = [p for p in group["params"] if (id(p) in hidden) == chosen]
            if params:
                extra = options if chosen else {}
                found.append({**group, "params": params, **extra})
    return inside, others


def adamw(model: Any, lr: float, betas: Betas, weight_decay: float) -> Any:
    return torch.optim.AdamW(plain_groups(model, weight_decay), lr=lr, betas=betas, fused=True)


def striped(momentum_dtype: str, model: Any, lr: float, betas: Betas, weight_decay: float) -> Any:
    groups = param_groups(model, weight_decay)
    return StripedAdamW(groups, lr=lr, betas=betas, momentum_dtype=momentum_dtype)


def bitsandbytes_adamw8bit(model: Any, lr: float, betas: Betas, weight_decay: float) -> Any:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(plain_groups(model, weight_decay), lr=lr, betas=betas)


def torchao_adamw(bits: int, model: Any, lr: float, betas: Betas, weight_decay: float) -> Any:
    from torchao.optim import AdamW4bit, AdamW8bit

    cls = {4: AdamW4bit, 8: AdamW8bit}[bits]
    return cls(plain_groups(model, weight_decay), lr=lr, betas=betas)


def adafactor(momentum: bool, model: Any, lr: float, betas: Betas, weight_decay: float) -> Any:
    from transformers import Adafactor

    return Adafactor(
        plain_groups(model, weight_decay),
        lr=lr,
        beta1=betas[0] if momentum else None,
        scale_parameter=False,  # both as Trainer sets them
        relative_step=False,
    )


def adafactor8bit(
    preset: str,
    overrides: tuple[str, ...],
    model: Any,
    lr: float,
    betas: Betas,
    weight_decay: float,
) -> Any:
    from adafactor8bit import Adafactor8Bit, build_param_groups

    values = {"beta1": betas[0], "beta2": betas[1]}
    groups = build_param_groups(model, preset=preset, **{key: values[key] for key in overrides})
    return Adafactor8Bit(groups, lr=lr, weight_decay=weight_decay)


def adam_mini(model: Any, lr: float, betas: Betas, weight_decay: float) -> Any:
    from adam_mini import Adam_mini

    config = model.config
    return Adam_mini(
        model.named_parameters(),
        lr=lr,
        betas=betas,
        weight_decay=weight_decay,
        dim=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None),
        verbose=False,
    )


def galore(model: Any, lr: float, betas: Betas, weight_decay: float) -> Any:
    from galore_torch import GaLoreAdamW

    # rank: a quarter of the width, as in its paper; the rest as Trainer sets it
    inside, others = split_groups(
        model,
        weight_decay,
        rank=model.config.hidden_size // 4,
        update_proj_gap=200,
        scale=0.25,
        proj_type="std",
    )
    return GaLoreAdamW([*others, *inside], lr=lr, betas=betas, no_deprecation_warning=True)


def apollo(model: Any, lr: float, betas: Betas, weight_decay: float) -> Any:
    from apollo_torch import APOLLOAdamW

    inside, others = split_groups(
        model,
        weight_decay,
        rank=model.config.hidden_size // 4,
        proj="random",
        scale_type="channel",
        update_proj_gap=200,
        scale=1.0,
        proj_type="std",
    )
    return APOLLOAdamW([*others, *inside], lr=lr, betas=betas)


def came(model: Any, lr: float, betas: Betas, weight_decay: float) -> Any:
    from came_pytorch import CAME

    return CAME(plain_groups(model, weight_decay), lr=lr, betas=(*betas, 0.9999))


def muon(model: Any, lr: float, betas: Betas, weight_decay: float) -> Any:
    inside, others = split_groups(model, weight_decay)
    return ChainedOptimizer(
        # this adjustment lets both have one learning rate
        torch.optim.Muon(inside, lr=lr, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=betas, fused=True),
    )


BASELINE = "adamw"
_PEERS = (
    Peer(BASELINE, "torch", adamw, 0),
    Peer("striped_float32", "striped_hf", partial(striped, "float32"), 0),
    Peer("striped_int8", "striped_hf", partial(striped, "int8"), 0),
    Peer("striped_int4", "striped_hf", partial(striped, "int4"), 0),
    Peer("striped_bfloat16", "striped_hf", partial(striped, "bfloat16"), 0),
    # about two bytes of state per parameter, or less
    Peer("bitsandbytes_adamw8bit", "bitsandbytes", bitsandbytes_adamw8bit, 1),
    Peer("torchao_adamw8bit", "torchao", partial(torchao_adamw, 8), 1),
    Peer("transformers_adafactor_no_momentum", "transformers", partial(adafactor, False), 1),
    Peer(
        "adafactor8bit_adamw",
        "adafactor8bit",
        partial(adafactor8bit, "adamw", ("beta1", "beta2")),
        1,
    ),
    Peer("torchao_adamw4bit", "torchao", partial(torchao_adamw, 4), 1),
    Peer("adafactor8bit_adafactor", "adafactor8bit", partial(adafactor8bit, "adafactor", ()), 1),
    Peer("apollo", "apollo-torch", apollo, 1),
    Peer("galore", "galore-torch", galore, 1),
    # more
    Peer("adamw_bfloat16_weights", "torch", adamw, 2, dtype="bfloat16"),
    Peer("transformers_adafactor", "transformers", partial(adafactor, True), 2),
    Peer("came", "came-pytorch", came, 2),
    Peer("adam_mini", "adam-mini", adam_mini, 2),
    Peer("muon", "torch", muon, 2),
)
PEERS = {peer.name: peer for peer in _PEERS}
