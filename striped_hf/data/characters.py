"""The tokenizer of a data set of characters."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def character_tokenizer(symbols: str) -> PreTrainedTokenizerFast:
    """Makes a tokenizer with one token for each character; its id is the index in ``symbols``.

    It adds no special tokens, and decoding restores the text exactly. A character outside
    ``symbols`` raises an error (tokenizers: "WordLevel error: Missing [UNK] token").
    """
    tokenizer = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
