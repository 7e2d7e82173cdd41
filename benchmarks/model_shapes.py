"""The models of the benchmarks, built on the meta device without weights."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from recipes.pretrain_openwebtext import GPT2_SIZES
from striped_hf.cli import load_pretrained
from striped_hf.trainer import param_groups

LLAMA_SIZES = {  # the published sizes of Llama 3.2 1B and of Llama 3.1 8B, 70B and 405B
    name: {
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": name == "llama-1b",
    }
    for name, hidden, intermediate, layers, heads in (
        ("llama-1b", 2048, 8192, 16, 32),
        ("llama-8b", 4096, 14336, 32, 32),
        ("llama-70b", 8192, 28672, 80, 64),
        ("llama-405b", 16384, 53248, 126, 128),
    )
}
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


def load_config(name: str) -> PretrainedConfig:
    """Returns the configuration of a model.

    Args:
        name: A name in ``GPT2_SIZES`` or ``LLAMA_SIZES``, a local folder, or a name on the hub.

    Raises:
        UserError: It is none of them.
    """
    if name in GPT2_SIZES:
        return GPT2Config(**GPT2_SIZES[name])
    if name in LLAMA_SIZES:
        return LlamaConfig(**LLAMA_SIZES[name])
    return load_pretrained(AutoConfig, name)


def meta_model(name: str) -> PreTrainedModel:
    """Builds a model on the meta device; ``name`` as in ``load_config``."""
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
