"""Reading a data set: one split, checked and mapped into memory."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from striped_hf.data.tokens.format import (
    DTYPES,
    PREPARE_AGAIN,
    DataSetError,
    count_tokens,
    read_meta,
)
from striped_hf.data.tokens.nanogpt import nanogpt_symbols
from striped_hf.fingerprint import file_fingerprint

logger = logging.getLogger(__name__)

_PROBED_TOKENS = 1 << 22  # tokens to check when a file is opened: 8 or 16 MiB
_GPT2_VOCAB_SIZE = 50_257


@dataclass(frozen=True, eq=False)
class TokenSplit:
    """One split of a data set, mapped into memory; made by :func:`open_split`.

    A pickled split has its path, not its tokens: spawned data-loader workers map the file again
    instead of copying it.

    Attributes:
        path: The ``.bin`` file.
        dtype: "uint16" or "uint32".
        vocab_size: The vocabulary size of the tokenizer that made the ids.
        meta: The content of ``meta.json``; empty for a folder prepared by nanoGPT.
        model_vocab_size: The vocabulary size of the model that will read the tokens; None if not
            known.
    """

    path: Path
    dtype: str
    vocab_size: int
    meta: dict[str, Any]
    model_vocab_size: int | None = None

    @cached_property
    def tokens(self) -> np.ndarray:
        """The unchecked token ids: a read-only 1-D array of ``dtype``, mapped from the file."""
        # asarray makes a plain view: operations on a subclass such as np.memmap are slower
        return np.asarray(np.memmap(self.path, dtype=DTYPES[self.dtype], mode="r"))

    def read(self, positions: np.ndarray) -> np.ndarray:
        """Returns the token ids at some positions.

        Args:
            positions: Integers of any shape. Positions beyond the end give the last token.

        Returns:
            The ids, of type ``dtype`` and the shape of ``positions``.

        Raises:
            DataSetError: If an id is outside the data's or the model's vocabulary. (An embedding
                lookup would be wrong or, on a GPU, end the process.)
        """
        ids = self.tokens.take(positions, mode="clip")
        self.check_id(int(ids.max()))
        return ids

    def check_id(self, largest: int) -> None:
        """Raises DataSetError if a token id is outside the data's or the model's vocabulary."""
        if largest >= self.vocab_size:
            owner, limit = "meta.json's", self.vocab_size
            fix = f"the file is damaged or not of this data set; {PREPARE_AGAIN}"
            if not self.meta:
                owner = "its tokenizer's"
            if not self.meta and not (self.path.parent / "meta.pkl").exists():
                fix = (
                    "a folder without meta.json and meta.pkl is read as nanoGPT's, with GPT-2's "
                    f"vocabulary; if the data has another vocabulary, {PREPARE_AGAIN}"
                )
        elif self.model_vocab_size is not None and largest >= self.model_vocab_size:
            owner, limit = "the model's", self.model_vocab_size
            fix = (
                "prepare the data with the model's own tokenizer, or pass the model that belongs "
                "to the data"
            )
        else:
            return
        raise DataSetError(
            f"{self.path} holds token id {largest}, outside {owner} vocab_size {limit}: {fix}"
        )

    def fingerprint(self) -> str:
        """Returns a hash of the split's content, 16 hexadecimal digits."""
        return file_fingerprint(self.path, self.dtype)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "tokens"}


def open_split(
    data_dir: str | os.PathLike[str], split: str, *, vocab_size: int | None = None
) -> TokenSplit:
    """Opens one split of a data set; time and memory do not depend on its size.

    This function checks the file's length, and compares the largest id in ``meta.json`` and the
    first 4 million tokens with the vocabularies. :meth:`TokenSplit.read`, which the data sets of
    this package use, checks all other tokens when it reads them.

    A folder prepared by nanoGPT has no ``meta.json``; its tokens are read as uint16. Its vocabulary
    is the characters in ``meta.pkl``, or all ids up to the largest one if ``meta.pkl`` cannot be
    read. Without ``meta.pkl`` it is GPT-2's vocabulary.

    Args:
        data_dir: A folder written by :func:`write_data_set` or by nanoGPT.
        split: "train" or "val".
        vocab_size: The model's vocabulary size; every id must be below it.

    Returns:
        The split; its tokens are mapped read-only.

    Raises:
        FileNotFoundError: If the folder or the split's file is missing.
        DataSetError: If ``meta.json`` is malformed or names an unknown dtype; if the file is empty,
            odd-sized or not of the length in ``meta.json``; or if a checked id is outside a
            vocabulary.
    """
    folder = Path(data_dir)
    path = folder / f"{split}.bin"
    if not path.is_file():
        missing = path if folder.is_dir() else folder
        raise FileNotFoundError(
            f"{missing} does not exist: prepare the data first with its script in data_scripts/, "
            f"e.g. `python data_scripts/shakespeare_char.py --output_dir {folder}`"
        )
    if (folder / "meta.json").exists():
        meta = read_meta(folder / "meta.json")
        opened = TokenSplit(path, meta["dtype"], meta["vocab_size"], meta, vocab_size)
        if split not in meta["tokens"]:
            raise DataSetError(
                f"{folder / 'meta.json'}: tokens has no count for {split!r}; {PREPARE_AGAIN}"
            )
        count = count_tokens(path, opened.dtype)
        if count != meta["tokens"][split]:
            raise DataSetError(
                f"{path} holds {count:,} tokens, meta.json says "
                f"{meta['tokens'][split]:,}: the file is truncated or not of this data set; "
                f"{PREPARE_AGAIN}"
            )
        opened.check_id(meta.get("largest_id", {}).get(split, 0))
    else:
        opened = TokenSplit(path, "uint16", _nanogpt_vocab_size(folder), {}, vocab_size)
        count_tokens(path, opened.dtype)
        logger.warning(
            "%s has no meta.json: reading %s as nanoGPT's uint16, with vocab_size %d",
            folder,
            path.name,
            opened.vocab_size,
        )
    # read, not mapped: mapped pages would count in this process's peak memory
    opened.check_id(int(np.fromfile(path, DTYPES[opened.dtype], _PROBED_TOKENS).max()))
    return opened


def _nanogpt_vocab_size(folder: Path) -> int:
    if not (folder / "meta.pkl").exists():
        return _GPT2_VOCAB_SIZE
    if (symbols := nanogpt_symbols(folder)) is not None:
        return len(symbols)
    largest = 0
    for path in folder.glob("*.bin"):
        count_tokens(path, "uint16")
        with path.open("rb") as file:
            while len(piece := np.fromfile(file, DTYPES["uint16"], _PROBED_TOKENS)):
                largest = max(largest, int(piece.max()))
    return largest + 1
