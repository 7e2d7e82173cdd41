"""The token-file format: round trips, nanoGPT's folders, and every way a file can be wrong."""

import json
import logging
import multiprocessing
import os
import pathlib
import pickle
import time

import numpy as np
import pytest
import torch

from benchmarks.measuring import temporary_bytes
from striped_hf.cli import UserError
from striped_hf.data import (
    ContiguousBlocks,
    DataSetWriter,
    RandomWindows,
    open_split,
    write_data_set,
)
from striped_hf.data.tokens.nanogpt import nanogpt_symbols
from striped_hf.pretrained import data_tokenizer

SOURCE = {"name": "numbers", "url": None, "sha256": "0" * 64}


def write(folder, train, val=(0, 1), vocab_size=10, **kwargs):
    splits = {"train": train, "val": np.array(val)}
    kwargs = {"source": SOURCE, "tokenizer_name": "none", **kwargs}
    return write_data_set(folder, splits, vocab_size=vocab_size, **kwargs)


def edit_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **changes}))


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(10, "uint16"), (65_536, "uint16"), (65_537, "uint32")]
)
def test_round_trip_and_nanogpt_reads_it(tmp_path, vocab_size, dtype):
    train = np.array([3, 1, vocab_size - 1, 0])
    meta = write(tmp_path, train, vocab_size=vocab_size)
    assert json.loads((tmp_path / "meta.json").read_text()) == meta
    assert meta == {
        "dtype": dtype,
        "vocab_size": vocab_size,
        "tokens": {"train": 4, "val": 2},
        "largest_id": {"train": vocab_size - 1, "val": 1},
        "source": SOURCE,
        "tokenizer": "none",
    }
    # like nanoGPT's train.py
    np.testing.assert_array_equal(np.memmap(tmp_path / "train.bin", dtype=dtype, mode="r"), train)
    split = open_split(tmp_path, "train")
    assert split.tokens.dtype == dtype
    np.testing.assert_array_equal(split.tokens, train)
    assert (len(split), split.vocab_size, split.meta) == (4, vocab_size, meta)
    assert len(open_split(tmp_path, "val")) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_bytes_are_little_endian_uint16(tmp_path):
    write(tmp_path, np.array([1, 258], dtype=">i8"), vocab_size=300)
    assert (tmp_path / "train.bin").read_bytes() == bytes([1, 0, 2, 1])


def test_arrays_from_a_generator_are_written_one_after_another(tmp_path):
    pieces = (np.full(n, n, dtype=np.uint8) for n in (3, 0, 2))
    assert write(tmp_path, pieces)["tokens"]["train"] == 5
    np.testing.assert_array_equal(open_split(tmp_path, "train").tokens, [3, 3, 3, 2, 2])


@pytest.mark.parametrize(
    ("train", "vocab_size", "message"),
    [
        (np.array([0, 10]), 10, r"ids run from 0 to 10, outside \[0, vocab_size=10\)"),
        (np.array([-1, 3]), 10, "ids run from -1 to 3"),
        (np.array([0.5]), 10, "1-D integer arrays, not float64"),
        (np.array([[1]]), 10, r"shape \(1, 1\)"),
        ([1, 2], 10, r"np\.array\(ids\)"),
        (np.array([], dtype=int), 10, "train.bin: no tokens"),
        (np.array([1]), 0, "vocab_size=0"),
        (np.array([1]), 2**32 + 1, "vocab_size=4294967297"),
    ],
)
def test_writer_rejects(tmp_path, train, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, train, vocab_size=vocab_size)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_older_data_unchanged(tmp_path):
    write(tmp_path, np.array([1, 2, 3]))

    def broken():
        yield np.array([4, 5])
        raise RuntimeError("source broke off")

    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError, match="broke off"):
        write(tmp_path, broken())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write(tmp_path, np.array([7]))
    np.testing.assert_array_equal(open_split(tmp_path, "train").tokens, [7])


def writer(folder, vocab_size=300, job="numbers"):
    return DataSetWriter(folder, ("train", "val"), vocab_size=vocab_size, job={"of": job})


def test_piecewise_writer_continues_after_its_last_commit(tmp_path):
    write(tmp_path, np.array([9]))
    before = (tmp_path / "train.bin").read_bytes()
    with writer(tmp_path) as first:
        assert first.position is None
        first.append("train", np.array([1, 258]))
        first.append("val", np.array([7], dtype=np.uint16))
        first.commit({"row": 2})
        first.append("train", np.array([3, 4, 5]))  # not committed
    with writer(tmp_path) as second:
        assert (second.position, second.counts) == ({"row": 2}, {"train": 2, "val": 1})
        second.append("train", np.array([6]))
        second.commit({"row": 3})
        assert (tmp_path / "train.bin").read_bytes() == before
        meta = second.finish(source=SOURCE, tokenizer_name="none")
    assert meta["tokens"] == {"train": 3, "val": 1}
    assert meta["largest_id"] == {"train": 258, "val": 7}  # the largest id before the stop
    assert open_split(tmp_path, "train").tokens.tolist() == [1, 258, 6]
    assert open_split(tmp_path, "val").meta == meta
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_piecewise_writer_rejects(tmp_path):
    with writer(tmp_path) as first:
        with pytest.raises(ValueError, match=r"train\.bin: token ids run from 300"):
            first.append("train", np.array([300]))
        first.append("train", np.array([1, 2]))
        first.commit(1)
        with pytest.raises(ValueError, match=r"val\.bin: no tokens"):
            first.finish(source=SOURCE, tokenizer_name="none")
    for other in ({"job": "letters"}, {"vocab_size": 301}):
        with pytest.raises(ValueError, match=r"beginning of another data set.*delete .*unfinished"):
            writer(tmp_path, **other)
    (tmp_path / ".unfinished" / "train.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"shorter than 2 tokens: delete"):
        writer(tmp_path)
    with pytest.raises(ValueError, match="vocab_size=0"):
        writer(tmp_path / "new", vocab_size=0)
    assert not (tmp_path / "new").exists()


def test_the_error_names_the_differences_of_another_job(tmp_path):
    def begun(**source):
        job = {"source": {"name": "a", "rows": 10} | source, "files": {"x": 5}}
        return DataSetWriter(tmp_path, ("train", "val"), vocab_size=300, job=job)

    with begun() as first:
        first.commit(1)
    with pytest.raises(ValueError, match=r"data set \(source\.rows 10 before and 20 now\): delete"):
        begun(rows=20)
    with begun() as second:
        assert second.position == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": {"train": 0, "val": 0, "../../model": 0}},
        {"tokens": {"train": 0, "/model": 0}},
        {"largest_id": {"train": 0, "val": 0, "../model": 0}},
        {"tokens": {"train": 0}},
        {"tokens": {"train": -1, "val": 0}},
        {"tokens": {"train": 0.0, "val": 0}},
        {"tokens": [["train", 0], ["val", 0]]},
        {"largest_id": None},
        {"job": None},
        None,
    ],
)
def test_the_progress_file_is_not_trusted(tmp_path, changes):
    """Names in the file become paths of files that the writer truncates."""
    folder = tmp_path / "data"
    with writer(folder) as first:
        first.commit(1)
    for path in (tmp_path / "model.bin", folder / "model.bin"):
        path.write_bytes(b"precious")
    progress = folder / ".unfinished" / "progress.json"
    written = json.loads(progress.read_text())
    progress.write_text("[1" if changes is None else json.dumps({**written, **changes}))
    with pytest.raises(ValueError, match=r"progress\.json is damaged: delete|of another data set"):
        writer(folder)
    assert (tmp_path / "model.bin").read_bytes() == b"precious"
    assert (folder / "model.bin").read_bytes() == b"precious"
    assert not (folder / "_lock").exists()


def hold(folder, ready, end):
    with writer(folder) as held:
        held.append("train", np.array([1, 2]))
        held.commit(1)
        ready.set()
        end.wait()


def test_two_processes_do_not_write_into_one_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready, end))
    process.start()
    assert ready.wait(60)
    for begin in (lambda: writer(tmp_path), lambda: write(tmp_path, np.array([1]))):
        with pytest.raises(UserError, match=rf"is in use by process {process.pid} on .*: wait"):
            begin()
    process.kill()  # like a crash: the system releases the lock
    process.join()
    with writer(tmp_path) as second:
        assert (second.position, second.counts) == (1, {"train": 2, "val": 0})


def nanogpt_folder(folder, train, val):
    np.array(train, dtype=np.uint16).tofile(folder / "train.bin")
    np.array(val, dtype=np.uint16).tofile(folder / "val.bin")
    return folder


def test_nanogpt_folder_of_characters(tmp_path, caplog):
    """A meta.pkl without characters only counts as present; if run, this one ends the process."""
    folder = nanogpt_folder(tmp_path, [1, 2, 3], [64, 5])
    (folder / "meta.pkl").write_bytes(b"cbuiltins\nexit\n(I1\ntR.")
    assert nanogpt_symbols(folder) is None
    with caplog.at_level(logging.INFO):
        split = open_split(folder, "train")
    assert (split.vocab_size, split.meta) == (65, {})
    np.testing.assert_array_equal(split.tokens, [1, 2, 3])
    (record,) = caplog.records
    assert "no meta.json" in record.message
    assert "vocab_size 65" in record.message
    with pytest.raises(ValueError, match="token id 3, outside the model's vocab_size 3"):
        open_split(folder, "train", vocab_size=3)


@pytest.mark.parametrize(
    ("itos", "symbols"),
    [
        ({0: "\n", 1: "b", 2: "\u00e9"}, "\nb\u00e9"),
        (["a", "b"], "ab"),
        ({1: "a", 2: "b"}, None),  # ids that are not the positions
        ({0: "a", 1: "a"}, None),
        ({0: "the", 1: "a"}, None),
        ({0: 0}, None),
        ({}, None),
        (None, None),
        ({0: pathlib.PurePath("a")}, None),  # a class is named
    ],
)
def test_nanogpts_characters(tmp_path, itos, symbols):
    folder = nanogpt_folder(tmp_path, [0, 1], [1, 0])
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 9, "itos": itos, "stoi": {}}))
    assert nanogpt_symbols(folder) == symbols
    assert open_split(folder, "train").vocab_size == len(symbols or "ab")
    tokenizer = data_tokenizer(folder)
    if symbols is None:
        assert tokenizer is None
    else:
        assert tokenizer.decode(tokenizer(symbols)["input_ids"]) == symbols


def test_ids_beyond_nanogpts_characters_are_an_error(tmp_path):
    folder = nanogpt_folder(tmp_path, [0, 2], [1, 0])
    (folder / "meta.pkl").write_bytes(pickle.dumps({"itos": {0: "a", 1: "b"}}))
    with pytest.raises(ValueError, match=r"id 2, outside its tokenizer's .* 2: .*damaged"):
        open_split(folder, "train")


def test_nanogpt_folder_of_gpt2s_tokens(tmp_path):
    """nanoGPT writes no meta.pkl for them and assumes GPT-2's vocabulary."""
    folder = nanogpt_folder(tmp_path, [1, 50_256], [50_257])
    assert open_split(folder, "train").vocab_size == 50_257
    with pytest.raises(
        ValueError, match=r"id 50257, outside its tokenizer's .* 50257: .*meta\.pkl"
    ):
        open_split(folder, "val")


def test_the_error_of_a_missing_folder_or_file_names_the_script(make_data, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist.*shakespeare_char\.py"):
        open_split(tmp_path / "nowhere", "train")
    folder = make_data()
    (folder / "val.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"val\.bin does not exist.*data_scripts/"):
        open_split(folder, "val")
    with pytest.raises(FileNotFoundError, match=r"test\.bin"):
        open_split(folder, "test")


def test_truncated_odd_sized_and_empty_files_are_errors(make_data):
    folder = make_data(train=1000)
    content = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(content[:-10])
    with pytest.raises(ValueError, match=r"train\.bin holds 995 tokens, meta\.json says 1,000"):
        open_split(folder, "train")
    (folder / "train.bin").write_bytes(content[:-1])
    with pytest.raises(
        ValueError, match=r"train\.bin is 1,999 bytes, not a positive multiple of 2"
    ):
        open_split(folder, "train")
    (folder / "train.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train\.bin is 0 bytes"):
        open_split(folder, "train")
    (folder / "meta.json").unlink()
    with pytest.raises(ValueError, match=r"train\.bin is 0 bytes"):
        open_split(folder, "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "dtype 'float16' is unknown .known: uint16, uint32."),
        ({"dtype": ["uint16"]}, "dtype .*is unknown"),
        ({"dtype": "uint32"}, "holds 500 tokens, meta.json says 1,000"),
        ({"vocab_size": "1000"}, "vocab_size '1000' is not a positive integer"),
        ({"vocab_size": 999}, r"train.bin holds token id 999, outside meta.json's vocab_size 999"),
        ({"largest_id": {"train": "999"}}, "largest_id .* is not an id for each split"),
        ({"largest_id": 999}, "largest_id 999 is not an id for each split"),
        ({"tokens": {"val": 100}}, "tokens has no count for 'train'"),
        ({"tokens": {"train": 1000.0}}, "is not a count for each split"),
        ({"tokens": 1000}, "is not a count for each split"),
    ],
)
def test_a_wrong_meta_is_an_error(make_data, changes, message):
    folder = make_data(train=1000)
    edit_meta(folder, **changes)
    with pytest.raises(ValueError, match=message):
        open_split(folder, "train")


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_meta_that_is_not_a_json_object_is_an_error(make_data, content):
    folder = make_data()
    (folder / "meta.json").write_text(content)
    with pytest.raises(ValueError, match=r"meta\.json.*data_scripts/"):
        open_split(folder, "train")


def beyond_the_start(make_data):
    """A data set with one nonzero id, after the tokens that opening checks."""
    tokens = np.zeros((1 << 22) + 5, dtype=np.uint16)
    tokens[-1] = 99
    return make_data(train=tokens, val=10)


def test_opening_finds_an_id_beyond_the_models_vocabulary_in_the_meta(make_data):
    folder = beyond_the_start(make_data)
    assert open_split(folder, "train", vocab_size=100).vocab_size == 100
    with pytest.raises(
        ValueError, match=r"train\.bin holds token id 99, outside the model's vocab_size 99"
    ):
        open_split(folder, "train", vocab_size=99)
    assert len(open_split(folder, "val", vocab_size=99)) == 10


def test_reading_finds_an_id_that_opening_does_not(make_data):
    """This happens with a meta.json made by hand, or with a file that has changed."""
    folder = beyond_the_start(make_data)
    edit_meta(folder, largest_id={})
    blocks = ContiguousBlocks(open_split(folder, "train", vocab_size=99), 1 << 21)
    blocks[0]
    with pytest.raises(ValueError, match=r"train\.bin holds token id 99, outside the model's"):
        blocks[2]
    edit_meta(folder, vocab_size=99)
    split = open_split(folder, "train")
    with pytest.raises(ValueError, match=r"id 99, outside meta\.json's vocab_size 99: .*damaged"):
        RandomWindows(split, len(split) - 1, 1, 0)[0]


def test_opening_and_reading_of_gigabytes_is_cheap(make_data):
    """A sparse file with the size of OpenWebText's train split: 18 GB, but none on the disk."""
    folder, tokens = make_data(train=[50_256]), 9_035_582_198
    os.truncate(folder / "train.bin", 2 * tokens)
    edit_meta(folder, tokens={"train": tokens, "val": 100})

    def begin():
        start = time.process_time()  # processor time, which does not grow on a busy machine
        windows = RandomWindows(open_split(folder, "train", vocab_size=50_304), 1024, 100, 0)
        assert windows.__getitems__(range(100))["input_ids"].shape == (100, 1024)
        assert time.process_time() - start < 0.5

    growth = temporary_bytes(torch.device("cpu"), begin)
    assert growth is None or growth < 64 << 20, f"{growth >> 20} MiB"


def test_a_pickled_split_has_its_path_not_its_tokens(make_data):
    split = open_split(make_data(train=50_000), "train")
    split.tokens.sum()
    content = pickle.dumps(split)
    assert len(content) < 2000
    np.testing.assert_array_equal(pickle.loads(content).tokens, split.tokens)


def test_tokens_are_read_only(make_data):
    with pytest.raises(ValueError, match="read-only"):
        open_split(make_data(), "train").tokens[0] = 1
