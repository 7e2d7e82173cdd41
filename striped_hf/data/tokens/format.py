"""The token-file format: a folder with one flat array of token ids a split, and ``meta.json``.

``train.bin`` and ``val.bin`` are raw little-endian uint16 (uint32 where the vocabulary needs it)
with no header, as nanoGPT writes and reads them. ``meta.json`` says what they hold::

    {"dtype": "uint16", "vocab_size": 65, "tokens": {"train": 1003854, "val": 111540},
     "largest_id": {"train": 64, "val": 63},
     "source": {"name": ..., "url": ..., "sha256": ...}, "tokenizer": "characters"}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from striped_hf.cli import UserError

DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
PREPARE_AGAIN = "prepare the folder again with its script in data_scripts/"


class DataSetError(UserError, ValueError):
    """A data set's folder is not what it should be; the message is one line that says the fix."""


def dtype_for(vocab_size: int) -> str:
    """Return the narrowest of ``DTYPES`` that holds every id; ValueError where none does."""
    if not 1 <= vocab_size <= 1 << 32:
        raise ValueError(f"vocab_size={vocab_size}: must be between 1 and 2**32")
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def read_meta(path: Path) -> dict[str, Any]:
    """Read ``meta.json`` and check what the reader relies on."""
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataSetError(f"{path} is not JSON ({error}); {PREPARE_AGAIN}") from None
    if not isinstance(meta, dict):
        raise DataSetError(f"{path}: must hold an object, not {meta!r:.80}; {PREPARE_AGAIN}")
    if meta.get("dtype") not in list(DTYPES):
        raise DataSetError(
            f"{path}: dtype {meta.get('dtype')!r} is unknown (known: {', '.join(DTYPES)}); "
            f"{PREPARE_AGAIN}"
        )
    if not _is_count(meta.get("vocab_size")):
        raise DataSetError(
            f"{path}: vocab_size {meta.get('vocab_size')!r} is not a positive integer; "
            f"{PREPARE_AGAIN}"
        )
    counts = meta.get("tokens")
    if not isinstance(counts, dict) or not all(map(_is_count, counts.values())):
        raise DataSetError(
            f"{path}: tokens {counts!r:.80} is not a count for each split; {PREPARE_AGAIN}"
        )
    largest = meta.get("largest_id", {})  # which a file made by hand need not have
    if not isinstance(largest, dict) or not all(
        type(i) is int and i >= 0 for i in largest.values()
    ):
        raise DataSetError(
            f"{path}: largest_id {largest!r:.80} is not an id for each split; {PREPARE_AGAIN}"
        )
    return meta


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def count_tokens(path: Path, dtype: str) -> int:
    """Return how many tokens a ``.bin`` file holds; DataSetError for an empty or odd-sized one."""
    size, width = path.stat().st_size, DTYPES[dtype].itemsize
    if size == 0 or size % width:
        raise DataSetError(
            f"{path} is {size:,} bytes, not a positive multiple of {width} ({dtype}): it is "
            f"truncated or of another dtype; {PREPARE_AGAIN}"
        )
    return size // width
