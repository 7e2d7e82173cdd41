"""The tokenizer of a data set of characters."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def character_tokenizer(symbols: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token a character, its id the character's place in ``symbols``.

    It adds no special tokens and decodes what it encodes without loss. A character outside
    ``symbols`` is an error (tokenizers: "WordLevel error: Missing [UNK] token"), never dropped.
    """
    tokenizer = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
