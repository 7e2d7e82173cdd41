"""Pretrained models and tokenizers: loaded as they are meant, or refused in one line."""

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


def load_model(name_or_path: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Loads a causal language model.

    Args:
        name_or_path: A local folder, or a name on the hub.
        dtype: Of its weights, whatever they were saved in. transformers' own default is the dtype
            of the checkpoint, and in bfloat16 an optimizer's small updates are rounded away.

    Raises:
        UserError: There is no such model.
    """
    return _quiet(load_pretrained(AutoModelForCausalLM, name_or_path, dtype=dtype))


def new_model(config: PretrainedConfig) -> PreTrainedModel:
    """Makes a causal language model with random weights in float32.

    Raises:
        UserError: The configuration's values do not fit each other.
    """
    try:
        return _quiet(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    except (ValueError, TypeError, RuntimeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            f"no {config.model_type} model has this configuration: change its sizes "
            f"({one_line(error)})"
        ) from error


def _quiet(model: PreTrainedModel) -> PreTrainedModel:
    """Names the loss that a causal language model has anyway: else transformers warns of it."""
    if getattr(model, "loss_type", None) is None:
        model.loss_type = "ForCausalLM"
    return model


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Loads a tokenizer.

    Raises:
        UserError: There is none. (Of a folder without one ``AutoTokenizer`` makes a tokenizer that
            knows special tokens only, and so no text.)
    """
    tokenizer: PreTrainedTokenizerBase = load_pretrained(AutoTokenizer, str(name_or_path))
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        raise UserError(
            f"{name_or_path} has no tokenizer: pass a folder that has one, or save the tokenizer "
            "that made the model's data into it"
        )
    return tokenizer


def data_tokenizer(data_dir: str | os.PathLike[str]) -> PreTrainedTokenizerBase | None:
    """Returns the tokenizer that a data set's tokens are of.

    Args:
        data_dir: A folder written by a data script, which has the tokenizer, or by nanoGPT, which
            has the characters in ``meta.pkl``.

    Returns:
        None where the folder does not say.
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
    """Checks that a data set is in a model's tokens: other ids would be read as other text.

    Args:
        data_dir: As for :func:`data_tokenizer`. One that has ``meta.json`` and no tokenizer, which
            no data script writes, is in nobody's tokens and passes.
        name_or_path: The model's folder, or its name on the hub.
        tokenizer: The model's, where it is loaded already.

    Raises:
        UserError: It is in other tokens, or the model has no tokenizer.
    """
    if not Path(data_dir).is_dir():
        return  # open_split says so
    of_data = data_tokenizer(data_dir)
    if of_data is None and Path(data_dir, "meta.json").exists():
        return
    if tokenizer is None:
        tokenizer = load_tokenizer(name_or_path)
    vocabulary = tokenizer.get_vocab()
    if of_data is not None:
        same = of_data.get_vocab() == vocabulary
    else:  # nanoGPT writes GPT-2's tokens and no meta.pkl, or else characters
        gpt2 = {"<|endoftext|>": 50256, "\u0120the": 262}  # two of GPT-2's: its last, and " the"
        same = not Path(data_dir, "meta.pkl").exists() and gpt2.items() <= vocabulary.items()
    if not same:
        raise UserError(
            f"--data_dir {data_dir} is not in the tokens of {name_or_path}: prepare it with the "
            "model's tokenizer (data_scripts/shakespeare.py --tokenizer), or pass a model with the "
            "data's"
        )


def weights_fingerprint(name_or_path: str) -> str | None:
    """Returns what tells a local model's weights from others; None for a name on the hub."""
    folder = Path(name_or_path)
    files = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return " ".join(file_fingerprint(path) for path in sorted(files)) or None


def load_config(name_or_path: str) -> PretrainedConfig:
    """Loads a model's configuration; UserError where there is none."""
    config: PretrainedConfig = load_pretrained(AutoConfig, name_or_path)
    return config


def check_length(flag: str, length: int, name: str, config: PretrainedConfig) -> None:
    """Raises UserError where sequences are longer than a model's positions."""
    longest = getattr(config, "max_position_embeddings", None) or length
    if length > longest:
        raise UserError(
            f"{flag} {length} is more than {name} was made for: pass {flag} {longest} or less"
        )


def encode(tokenizer: Any, text: str, source: str, **options: Any) -> list[int]:
    """Encodes a text.

    Args:
        tokenizer: Any tokenizer of transformers.
        text: The text.
        source: What it is, such as the flag that gave it, for the message.
        options: What the tokenizer is called with.

    Raises:
        UserError: The tokenizer has no tokens for some of its characters.
    """
    try:
        # verbose=False: a text may be longer than the model's context
        ids: list[int] = tokenizer(text, verbose=False, **options)["input_ids"]
    except Exception as error:  # what tokenizers raises for an unknown character has no class
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
