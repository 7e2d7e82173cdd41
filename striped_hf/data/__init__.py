"""Token files and the data sets over them.

A data set is a folder with ``train.bin``, ``val.bin`` and ``meta.json``, written by a script in
``data_scripts/`` (or by nanoGPT, whose ``.bin`` files have the same format).

- :func:`open_split` checks one split and maps it into memory.
- :class:`RandomWindows` draws training windows from a split. :class:`ContiguousBlocks` covers it
  once for evaluation, and :class:`StridedWindows` with overlapping context for perplexity.
- :func:`collate` is Trainer's ``data_collator``. Set ``remove_unused_columns=False``, or Trainer
  drops ``shift_labels``.
- :func:`write_data_set` writes a data set from token arrays, and :class:`DataSetWriter` writes a
  large one piece by piece.
"""

from striped_hf.data.datasets import ContiguousBlocks, RandomWindows, StridedWindows, collate
from striped_hf.data.tokens import (
    DataSetError,
    DataSetWriter,
    TokenSplit,
    open_split,
    write_data_set,
)

__all__ = [
    "ContiguousBlocks",
    "DataSetError",
    "DataSetWriter",
    "RandomWindows",
    "StridedWindows",
    "TokenSplit",
    "collate",
    "open_split",
    "write_data_set",
]
