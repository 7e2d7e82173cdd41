"""Documents to tokens: GPT-2's BPE over a data set of texts, in parallel processes, in a stream."""

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

Position = dict[str, int]  # what to read next: "file", "batch" in it, "row" of the data set

# nanoGPT's, so that the counts are the known ones
VAL_FRACTION, _SEED = 0.0005, 2357
_TEXT = "text"  # the column's name
# a text file's documents are its paragraphs: what blank lines part
_BUILDERS: dict[str, tuple[str, dict[str, str]]] = {
    ".parquet": ("parquet", {}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".txt": ("text", {"sample_by": "paragraph"}),
}


def load_documents(
    name: str, config: str | None = None, data_files: Sequence[str] | None = None
) -> datasets.Dataset:
    """Load a data set of texts, from the hub or from files, into the cache of ``datasets``.

    Args:
        name: Its name on the hub, or a folder that ``datasets.load_dataset`` takes.
        config: Which of its configurations, where it has several.
        data_files: Files to read in its place, all parquet, all JSON lines or all text.

    Returns:
        Its train split; it has a column "text" of strings.

    Raises:
        UserError: If it cannot be loaded, has no such column, or too few documents to be split.
    """
    try:
        if data_files:
            kind, options = _builder(data_files)
            escaped = [glob.escape(file) for file in data_files]  # names, not patterns
            builder = datasets.load_dataset_builder(kind, data_files=escaped, **options)
        else:
            builder = datasets.load_dataset_builder(name, config)
        if hasattr(builder.config, "fragment_scan_options"):
            # else Arrow reads all of a parquet file ahead
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
    """Choose what reads the files by their names, compressed ones (.jsonl.gz) too."""
    kinds = {
        next((s for s in Path(file).suffixes[-2:] if s in _BUILDERS), None) for file in data_files
    }
    if len(kinds) != 1 or (kind := kinds.pop()) is None:
        raise UserError(
            f"--data_files {' '.join(data_files)}: pass files of one kind, by the ends of their "
            f"names: {', '.join(_BUILDERS)}"
        )
    return _BUILDERS[kind]


def _check_file(path: Path) -> None:
    """Say what is wrong with a file that ``datasets`` could not load, where that can be told.

    Raises:
        UserError: It does not exist, is not UTF-8, or has a line that is no {"text": string}.
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
    """Choose the documents of the val split.

    They are those that ``train_test_split(test_size=val_fraction, seed=2357)`` of ``datasets``
    chooses, and by default nanoGPT's, without its index of all documents.

    Args:
        num_documents: How many there are.
        val_fraction: The share of the val split, above 0 and below 1.

    Returns:
        Their places in the data set, in order.
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
    """Write a data set's documents as GPT-2 tokens, an end-of-text token after each.

    The documents of either split stay in their order. This process reads and writes, the others
    encode; a few pieces of 1,000 documents are in memory at a time. A run that was stopped, in
    whatever way, goes on where it was when it is started again with the same data.

    Args:
        output_dir: The data set's folder.
        documents: From :func:`load_documents`.
        source: Where they come from.
        num_proc: How many processes encode.
        val_fraction: The share of documents in the val split, above 0 and below 1.

    Returns:
        What ``meta.json`` holds.

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
        # `datasets` names a cached file's folders by the version of its source: the commit on the
        # hub, or the time when a local file was changed last
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
                f"a process that encodes was killed after {progress.n:,} documents, perhaps for "
                "want of memory: start the same command again, which goes on there; a smaller "
                "--num_proc needs less memory"
            ) from error
        return writer.finish(source=source, tokenizer_name="gpt2", tokenizer=tokenizer)


def _read(files: Sequence[Path], begin: Position) -> Iterator[tuple[int, list[str], Position]]:
    """Yield the record batches: the first row's number, the texts, and the position after them."""
    row = begin["row"]
    for number in range(begin["file"], len(files)):
        # read, not mapped as `datasets` does: mapped pages would count as this process's memory
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
    """Processes that encode, a few pieces at a time."""

    def __init__(self, num_proc: int) -> None:
        # forked where that is possible: striped_hf's imports take seconds and memory in each
        forks = "fork" in multiprocessing.get_all_start_methods()
        self._pool = ProcessPoolExecutor(
            num_proc,
            mp_context=multiprocessing.get_context("fork" if forks else "spawn"),
            initializer=_end_with_parent,
        )
        self._limit = 2 * num_proc  # pieces under way: each process has one more to go on with

    def __enter__(self) -> _Encoders:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def encode(
        self, pieces: Iterator[tuple[int, list[str], Position]], val: NDArray[np.int64]
    ) -> Iterator[tuple[Position, dict[str, NDArray[np.uint16]]]]:
        """Yield each piece's position and tokens, in order."""
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
    """Have this process end when the one that reads and writes was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that reads and writes

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _encode(texts: list[str], val: NDArray[np.int64]) -> dict[str, NDArray[np.uint16]]:
    """Encode some documents; ``val`` are the places of those that belong to the val split."""
    encoding = tiktoken.get_encoding("gpt2")
    end = np.array([encoding.eot_token], dtype=np.uint32)
    arrays: dict[str, list[NDArray[np.uint32]]] = {"train": [], "val": []}
    chosen = set(val.tolist())
    for place, text in enumerate(texts):
        # nothing is special: a document that spells <|endoftext|> does not end there
        ids = encoding.encode_to_numpy(text, disallowed_special=())
        arrays["val" if place in chosen else "train"] += [ids, end]
    return {split: np.concatenate(some).astype(np.uint16) for split, some in arrays.items() if some}
