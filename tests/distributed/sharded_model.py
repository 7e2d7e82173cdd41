"""The model of the sharded tests, and a comparison with an optimizer of whole parameters.

``Follower`` lets a StripedAdamW of whole parameters follow one of sharded parameters: it gets the
same gradients, gathered, on copies of the same parameters. The two may differ by float32's rounding
of sums and no more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from striped_hf.optim import StripedAdamW
from striped_hf.optim.rounding import join

# Relative to a parameter's largest element. Sums are added up in another order, which gives a few
# roundings of 6e-8 in each of the few compared steps.
ROUNDING = 2e-6

VOCABULARY, WIDTH = 97, 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        # Packed, in parts of 30 rows, which 4 processes cut. It has no bias, because the gradient
        # of the keys' bias is only noise, which AdamW enlarges.
        self.qkv = nn.Linear(WIDTH, 3 * 30, bias=False)
        self.out = nn.Linear(30, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).split(30, dim=-1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    """A small language model with tied embeddings, a frozen layer and a layer not always used."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.sometimes = nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Linear(1, 6, bias=False)  # fewer columns than processes
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, step: int) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        x = x + self.frozen(x)
        if step % 3 != 1:
            x = x + self.sometimes(x)
        return self.head(x * self.gain(x[..., :1]).mean(-1, keepdim=True).tanh())


def new_model() -> Model:
    torch.manual_seed(0)
    model = Model()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def shard(model: Model, mesh: DeviceMesh | None, **options: Any) -> Model:
    """Shards a model over a mesh. Blocks, and the layer not always used, are units."""
    for module in (*model.blocks, model.sometimes):
        fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def new_optimizer(model: nn.Module, momentum_dtype: str, **arguments: Any) -> StripedAdamW:
    packed = {id(module.qkv.weight) for module in model.modules() if hasattr(module, "qkv")}
    blocks = [(3, 1) if id(p) in packed else (1, 1) for p in model.parameters()]
    group = {"params": list(model.parameters()), "blocks": blocks}
    return StripedAdamW([group], lr=3e-3, momentum_dtype=momentum_dtype, **arguments)


def batch(step: int, rows: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, 16), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, tokens: Tensor, step: int) -> Tensor:
    logits = model(tokens[:, :-1], step).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def gathered(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def local_parts(sharded: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Returns this process's part of a sharded tensor and of a whole one, without an exchange."""
    if not isinstance(sharded, DTensor):
        return sharded, whole
    mesh, placements = sharded.device_mesh, sharded.placements
    part = distribute_tensor(whole, mesh, placements, src_data_rank=None)
    return sharded.to_local(), part.to_local()


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    off = (actual.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert off <= tolerance, f"{what}: off by {off:.2e} of the largest element"


class Follower:
    """One StripedAdamW of whole parameters, and one of sharded parameters."""

    def __init__(self, model: nn.Module, optimizer: StripedAdamW, **arguments: Any) -> None:
        self.optimizer = optimizer
        self.names = dict(model.named_parameters())
        self.whole = [nn.Parameter(gathered(p)) for p in self.names.values()]
        [group] = optimizer.param_groups
        whole_group = {"params": self.whole, "blocks": group["blocks"]}
        options = {key: group[key] for key in ("momentum_dtype", "master_bits")}
        arguments = {**options, **arguments}
        self.follower = StripedAdamW([whole_group], lr=group["lr"], **arguments)

    def step(self) -> None:
        """Steps both and compares them."""
        for p, whole in zip(self.names.values(), self.whole, strict=True):
            whole.grad = None if p.grad is None else gathered(p.grad)
        self.optimizer.step()
        self.follower.step()
        for (name, p), whole in zip(self.names.items(), self.whole, strict=True):
            is_rounded = p.dtype != torch.float32
            tolerance = 2**-7 if is_rounded else ROUNDING
            stepped = gathered(p)
            assert_near(stepped, whole.detach(), tolerance, name)
            assert self.optimizer.state[p].keys() == self.follower.state[whole].keys(), name
            for key, value in self.follower.state[whole].items():
                other = self.optimizer.state[p][key]
                assert (other.shape, other.dtype) == (value.shape, value.dtype), f"{name}: {key}"
                actual, expected = local_parts(other, value)
                if key == "param_low_bits" and other.dtype == torch.int8:
                    continue  # with the parameter
                if other.dtype in (torch.int8, torch.uint8):
                    assert torch.equal(actual, expected), f"{name}: {key}"
                else:
                    torch.testing.assert_close(actual, expected, rtol=3e-6, atol=1e-30)
            self._compare_low_bits(p, whole, name)
            whole.data.copy_(stepped)  # compare only this step's rounding

    def _compare_low_bits(self, p: Tensor, whole: Tensor, name: str) -> None:
        low = self.follower.state[whole].get("param_low_bits")
        if low is None or low.dtype != torch.int8:
            return
        stepped_low = gathered(self.optimizer.state[p]["param_low_bits"])
        actual, expected = join(gathered(p), stepped_low), join(whole.detach(), low)
        assert_near(actual, expected, 2**-15, f"{name} with its low bits")
        # other random bits would change a third of them
        assert (actual != expected).float().mean() < 0.05, name
        low.copy_(stepped_low)


def train(
    model: nn.Module,
    step: Callable[[], None],
    steps: range,
    rank: int = 0,
    rows: int = 2,
    clip: float | None = 1.0,
) -> list[float]:
    """Trains on this rank's rows of each batch; returns the losses."""
    losses = []
    for t in steps:
        tokens = batch(t, rows * (rank + 1))[rows * rank :]
        loss = loss_of(model, tokens, t)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        step()
        model.zero_grad()
        losses.append(loss.item())
    return losses
