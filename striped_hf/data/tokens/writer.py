"""Writing a data set: at once, or piece by piece so that a stopped run can continue."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from striped_hf.data.tokens.format import DTYPES, DataSetError, dtype_for
from striped_hf.differences import differences
from striped_hf.locking import lock_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def write_data_set(
    output_dir: str | os.PathLike[str],
    splits: Mapping[str, np.ndarray | Iterable[np.ndarray]],
    *,
    vocab_size: int,
    source: Mapping[str, str | None],
    tokenizer_name: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, Any]:
    """Writes the splits, the tokenizer and, last, ``meta.json`` into a folder.

    All files get temporary names and are moved into place at the end, so a failure leaves the
    folder unchanged. If the arrays come from a generator, only one is in memory at a time.

    Args:
        output_dir: The folder; created if it does not exist. Older files are replaced.
        splits: The token ids of each split ("train", "val"): a 1-D integer array, or an iterable of
            such arrays, which are written one after another.
        vocab_size: The vocabulary size, larger than every id. It decides the dtype: uint16 up to
            65,536, uint32 above.
        source: The origin of the text: "name", "url" (None for a local file) and "sha256".
        tokenizer_name: The tokenizer's name for ``meta.json`` ("characters", "gpt2", ...).
        tokenizer: The tokenizer to save into the folder, for ``AutoTokenizer``.

    Returns:
        The content of ``meta.json``.

    Raises:
        ValueError: If an array is not 1-D or not of integers, an id lies outside
            [0, vocab_size), a split is empty, or ``vocab_size`` does not fit uint32.
        UserError: If another process writes into the folder.
        OSError: If the folder is not writable; the error names it.
    """
    dtype = dtype_for(vocab_size)
    output_dir = Path(output_dir)
    with (
        lock_folder(output_dir),
        _naming(output_dir),
        tempfile.TemporaryDirectory(prefix=".partial-", dir=output_dir) as folder,
    ):
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
    """Writes a data set piece by piece; a stopped writer continues after its last commit.

    Until :meth:`finish`, the new files are in ``DIR/.unfinished``, and older files do not change.
    Use it as a context manager. It keeps no pieces in memory. The folder is locked until the
    context ends.

    Args:
        output_dir: The folder, as in :func:`write_data_set`.
        splits: The names of the splits.
        vocab_size: As in :func:`write_data_set`.
        job: A JSON-serializable description of the data set. Only a writer of the same job
            continues it.

    Attributes:
        position: The position of the last :meth:`commit`; None before the first.
        counts: The number of tokens of each split so far.

    Raises:
        DataSetError: If the folder holds the beginning of another job, or one that is damaged.
        UserError: If another process writes into the folder.
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
        self._vocab_size, self._dtype = vocab_size, dtype_for(vocab_size)
        self._job = {**job, "vocab_size": vocab_size}
        self.position: Any = None
        self.counts = dict.fromkeys(splits, 0)
        self._largest_ids = dict.fromkeys(splits, 0)
        self._files: dict[str, IO[bytes]] = {}
        with ExitStack() as stack:
            stack.enter_context(lock_folder(self._output_dir))
            if self._progress.exists():
                self._continue()
            self._folder.mkdir(parents=True, exist_ok=True)
            for split, count in self.counts.items():
                file = stack.enter_context((self._folder / f"{split}.bin").open("ab"))
                file.truncate(count * DTYPES[self._dtype].itemsize)  # drop uncommitted tokens
                self._files[split] = file
            self._open = stack.pop_all()

    def _continue(self) -> None:
        """Checks ``progress.json`` and continues from it."""
        fix = f"delete {self._folder} to begin anew, or pass another output_dir"
        try:
            progress = json.loads(self._progress.read_text(encoding="utf-8"))
            job, position = progress["job"], progress["position"]
            counts, largest = progress["tokens"], progress["largest_id"]
            # the names become paths: accept only this writer's own
            whole = all(
                found.keys() == self.counts.keys()
                and all(type(value) is int and value >= 0 for value in found.values())
                for found in (counts, largest)
            )
        except (ValueError, LookupError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise DataSetError(f"{self._progress} is damaged: {fix}")
        if job != self._job:
            raise DataSetError(
                f"{self._folder} holds the beginning of another data set "
                f"({differences(job, self._job)}): {fix}"
            )
        for split, count in counts.items():
            path = self._folder / f"{split}.bin"
            size = path.stat().st_size if path.is_file() else 0
            if size < count * DTYPES[self._dtype].itemsize:
                raise DataSetError(f"{path} is shorter than {count:,} tokens: {fix}")
        self.counts, self._largest_ids, self.position = counts, largest, position

    def __enter__(self) -> DataSetWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with _naming(self._output_dir):  # closing a file writes its buffer
            self._open.close()

    def append(self, split: str, ids: np.ndarray) -> None:
        """Writes a split's next tokens: a 1-D integer array, or ValueError."""
        with _naming(self._output_dir):
            count, largest = _write_ids(
                self._files[split], ids, self._dtype, self._vocab_size, f"{split}.bin"
            )
        self.counts[split] += count
        self._largest_ids[split] = max(self._largest_ids[split], largest)

    def commit(self, position: Any) -> None:
        """Flushes the tokens so far to the disk, so that they survive a kill or a loss of power.

        Args:
            position: Where to continue in the source; JSON-serializable.
        """
        with _naming(self._output_dir):
            self._write_progress(position)
        self.position = position

    def _write_progress(self, position: Any) -> None:
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

    def finish(
        self,
        *,
        source: Mapping[str, str | None],
        tokenizer_name: str,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> dict[str, Any]:
        """Moves the data set into place. Arguments and result as for :func:`write_data_set`.

        Raises:
            ValueError: If a split is empty.
        """
        for split, count in self.counts.items():
            _refuse_empty(count, f"{split}.bin")
        for file in self._files.values():
            file.close()
        meta = {
            "dtype": self._dtype,
            "vocab_size": self._vocab_size,
            "tokens": self.counts,
            "largest_id": self._largest_ids,
            "source": dict(source),
            "tokenizer": tokenizer_name,
        }
        with _naming(self._output_dir):
            self._progress.unlink(missing_ok=True)
            _move_into_place(self._folder, self._output_dir, meta, tokenizer)
            shutil.rmtree(self._folder)
        return meta


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Adds the folder to a system error that names no file, such as a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from error


def _write_bin(
    path: Path, arrays: np.ndarray | Iterable[np.ndarray], dtype: str, vocab_size: int
) -> tuple[int, int]:
    """Writes token arrays one after another; returns the number of tokens, and the largest id."""
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
    """Checks and writes one array; returns the number of tokens and the largest id, 0 if empty."""
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
    # not tofile, whose errors do not give the cause
    file.write(np.ascontiguousarray(ids, dtype=DTYPES[dtype]).data)
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
    """Moves all files into a folder, with the tokenizer's files, and ``meta.json`` last."""
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    for path in filter(Path.is_file, sorted(partial.rglob("*"))):
        target = output_dir / path.relative_to(partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    (partial / "meta.json").replace(output_dir / "meta.json")
