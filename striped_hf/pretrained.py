"""Loads pretrained models and tokenizers, and checks that they fit the data."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from striped_hf.cli import UserError, load_pretrained, one_line
from striped_hf.data.characters import character_tokenizer
from striped_hf.data.tokens.nanogpt import nanogpt_symbols
from striped_hf.fingerprint import file_fingerprint

_NAMED_CHARACTERS = 10


def load_model(name_or_path: str, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
    """Loads a causal language model.

    Args:
        name_or_path: A local folder, or a name on the hub.
        dtype: The dtype of the loaded weights; "auto" is the checkpoint's, as is transformers'
            default. Most optimizers drop small updates of bfloat16 weights.

    Raises:
        UserError: The model cannot be loaded.
    """
    return _quiet(load_pretrained(AutoModelForCausalLM, name_or_path, dtype=dtype))


def new_model(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Makes a causal language model with random weights.

    Args:
        config: The model's configuration.
        dtype: Of the weights.

    Raises:
        UserError: The configuration's values do not fit each other.
    """
    try:
        return _quiet(AutoModelForCausalLM.from_config(config, dtype=dtype))
    except (ValueError, TypeError, RuntimeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            f"no {config.model_type} model has this configuration: change its sizes "
            f"({one_line(error)})"
        ) from error


def _quiet(model: PreTrainedModel) -> PreTrainedModel:
    """Sets ``loss_type`` to the causal language model's loss; otherwise transformers warns."""
    if getattr(model, "loss_type", None) is None:
        model.loss_type = "ForCausalLM"
    return model


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Loads a tokenizer.

    Raises:
        UserError: There is no tokenizer. (For a folder without one, ``AutoTokenizer`` returns a
            tokenizer with special tokens only.)
    """
    tokenizer: PreTrainedTokenizerBase = load_pretrained(AutoTokenizer, str(name_or_path))
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        raise UserError(
            f"{name_or_path} has no tokenizer: pass a folder that has one, or save the tokenizer "
            "that made the model's data into it"
        )
    return tokenizer


def data_tokenizer(data_dir: str | os.PathLike[str]) -> PreTrainedTokenizerBase | None:
    """Returns the tokenizer of a data set.

    Args:
        data_dir: A folder written by a data script, with the tokenizer, or by nanoGPT, with the
            characters in ``meta.pkl``.

    Returns:
        None if the folder has neither.
    """
    if Path(data_dir, "tokenizer.json").is_file():
        return load_tokenizer(data_dir)
    symbols = nanogpt_symbols(Path(data_dir))
    return None if symbols is None else character_tokenizer(symbols)


def check_tokens(
    data_dir: str | os.PathLike[str],
    name_or_path: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Checks that a data set was tokenized with a model's tokenizer.

    Args:
        data_dir: As for :func:`data_tokenizer`. A folder with ``meta.json`` and no tokenizer
            passes; no data script writes one.
        name_or_path: The model's folder, or its name on the hub.
        tokenizer: The model's tokenizer, if it is loaded already.

    Raises:
        UserError: The data has other tokens, or the model has no tokenizer.
    """
    if not Path(data_dir).is_dir():
        return  # open_split raises the error
    of_data = data_tokenizer(data_dir)
    if of_data is None and Path(data_dir, "meta.json").exists():
        return
    if tokenizer is None:
        tokenizer = load_tokenizer(name_or_path)
    vocabulary = tokenizer.get_vocab()
    if of_data is not None:
        same = of_data.get_vocab() == vocabulary
    else:  # nanoGPT writes GPT-2's tokens and no meta.pkl, or else characters
        gpt2 = {"<|endoftext|>": 50256, "\u0120the": 262}  # GPT-2's last token, and " the"
        same = not Path(data_dir, "meta.pkl").exists() and gpt2.items() <= vocabulary.items()
    if not same:
        raise UserError(
            f"--data_dir {data_dir} does not have the tokens of {name_or_path}: prepare it with "
            "the model's tokenizer (data_scripts/shakespeare.py --tokenizer), or pass a model with "
            "the data's tokenizer"
        )


def weights_fingerprint(name_or_path: str) -> str | None:
    """Returns a fingerprint of a local model's weights; None for a name on the hub."""
    folder = Path(name_or_path)
    files = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return " ".join(file_fingerprint(path) for path in sorted(files)) or None


def load_config(name_or_path: str) -> PretrainedConfig:
    """Loads a model's configuration; UserError if there is none."""
    config: PretrainedConfig = load_pretrained(AutoConfig, name_or_path)
    return config


def check_length(flag: str, length: int, name: str, config: PretrainedConfig) -> None:
    """Raises UserError if sequences are longer than a model's context."""
    longest = getattr(config, "max_position_embeddings", None) or length
    if length > longest:
        raise UserError(
            f"{flag} {length} exceeds the context of {name}: pass {flag} {longest} or less"
        )


def encode(tokenizer: Any, text: str, source: str, **options: Any) -> list[int]:
    """Encodes a text.

    Args:
        tokenizer: Any tokenizer of transformers.
        text: The text.
        source: The text's origin for the error message, such as a flag.
        options: Further arguments of the tokenizer.

    Raises:
        UserError: The tokenizer cannot encode some of the text's characters.
    """
    try:
        # verbose=False: a text may be longer than the model's context
        ids: list[int] = tokenizer(text, verbose=False, **options)["input_ids"]
    except Exception as error:  # tokenizers raises a plain Exception for an unknown character
        unknown = [c for c in dict.fromkeys(text) if not _knows(tokenizer, c)]
        if not unknown:
            raise UserError(f"{source} cannot be encoded: {one_line(error)}") from error
        named = ", ".join(f"{c!r}" for c in unknown[:_NAMED_CHARACTERS])
        more = len(unknown) - _NAMED_CHARACTERS
        raise UserError(
            f"{source} has characters unknown to the model: {named}"
            + (f" and {more:,} more" if more > 0 else "")
            + "; leave them out, or use a model whose tokenizer has them"
        ) from error
    return ids


def _knows(tokenizer: Any, character: str) -> bool:
    try:
        tokenizer(character)
    except Exception:
        return False
    return True
