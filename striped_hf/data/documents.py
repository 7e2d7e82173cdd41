"""Encodes a data set of documents as GPT-2 tokens, in parallel and in pieces."""

from __future__ import annotations

import glob
import json
import math
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import tiktoken
from numpy.typing import NDArray
from pyarrow.dataset import ParquetFragmentScanOptions
from tqdm import tqdm

from striped_hf.cli import UserError, one_line
from striped_hf.data.prepare import Source, gpt2_encoding
from striped_hf.data.tokens import DataSetWriter

Position = dict[str, int]  # where to read next: "file", "batch" in the file, "row" of the data set

# nanoGPT's values, for the same counts of tokens
VAL_FRACTION, _SEED = 0.0005, 2357
_TEXT = "text"  # the name of the column
# the documents of a text file are its paragraphs, separated by blank lines
_BUILDERS: dict[str, tuple[str, dict[str, str]]] = {
    ".parquet": ("parquet", {}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".txt": ("text", {"sample_by": "paragraph"}),
}


def load_documents(
    name: str, config: str | None = None, data_files: Sequence[str] | None = None
) -> datasets.Dataset:
    """Loads a data set of texts, from the hub or from files, into the cache of ``datasets``.

    Args:
        name: The data set's name on the hub, or a folder for ``datasets.load_dataset``.
        config: The name of a configuration, if the data set has several.
        data_files: Files to read instead: all parquet, all JSON lines or all text.

    Returns:
        The train split, with a column "text" of strings.

    Raises:
        UserError: If the data set cannot be loaded, has no such column, or has fewer than two
            documents.
    """
    try:
        if data_files:
            kind, options = _builder(data_files)
            escaped = [glob.escape(file) for file in data_files]  # names, not patterns
            builder = datasets.load_dataset_builder(kind, data_files=escaped, **options)
        else:
            builder = datasets.load_dataset_builder(name, config)
        if hasattr(builder.config, "fragment_scan_options"):
            # otherwise Arrow reads a whole parquet file ahead
            builder.config.fragment_scan_options = ParquetFragmentScanOptions(pre_buffer=False)
        builder.download_and_prepare()
        documents = builder.as_dataset(split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        for file in data_files or ():
            _check_file(Path(file))
        raise UserError(
            f"cannot load {' '.join(data_files or [name])}: pass the name of a data set on the hub "
            "where there is a network, or parquet, JSON lines or text with --data_files FILE... "
            f"({one_line(error)})"
        ) from error
    column = documents.features.get(_TEXT)
    if getattr(column, "dtype", None) not in ("string", "large_string"):
        for file in data_files or ():
            _check_file(Path(file))
        raise UserError(
            f"the data set's columns are {', '.join(documents.column_names)}: pass one with a "
            f"column {_TEXT!r} of strings"
        )
    if len(documents) < 2:
        raise UserError(f"the data set has {len(documents)} documents: too few to be split in two")
    return documents


def _builder(data_files: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Chooses the builder by the ends of the files' names, also of compressed files (.jsonl.gz)."""
    kinds = {
        next((s for s in Path(file).suffixes[-2:] if s in _BUILDERS), None) for file in data_files
    }
    if len(kinds) != 1 or (kind := kinds.pop()) is None:
        raise UserError(
            f"--data_files {' '.join(data_files)}: pass files of one kind, with one of "
            f"these extensions: {', '.join(_BUILDERS)}"
        )
    return _BUILDERS[kind]


def _check_file(path: Path) -> None:
    """Finds the error in a file that ``datasets`` could not load, if it is one of these.

    Raises:
        UserError: The file does not exist, is not UTF-8, or has a line that is not
            {"text": string}.
    """
    if not path.is_file():
        raise UserError(f"--data_files {path}: there is no such file")
    if path.suffix not in (".txt", ".jsonl"):
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"--data_files {path}: line {number:,} is not UTF-8 text ({error.reason}, byte "
                    f"{line[error.start]:#04x}): convert the file to UTF-8"
                ) from error
            if path.suffix == ".jsonl" and text.strip():
                _check_json_line(path, number, text)


def _check_json_line(path: Path, number: int, line: str) -> None:
    try:
        found = json.loads(line)
        wrong = f"is {found!r:.60}" if not isinstance(found, dict) else ""
        if not wrong and _TEXT in found and not isinstance(found[_TEXT], str):
            wrong = f"has {found[_TEXT]!r:.60} as its text"
    except json.JSONDecodeError as error:
        wrong = f"is no JSON ({error.msg}, column {error.colno})"
    if wrong:
        raise UserError(
            f"--data_files {path}: line {number:,} {wrong}; it must be an object with a string "
            f"{_TEXT!r}: correct the line or leave it out"
        )


def val_rows(num_documents: int, val_fraction: float = VAL_FRACTION) -> NDArray[np.int64]:
    """Chooses the documents of the val split.

    The choice is the same as ``train_test_split(test_size=val_fraction, seed=2357)`` of
    ``datasets`` makes, and by default the same as nanoGPT's.

    Args:
        num_documents: The number of documents.
        val_fraction: The share of the val split, above 0 and below 1.

    Returns:
        The indices of the documents in the data set, 1-D int64, in ascending order.
    """
    permutation = np.random.default_rng(_SEED).permutation(num_documents)
    return np.sort(permutation[: math.ceil(val_fraction * num_documents)])


def write_documents(
    output_dir: Path,
    documents: datasets.Dataset,
    source: Source,
    num_proc: int,
    val_fraction: float = VAL_FRACTION,
) -> dict[str, Any]:
    """Writes a data set's documents as GPT-2 tokens, with an end-of-text token after each document.

    Each split keeps the order of its documents. This process reads and writes, and the others
    encode. A few pieces of 1,000 documents are in memory at a time. A stopped run continues where
    it stopped if it is started again with the same data.

    Args:
        output_dir: The data set's folder.
        documents: The result of :func:`load_documents`.
        source: The origin of the documents.
        num_proc: The number of processes that encode.
        val_fraction: The share of documents in the val split, above 0 and below 1.

    Returns:
        The content of ``meta.json``.

    Raises:
        UserError: If ``output_dir`` holds the beginning of another data set, or another process
            writes there; a document has no text; nothing is left for the train split; tiktoken
            cannot load its vocabulary; or a process that encodes was killed.
    """
    val = val_rows(len(documents), val_fraction)
    if len(val) == len(documents):
        raise UserError(
            f"a val share of {val_fraction:g} takes all {len(documents):,} documents: pass a "
            "smaller --val_fraction"
        )
    encoding, tokenizer = gpt2_encoding()
    files = [Path(file["filename"]) for file in documents.cache_files]
    job = {
        "source": dict(source),
        "documents": len(documents),
        "val_fraction": val_fraction,
        # `datasets` names the folders of a cached file after its source's version: the commit on
        # the hub, or the time of a local file's last change
        "files": {"/".join(path.parts[-5:]): path.stat().st_size for path in files},
    }
    try:
        writer = DataSetWriter(output_dir, ("train", "val"), vocab_size=encoding.n_vocab, job=job)
    except ValueError as error:
        raise UserError(str(error)) from error
    begin = writer.position or {"file": 0, "batch": 0, "row": 0}
    with writer, _Encoders(num_proc) as encoders:
        progress = tqdm(total=len(documents), initial=begin["row"], unit=" documents")
        try:
            with progress:
                for position, tokens in encoders.encode(_read(files, begin), val):
                    for split, ids in tokens.items():
                        writer.append(split, ids)
                    writer.commit(position)
                    progress.update(position["row"] - progress.n)
        except BrokenProcessPool as error:
            raise UserError(
                f"a process that encodes was killed after {progress.n:,} documents, perhaps "
                "because memory ran out: start the same command again to continue there; a smaller "
                "--num_proc needs less memory"
            ) from error
        return writer.finish(source=source, tokenizer_name="gpt2", tokenizer=tokenizer)


def _read(files: Sequence[Path], begin: Position) -> Iterator[tuple[int, list[str], Position]]:
    """Yields the record batches: the index of the first row, the texts, and the next position."""
    row = begin["row"]
    for number in range(begin["file"], len(files)):
        # read, not mapped as in `datasets`: mapped pages would count as this process's memory
        with pa.OSFile(str(files[number])) as file, pa.ipc.open_stream(file) as batches:
            for index, batch in enumerate(batches):
                if number == begin["file"] and index < begin["batch"]:
                    continue
                texts = batch.column(_TEXT)
                if texts.null_count:
                    empty = row + texts.is_null().index(True).as_py()
                    raise UserError(
                        f"document {empty:,} (from 0) of the data set has no text: leave such "
                        "documents out, and pass the rest with --data_files FILE..."
                    )
                after = row + len(texts)
                yield row, texts.to_pylist(), {"file": number, "batch": index + 1, "row": after}
                row = after


class _Encoders:
    """A pool of processes that encode, with a limit on the pieces in memory."""

    def __init__(self, num_proc: int) -> None:
        # fork if possible: in a spawned process striped_hf's imports take seconds and memory
        forks = "fork" in multiprocessing.get_all_start_methods()
        self._pool = ProcessPoolExecutor(
            num_proc,
            mp_context=multiprocessing.get_context("fork" if forks else "spawn"),
            initializer=_end_with_parent,
        )
        self._limit = 2 * num_proc  # pieces submitted: one in work and one waiting per process

    def __enter__(self) -> _Encoders:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def encode(
        self, pieces: Iterator[tuple[int, list[str], Position]], val: NDArray[np.int64]
    ) -> Iterator[tuple[Position, dict[str, NDArray[np.uint16]]]]:
        """Yields the position and the tokens of each piece, in order."""
        under_way: deque[tuple[Position, Future[dict[str, NDArray[np.uint16]]]]] = deque()
        for row, texts, position in pieces:
            first, last = np.searchsorted(val, (row, row + len(texts)))
            under_way.append((position, self._pool.submit(_encode, texts, val[first:last] - row)))
            if len(under_way) >= self._limit:
                position, future = under_way.popleft()
                yield position, future.result()
        for position, future in under_way:
            yield position, future.result()


def _end_with_parent() -> None:
    """Ends this process when its parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _encode(texts: list[str], val: NDArray[np.int64]) -> dict[str, NDArray[np.uint16]]:
    """Encodes some documents; ``val`` has the indices of the val split's documents."""
    encoding = tiktoken.get_encoding("gpt2")
    end = np.array([encoding.eot_token], dtype=np.uint32)
    arrays: dict[str, list[NDArray[np.uint32]]] = {"train": [], "val": []}
    chosen = set(val.tolist())
    for place, text in enumerate(texts):
        # no special tokens: "<|endoftext|>" in a document is ordinary text
        ids = encoding.encode_to_numpy(text, disallowed_special=())
        arrays["val" if place in chosen else "train"] += [ids, end]
    return {split: np.concatenate(some).astype(np.uint16) for split, some in arrays.items() if some}
