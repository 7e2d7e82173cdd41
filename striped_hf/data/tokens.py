"""The token-file format: a folder with one flat array of token ids a split, and ``meta.json``.

``train.bin`` and ``val.bin`` are raw little-endian uint16 (uint32 where the vocabulary needs it)
with no header, as nanoGPT writes and reads them. ``meta.json`` says what they hold::

    {"dtype": "uint16", "vocab_size": 65, "tokens": {"train": 1003854, "val": 111540},
     "largest_id": {"train": 64, "val": 63},
     "source": {"name": ..., "url": ..., "sha256": ...}, "tokenizer": "characters"}
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from striped_hf.cli import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_PROBED_TOKENS = 1 << 22  # read when a file is opened: 8 or 16 MiB, all of a small one
_GPT2_VOCAB_SIZE = 50_257
_MEND = "prepare the folder again with its script in data_scripts/"


class DataSetError(UserError, ValueError):
    """A data set's folder is not what it should be; the message is one line that says the mend."""


def write_data_set(
    output_dir: str | os.PathLike[str],
    splits: Mapping[str, np.ndarray | Iterable[np.ndarray]],
    *,
    vocab_size: int,
    source: Mapping[str, str | None],
    tokenizer_name: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, Any]:
    """Write the splits, the tokenizer and, last, ``meta.json`` into a folder.

    Everything is written under temporary names and moved into place at the end, so a run that
    fails leaves the folder as it was. Memory stays flat when the arrays come from a generator.

    Args:
        output_dir: The folder; made where it does not exist, its older files are replaced.
        splits: For each split ("train", "val") its token ids: one 1-D integer array, or an
            iterable of such arrays, which are written one after another.
        vocab_size: Every id is below it. It decides the dtype: uint16 up to 65,536.
        source: Where the text comes from: "name", "url" (None for a local file) and "sha256".
        tokenizer_name: What made the ids, for the record ("characters", "gpt2", ...).
        tokenizer: The tokenizer itself, saved into the folder so that ``AutoTokenizer`` and a
            trained model's folder find it.

    Returns:
        What ``meta.json`` holds.

    Raises:
        ValueError: If an array is not 1-D or not of integers, an id lies outside
            [0, vocab_size), a split is empty, or ``vocab_size`` does not fit uint32.
    """
    dtype = _dtype_for(vocab_size)
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=output_dir) as folder:
        partial = Path(folder)
        written = {
            split: _write_bin(partial / f"{split}.bin", arrays, dtype, vocab_size)
            for split, arrays in splits.items()
        }
        meta = {
            "dtype": dtype,
            "vocab_size": vocab_size,
            "tokens": {split: count for split, (count, _) in written.items()},
            "largest_id": {split: largest for split, (_, largest) in written.items()},
            "source": dict(source),
            "tokenizer": tokenizer_name,
        }
        _move_into_place(partial, output_dir, meta, tokenizer)
    return meta


class DataSetWriter:
    """Writes a data set piece by piece; one that was stopped goes on after its last commit.

    Until :meth:`finish` everything stands in ``DIR/.unfinished`` and older files stay as they were.
    Use it as a context manager. It holds nothing in memory but the piece at hand.

    Args:
        output_dir: The folder, as in :func:`write_data_set`.
        splits: The names of the splits.
        vocab_size: As in :func:`write_data_set`.
        job: What is being written, of JSON's types: a writer of another job does not go on here.

    Attributes:
        position: What the last :meth:`commit` said, None where nothing was committed yet.
        counts: How many tokens each split has so far.

    Raises:
        DataSetError: If the folder holds the beginning of another job, or one that is damaged.
        ValueError: If ``vocab_size`` does not fit uint32.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        splits: Sequence[str],
        *,
        vocab_size: int,
        job: Mapping[str, Any],
    ) -> None:
        self._output_dir = Path(output_dir)
        self._folder = self._output_dir / ".unfinished"
        self._progress = self._folder / "progress.json"
        self._vocab_size, self._dtype = vocab_size, _dtype_for(vocab_size)
        self._job = {**job, "vocab_size": vocab_size}
        self.position: Any = None
        self.counts = dict.fromkeys(splits, 0)
        self._largest_ids = dict.fromkeys(splits, 0)
        if self._progress.exists():
            self._take_up()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, IO[bytes]] = {}
        with ExitStack() as stack:
            for split, count in self.counts.items():
                file = stack.enter_context((self._folder / f"{split}.bin").open("ab"))
                file.truncate(count * _DTYPES[self._dtype].itemsize)  # what came after the commit
                self._files[split] = file
            self._open_files = stack.pop_all()

    def _take_up(self) -> None:
        progress = json.loads(self._progress.read_text(encoding="utf-8"))
        mend = f"delete {self._folder} to begin anew, or pass another output_dir"
        if progress["job"] != self._job:
            raise DataSetError(
                f"{self._folder} holds the beginning of another data set ({progress['job']}, and "
                f"now {self._job}): {mend}"
            )
        for split, count in progress["tokens"].items():
            path = self._folder / f"{split}.bin"
            size = path.stat().st_size if path.is_file() else 0
            if size < count * _DTYPES[self._dtype].itemsize:
                raise DataSetError(f"{path} is shorter than {count:,} tokens: {mend}")
        self.counts, self.position = progress["tokens"], progress["position"]
        self._largest_ids = progress["largest_id"]

    def __enter__(self) -> DataSetWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open_files.close()

    def append(self, split: str, ids: np.ndarray) -> None:
        """Write a split's next tokens, a 1-D integer array; ValueError for any other."""
        file = self._files[split]
        count, largest = _write_ids(file, ids, self._dtype, self._vocab_size, f"{split}.bin")
        self.counts[split] += count
        self._largest_ids[split] = max(self._largest_ids[split], largest)

    def commit(self, position: Any) -> None:
        """Make what was written so far survive a kill or a loss of power.

        Args:
            position: Where the source is to be read on, of JSON's types.
        """
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        progress = {
            "job": self._job,
            "position": position,
            "tokens": self.counts,
            "largest_id": self._largest_ids,
        }
        partial = self._folder / "progress.json.partial"
        with partial.open("wb") as file:
            file.write(json.dumps(progress).encode())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._progress)
        self.position = position

    def finish(
        self,
        *,
        source: Mapping[str, str | None],
        tokenizer_name: str,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> dict[str, Any]:
        """Move the data set into place; arguments and what is returned as :func:`write_data_set`.

        Raises:
            ValueError: If a split is empty.
        """
        for split, count in self.counts.items():
            _refuse_empty(count, f"{split}.bin")
        self._open_files.close()
        meta = {
            "dtype": self._dtype,
            "vocab_size": self._vocab_size,
            "tokens": self.counts,
            "largest_id": self._largest_ids,
            "source": dict(source),
            "tokenizer": tokenizer_name,
        }
        self._progress.unlink(missing_ok=True)
        _move_into_place(self._folder, self._output_dir, meta, tokenizer)
        shutil.rmtree(self._folder)
        return meta


def _dtype_for(vocab_size: int) -> str:
    if not 1 <= vocab_size <= 1 << 32:
        raise ValueError(f"vocab_size={vocab_size}: must be between 1 and 2**32")
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def _write_bin(
    path: Path, arrays: np.ndarray | Iterable[np.ndarray], dtype: str, vocab_size: int
) -> tuple[int, int]:
    """Write token arrays one after another; return how many tokens, and the largest of them."""
    count = largest = 0
    with path.open("wb") as file:
        for ids in [arrays] if isinstance(arrays, np.ndarray) else arrays:
            more, top = _write_ids(file, ids, dtype, vocab_size, path.name)
            count, largest = count + more, max(largest, top)
    _refuse_empty(count, path.name)
    return count, largest


def _write_ids(
    file: IO[bytes], array: np.ndarray, dtype: str, vocab_size: int, name: str
) -> tuple[int, int]:
    """Check and write one array of tokens; return how many, and the largest of them (0 of none)."""
    ids = np.asarray(array)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(
            f"{name}: tokens must be 1-D integer arrays, not {ids.dtype} of shape "
            f"{ids.shape}; pass np.array(ids) or an iterable of such arrays"
        )
    smallest, largest = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
    if not 0 <= smallest <= largest < vocab_size:
        raise ValueError(
            f"{name}: token ids run from {smallest} to {largest}, outside "
            f"[0, vocab_size={vocab_size}); pass the tokenizer's whole vocabulary size"
        )
    ids.astype(_DTYPES[dtype], copy=False).tofile(file)
    return ids.size, largest


def _refuse_empty(count: int, name: str) -> None:
    if count == 0:
        raise ValueError(f"{name}: no tokens for this split; the source text is too short")


def _move_into_place(
    partial: Path,
    output_dir: Path,
    meta: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Move all files from one folder to another, with the tokenizer's and, last, ``meta.json``."""
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    for path in filter(Path.is_file, sorted(partial.rglob("*"))):
        target = output_dir / path.relative_to(partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    (partial / "meta.json").replace(output_dir / "meta.json")


@dataclass(frozen=True, eq=False)
class TokenSplit:
    """One split of a data set, mapped into memory; made by :func:`open_split`.

    It pickles as its path, not as its tokens, so that spawned data-loader workers map the file
    again instead of copying it.

    Attributes:
        path: The ``.bin`` file.
        dtype: "uint16" or "uint32".
        vocab_size: The vocabulary of the tokenizer that made the ids.
        meta: What ``meta.json`` holds; empty for a folder prepared by nanoGPT.
        model_vocab_size: The vocabulary of the model that is to read them, None if not known.
    """

    path: Path
    dtype: str
    vocab_size: int
    meta: dict[str, Any]
    model_vocab_size: int | None = None

    @cached_property
    def tokens(self) -> np.ndarray:
        """The token ids: a read-only 1-D array of ``dtype`` backed by the file, unchecked."""
        # asarray: a plain view, since every operation on a np.memmap pays for its subclass
        return np.asarray(np.memmap(self.path, dtype=_DTYPES[self.dtype], mode="r"))

    def read(self, positions: np.ndarray) -> np.ndarray:
        """Return the token ids at some positions.

        Args:
            positions: Integers of any shape; beyond an end of the split stands its last token.

        Returns:
            ``dtype``, of the shape of ``positions``.

        Raises:
            DataSetError: If one of them lies outside the data's or the model's vocabulary: a gather
                from an embedding would be wrong or, on a GPU, end the process.
        """
        ids = self.tokens.take(positions, mode="clip")
        self.check_id(int(ids.max()))
        return ids

    def check_id(self, largest: int) -> None:
        """Raise DataSetError where a token id of this split is outside a vocabulary."""
        if largest >= self.vocab_size:
            owner, limit = "meta.json's", self.vocab_size
            mend = f"the file is damaged or not of this data set; {_MEND}"
            if not self.meta:
                owner = "its tokenizer's"
                mend = (
                    "without meta.json and meta.pkl it is taken for a folder of nanoGPT's with "
                    f"GPT-2's vocabulary; if it has another one, {_MEND}"
                )
        elif self.model_vocab_size is not None and largest >= self.model_vocab_size:
            owner, limit = "the model's", self.model_vocab_size
            mend = (
                "prepare the data with the model's own tokenizer, or pass the model that belongs "
                "to the data"
            )
        else:
            return
        raise DataSetError(
            f"{self.path} holds token id {largest}, outside {owner} vocab_size {limit}: {mend}"
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "tokens"}


def open_split(
    data_dir: str | os.PathLike[str], split: str, *, vocab_size: int | None = None
) -> TokenSplit:
    """Open one split of a data set, in a time and memory that do not depend on its size.

    Checked at once are the file's length and, against the vocabularies, the largest id that
    ``meta.json`` records and the file's first 4 million tokens. All others are checked as they are
    read, by :meth:`TokenSplit.read`, as the data sets of this package do.

    A folder prepared by nanoGPT has no ``meta.json``: it is read as uint16, with GPT-2's
    vocabulary. A ``meta.pkl`` says that it has one of its own, as small character data does: it is
    never unpickled, but all splits are read, and the vocabulary taken to end at the largest id.

    Args:
        data_dir: A folder written by :func:`write_data_set` or by nanoGPT.
        split: "train" or "val".
        vocab_size: The model's vocabulary size: no id may reach it.

    Returns:
        The split, its tokens mapped read-only.

    Raises:
        FileNotFoundError: If the folder or the split's file is missing.
        DataSetError: If ``meta.json`` is malformed or names an unknown dtype, the file is empty,
            odd-sized or of another length than ``meta.json`` says, or is found to hold an id
            outside a vocabulary.
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
        meta = _read_meta(folder / "meta.json")
        opened = TokenSplit(path, meta["dtype"], meta["vocab_size"], meta, vocab_size)
        if split not in meta["tokens"]:
            raise DataSetError(
                f"{folder / 'meta.json'}: tokens has no count for {split!r}; {_MEND}"
            )
        count = _count_tokens(path, opened.dtype)
        if count != meta["tokens"][split]:
            raise DataSetError(
                f"{path} holds {count:,} tokens, meta.json says "
                f"{meta['tokens'][split]:,}: the file is truncated or not of this data set; {_MEND}"
            )
        opened.check_id(meta.get("largest_id", {}).get(split, 0))
    else:
        opened = TokenSplit(path, "uint16", _nanogpt_vocab_size(folder), {}, vocab_size)
        _count_tokens(path, opened.dtype)
        logger.warning(
            "%s has no meta.json: reading %s as nanoGPT's uint16, with vocab_size %d and no "
            "tokenizer",
            folder,
            path.name,
            opened.vocab_size,
        )
    # read, not mapped: what is mapped would count as this process's peak memory
    opened.check_id(int(np.fromfile(path, _DTYPES[opened.dtype], _PROBED_TOKENS).max()))
    return opened


def _nanogpt_vocab_size(folder: Path) -> int:
    if not (folder / "meta.pkl").exists():
        return _GPT2_VOCAB_SIZE
    largest = 0
    for path in folder.glob("*.bin"):
        _count_tokens(path, "uint16")
        with path.open("rb") as file:
            while len(piece := np.fromfile(file, _DTYPES["uint16"], _PROBED_TOKENS)):
                largest = max(largest, int(piece.max()))
    return largest + 1


def _read_meta(path: Path) -> dict[str, Any]:
    """Read ``meta.json`` and check what the reader relies on."""
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataSetError(f"{path} is not JSON ({error}); {_MEND}") from None
    if not isinstance(meta, dict):
        raise DataSetError(f"{path}: must hold an object, not {meta!r:.80}; {_MEND}")
    if meta.get("dtype") not in list(_DTYPES):
        raise DataSetError(
            f"{path}: dtype {meta.get('dtype')!r} is unknown (known: {', '.join(_DTYPES)}); {_MEND}"
        )
    if not _is_count(meta.get("vocab_size")):
        raise DataSetError(
            f"{path}: vocab_size {meta.get('vocab_size')!r} is not a positive integer; {_MEND}"
        )
    counts = meta.get("tokens")
    if not isinstance(counts, dict) or not all(map(_is_count, counts.values())):
        raise DataSetError(f"{path}: tokens {counts!r:.80} is not a count for each split; {_MEND}")
    largest = meta.get("largest_id", {})  # which a file made by hand need not have
    if not isinstance(largest, dict) or not all(
        type(i) is int and i >= 0 for i in largest.values()
    ):
        raise DataSetError(
            f"{path}: largest_id {largest!r:.80} is not an id for each split; {_MEND}"
        )
    return meta


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _count_tokens(path: Path, dtype: str) -> int:
    size, width = path.stat().st_size, _DTYPES[dtype].itemsize
    if size == 0 or size % width:
        raise DataSetError(
            f"{path} is {size:,} bytes, not a positive multiple of {width} ({dtype}): it is "
            f"truncated or of another dtype; {_MEND}"
        )
    return size // width
