"""The models of the benchmarks, built on the meta device without weights."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from striped_hf.published_configs import load_config
from striped_hf.trainer import param_groups

WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Weight:
    """One parameter, and its properties that optimizers use.

    ``blocks`` divides packed projections (see ``StripedAdamW``); ``embedding`` tells whether the
    parameter belongs to the input or output embedding.
    """

    name: str
    param: Tensor
    weight_decay: float
    blocks: tuple[int, int]
    embedding: bool


def meta_model(name: str) -> PreTrainedModel:
    """Builds a model on the meta device; ``name`` as in ``published_configs.load_config``."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(load_config(name))


def meta_weights(model: PreTrainedModel) -> list[Weight]:
    """Lists a model's parameters in the param groups that Trainer makes of them."""
    embedding_modules = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    embeddings = {module.weight for module in (*embedding_modules, model.get_output_embeddings())}
    return [
        Weight(name, param, group["weight_decay"], blocks, param in embeddings)
        for group in param_groups(model, WEIGHT_DECAY)
        for (name, param), blocks in zip(group["params"], group["blocks"], strict=True)
    ]


def allocate(weights: list[Weight], device: torch.device, dtype: torch.dtype) -> Iterator[Weight]:
    """Yields the weights with random parameters and gradients in place of the meta tensors."""
    generator = torch.Generator(device).manual_seed(0)
    for weight in weights:
        shape = weight.param.shape
        param, grad = (
            torch.empty(shape, device=device, dtype=dtype).normal_(0.0, std, generator=generator)
            for std in (0.02, 1e-3)
        )
        param = nn.Parameter(param)
        param.grad = grad
        yield Weight(weight.name, param, weight.weight_decay, weight.blocks, weight.embedding)


def slug(name: str) -> str:
    """Returns a model's name in the form for file names."""
    return name.rstrip("/").split("/")[-1].replace("-", "_")
