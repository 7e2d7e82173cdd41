"""The token-file format: a folder with one flat array of token ids per split, and ``meta.json``.

``train.bin`` and ``val.bin`` are raw little-endian uint16 (uint32 for a vocabulary over 65,536)
without a header, as in nanoGPT. ``meta.json`` describes them::

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
    """A data set's folder is not valid; the message is one line and names the fix."""


def dtype_for(vocab_size: int) -> str:
    """Returns the narrowest of ``DTYPES`` that holds every id; ValueError if none does."""
    if not 1 <= vocab_size <= 1 << 32:
        raise ValueError(f"vocab_size={vocab_size}: must be between 1 and 2**32")
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def read_meta(path: Path) -> dict[str, Any]:
    """Reads ``meta.json`` and checks its entries; DataSetError if one is wrong."""
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
    largest = meta.get("largest_id", {})  # optional, for a file made by hand
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
    """Returns the number of tokens in a ``.bin`` file; DataSetError if empty or odd-sized."""
    size, width = path.stat().st_size, DTYPES[dtype].itemsize
    if size == 0 or size % width:
        raise DataSetError(
            f"{path} is {size:,} bytes, not a positive multiple of {width} ({dtype}): it is "
            f"truncated or of another dtype; {PREPARE_AGAIN}"
        )
    return size // width
