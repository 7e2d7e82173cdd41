"""Data sets over tokens: random windows for training, blocks or strided windows for evaluation.

A window has L input tokens and L targets, the tokens one position later. Hugging Face's causal-LM
loss shifts ``labels`` itself, which loses one target in each window, but uses ``shift_labels``
unchanged. Each item is therefore ``{"input_ids": x, "labels": y, "shift_labels": y}``. Trainer
needs ``remove_unused_columns=False``, or it drops ``shift_labels``.

Random windows and blocks fetch a whole batch at once, in microseconds; stacking single items takes
a millisecond. ``DataLoader`` calls ``__getitems__`` with the indices of a batch and passes the
result, already a batch, to the collate function, which must be :func:`collate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, default_collate

from striped_hf.data.tokens import DataSetError, TokenSplit

Batch = dict[str, torch.Tensor]

IGNORE_INDEX = -100  # the label that the cross-entropy of torch and transformers ignores

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _splitmix64(state: NDArray[np.uint64], index: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Returns outputs ``index`` of SplitMix64 from ``state`` (Steele, Lea and Flood 2014).

    Args:
        state: 1-D array of one.
        index: 1-D array, any length.

    Returns:
        64 random bits for each index.
    """
    bits = state + (index + np.uint64(1)) * _GAMMA  # wraps at 2**64, as intended
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


class _Windows(Dataset[Batch]):
    """Windows of ``block_size`` inputs and targets; a subclass defines where they start."""

    def __init__(self, split: TokenSplit, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size={block_size}: must be at least 1")
        if len(split) < block_size + 1:
            raise DataSetError(
                f"{split.path} holds {len(split):,} tokens, fewer than block_size + 1 = "
                f"{block_size + 1:,}: use a smaller block_size or prepare a longer text"
            )
        self.split = split
        self.block_size = block_size
        self._span = np.arange(block_size + 1)

    def __len__(self) -> int:
        raise NotImplementedError

    def _starts(self, indices: Sequence[int]) -> NDArray[np.int64]:
        """Returns the start of each window: [len(indices)], int64."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Batch:
        """Returns one window: int64 tensors of shape [block_size]."""
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Returns a batch of windows: int64 tensors of shape [len(indices), block_size].

        Raises:
            IndexError: If an index is not in [0, len(self)).
            DataSetError: If a token is outside the data's or the model's vocabulary.
        """
        if min(indices) < 0 or max(indices) >= len(self):
            raise IndexError(f"{indices}: indices must lie in [0, {len(self)})")
        positions = self._starts(indices)[:, None] + self._span
        # beyond its end the split repeats its last token; these targets are masked
        window = self.split.read(positions)
        # copies, not views: the loss needs contiguous labels
        targets = torch.from_numpy(window[:, 1:].astype(np.int64))
        return {
            "input_ids": torch.from_numpy(window[:, :-1].astype(np.int64)),
            "labels": targets,
            "shift_labels": targets,
        }


class RandomWindows(_Windows):
    """Windows at random positions of a split, like nanoGPT's batches.

    The start of window i depends only on (seed, i) and is uniform over the
    ``len(split) - block_size`` positions. It does not depend on the order of access or the number
    of workers and processes, so a resumed run sees the same windows as an uninterrupted one.

    Args:
        split: The tokens.
        block_size: L, the length of a window in tokens.
        num_windows: The number of windows, such as steps x windows per step.
        seed: Any integer. Windows of different seeds are unrelated.

    Raises:
        DataSetError: If the split holds fewer than ``block_size + 1`` tokens.
        ValueError: If a size is not positive.
    """

    def __init__(self, split: TokenSplit, block_size: int, num_windows: int, seed: int) -> None:
        super().__init__(split, block_size)
        if num_windows < 1:
            raise ValueError(f"num_windows={num_windows}: must be at least 1")
        self.num_windows = num_windows
        self.seed = seed
        self._num_starts = np.uint64(len(split) - block_size)
        # hash the seed, so that the streams of two seeds do not overlap
        seeds = np.array([seed % (1 << 64)], dtype=np.uint64)
        self._state = _splitmix64(seeds, np.zeros(1, dtype=np.uint64))

    def __len__(self) -> int:
        return self.num_windows

    def _starts(self, indices: Sequence[int]) -> NDArray[np.int64]:
        bits = _splitmix64(self._state, np.asarray(indices, dtype=np.uint64))
        return (bits % self._num_starts).astype(np.int64)


class ContiguousBlocks(_Windows):
    """All of a split, block after block: every token but the first is a target exactly once.

    If ``block_size`` does not divide the N - 1 targets, the unused targets of the last block are
    -100, which the loss ignores.

    Args:
        split: The tokens, N of them.
        block_size: L, the length of a block in tokens.

    Raises:
        DataSetError: If the split holds fewer than ``block_size + 1`` tokens.
        ValueError: If ``block_size`` is not positive.
    """

    def __init__(self, split: TokenSplit, block_size: int) -> None:
        super().__init__(split, block_size)
        self._num_blocks = -(-(len(split) - 1) // block_size)
        self._num_padding = self._num_blocks * block_size - (len(split) - 1)

    def __len__(self) -> int:
        return self._num_blocks

    def _starts(self, indices: Sequence[int]) -> NDArray[np.int64]:
        return np.asarray(indices, dtype=np.int64) * self.block_size

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Returns a batch of blocks: int64 tensors of shape [len(indices), block_size]."""
        batch = super().__getitems__(indices)
        last = self._num_blocks - 1
        if self._num_padding and last in indices:
            rows = [row for row, index in enumerate(indices) if index == last]
            batch["labels"][rows, -self._num_padding :] = IGNORE_INDEX  # also in shift_labels
        return batch


class StridedWindows(Dataset[Batch]):
    """Overlapping windows of a text, for perplexity with context: each token is a target once.

    Window i begins at token i * stride. Its targets are the tokens that no earlier window has, so
    after the first window each target has at least ``window - stride`` tokens of context. The last
    token of a window is a target only, as in Hugging Face's guide to perplexity. The last window is
    padded to the length of the others, with targets of -100.

    Args:
        tokens: The token ids of the text, 1-D, at least 2 of them.
        window: The tokens in a window, at least 2; the model's input has ``window - 1`` of them.
        stride: The distance between the starts of two windows, in tokens, from 1 to window - 1.

    Raises:
        ValueError: If a size is out of its range.
    """

    def __init__(self, tokens: NDArray[np.integer], window: int, stride: int) -> None:
        if window < 2:
            raise ValueError(f"window={window}: must be at least 2")
        if not 1 <= stride < window:
            raise ValueError(f"stride={stride}: must be between 1 and window - 1 = {window - 1}")
        if len(tokens) < 2:
            raise ValueError(f"tokens holds {len(tokens)}: pass a text of at least 2")
        self.tokens = tokens
        self.window = window
        self.stride = stride

    def __len__(self) -> int:
        return 1 + max(0, -(-(len(self.tokens) - self.window) // self.stride))

    def __getitem__(self, index: int) -> Batch:
        """Returns one window: int64 tensors of shape [window - 1]."""
        if not 0 <= index < len(self):
            raise IndexError(f"{index}: must lie in [0, {len(self)})")
        begin = index * self.stride
        piece = torch.tensor(self.tokens[begin : begin + self.window].astype(np.int64))
        inputs = torch.zeros(self.window - 1, dtype=torch.int64)
        targets = torch.full_like(inputs, IGNORE_INDEX)
        inputs[: len(piece) - 1] = piece[:-1]
        new = 0 if index == 0 else self.window - self.stride - 1  # where the new targets begin
        targets[new : len(piece) - 1] = piece[new + 1 :]
        return {"input_ids": inputs, "labels": targets, "shift_labels": targets}


def collate(batch: Batch | list[Batch]) -> Batch:
    """Returns a fetched batch unchanged, or stacks single windows; Trainer's ``data_collator``.

    Args:
        batch: The result of ``__getitems__``, or a list of windows.

    Returns:
        The batch: int64 tensors of shape [batch, block_size].

    Raises:
        ValueError: If Trainer has tried to remove columns from the batch.
    """
    if isinstance(batch, Mapping):
        return batch
    if isinstance(batch[0], str):
        raise ValueError(
            "got the names of a batch's columns instead of the batch: pass "
            "remove_unused_columns=False to TrainingArguments (Trainer would drop shift_labels)"
        )
    return default_collate(batch)
