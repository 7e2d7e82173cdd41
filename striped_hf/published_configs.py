"""Configurations of well-known models, as published, for where there is no network."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from striped_hf import pretrained

GPT2_SIZES = {  # the hub's configurations of these names
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}
LLAMA_SIZES = {  # Llama 3.2 1B's, and Llama 3.1 8B's, 70B's and 405B's
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
_PUBLISHED: dict[str, dict[str, Any]] = {
    **{name: {"model_type": "gpt2", **sizes} for name, sizes in GPT2_SIZES.items()},
    **{name: {"model_type": "llama", **sizes} for name, sizes in LLAMA_SIZES.items()},
    "llama-2-7b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "mistral-7b": {  # v0.3
        "model_type": "mistral",
        "vocab_size": 32768,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "rms_norm_eps": 1e-5,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
    },
}
NAMES = tuple(_PUBLISHED)


def load_config(name_or_path: str) -> PretrainedConfig:
    """Returns the configuration of a model.

    Args:
        name_or_path: One of ``NAMES``, which need no network; a local folder; or a name on the hub.

    Raises:
        UserError: It is none of them.
    """
    if name_or_path in _PUBLISHED:
        values = dict(_PUBLISHED[name_or_path])
        return AutoConfig.for_model(values.pop("model_type"), **values)
    return pretrained.load_config(name_or_path)
