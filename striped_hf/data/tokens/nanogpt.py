"""Reads nanoGPT's ``meta.pkl``, the characters of a small data set."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

_LARGEST_META = 64 << 20  # bytes; all of Unicode's characters take 20


def nanogpt_symbols(data_dir: Path) -> str | None:
    """Reads the characters of a data set prepared by nanoGPT, in the order of their ids.

    They are in ``meta.pkl``, a pickle. The reader accepts only dicts, lists, strings and numbers.
    It rejects a pickle that names a class or function, and calls nothing from it.

    Returns:
        None if the file does not exist, is rejected, or has no characters.
    """
    path = data_dir / "meta.pkl"
    if not path.is_file() or path.stat().st_size > _LARGEST_META:
        return None
    try:
        with path.open("rb") as file:
            symbols = _Plain(file).load()["itos"]
        characters = [symbols[i] for i in range(len(symbols))]
    except Exception:  # a damaged pickle may raise anything
        return None
    if not characters or not all(isinstance(c, str) and len(c) == 1 for c in characters):
        return None
    return "".join(characters) if len(set(characters)) == len(characters) else None


class _Plain(pickle.Unpickler):
    """Reads a pickle of plain values; a class or function in it is an error."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is no plain value")
