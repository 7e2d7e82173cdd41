"""Encoding documents: against a plain loop, after kills, in constant memory, and errors."""

import json
import multiprocessing
import os
import signal
import threading
import time

import datasets
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.measuring import return_freed_memory, temporary_bytes
from striped_hf.cli import UserError
from striped_hf.data import open_split
from striped_hf.data.documents import load_documents, val_rows, write_documents

SOURCE = {"name": "documents", "url": None, "sha256": None}
ODD = [
    "",
    " ",
    "Twice two.",
    "a<|endoftext|>b",
    "\r\n\n  \t",
    "\u4f60\u597d \U0001f600",
    "x" * 3000,
]


@pytest.fixture(autouse=True)
def caches(test_data, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(test_data / "tiktoken_cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def novels(test_data, tmp_path):
    """The first 4,000 documents, 33 MB: four pieces."""
    texts = pq.read_table(test_data / "novels" / "train.parquet", columns=["text"])[:4000]
    pq.write_table(texts, tmp_path / "novels.parquet")
    return tmp_path / "novels.parquet"


def load(*paths):
    return load_documents("", data_files=[str(path) for path in paths])


def plain(texts, rows):
    """The tokens of some documents, from a plain loop."""
    encoding = tiktoken.get_encoding("gpt2")
    return [i for row in rows for i in [*encoding.encode_ordinary(texts[row]), encoding.eot_token]]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_equals_the_plain_loop(tmp_path, ending):
    texts = [f"{ODD[i % len(ODD)]} {i}" if i % 3 else ODD[i % len(ODD)] for i in range(2300)]
    path = tmp_path / f"texts.{ending}"
    if ending == "jsonl":
        path.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts))
    else:
        pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path)
    documents = load(path)
    meta = write_documents(tmp_path / "data", documents, SOURCE, num_proc=2)
    val = val_rows(len(texts)).tolist()
    assert len(val) == 2
    train = [row for row in range(len(texts)) if row not in val]
    for name, rows in (("train", train), ("val", val)):
        assert open_split(tmp_path / "data", name).tokens.tolist() == plain(texts, rows)
    assert meta["source"] == SOURCE
    assert len(AutoTokenizer.from_pretrained(tmp_path / "data")) == meta["vocab_size"] == 50_257
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == [
        *("meta.json", "tokenizer.json", "tokenizer_config.json", "train.bin", "val.bin")
    ]


@pytest.mark.parametrize("count", [2, 1999, 2001, 80_137])
def test_the_val_documents_are_the_same_as_nanogpts(count):
    rows = datasets.Dataset.from_dict({"row": range(count)})
    split = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    assert val_rows(count).tolist() == sorted(split["test"]["row"])


def test_several_files_and_paragraphs(tmp_path):
    (tmp_path / "a.txt").write_text("One\nline.\n\nTwo.\n")
    (tmp_path / "b.txt").write_text("Three.")
    documents = load(tmp_path / "a.txt", tmp_path / "b.txt")
    assert [text.strip() for text in documents["text"]] == ["One\nline.", "Two.", "Three."]
    meta = write_documents(tmp_path / "data", documents, SOURCE, num_proc=1)
    assert sum(meta["tokens"].values()) == len(plain(documents["text"], range(3)))


def work(folder, documents, num_proc):
    write_documents(folder, documents, SOURCE, num_proc)


def work_apart(*arguments):
    # tqdm shares its lock with forks: a killed fork would leave it locked in this process
    tqdm.set_lock(threading.RLock())
    work(*arguments)


def begin(folder, documents, num_proc=2):
    """Starts a run in a separate process; returns it after its first commit."""
    process = multiprocessing.get_context("fork").Process(
        target=work_apart, args=(folder, documents, num_proc)
    )
    process.start()
    progress = folder / ".unfinished" / "progress.json"
    deadline = time.monotonic() + 600
    before = progress.stat().st_ino if progress.exists() else None
    while not progress.exists() or progress.stat().st_ino == before:
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


def committed(folder):
    return json.loads((folder / ".unfinished" / "progress.json").read_text())


@pytest.mark.slow
def test_killed_runs_continue_where_they_stopped(novels, tmp_path):
    documents = load(novels)
    folder = tmp_path / "data"
    row, first = 0, None
    for _ in range(2):
        process = begin(folder, documents)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == 2
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        # its encoding processes end too
        assert psutil.wait_procs(children, timeout=120)[1] == []
        assert committed(folder)["position"]["row"] > row
        row = committed(folder)["position"]["row"]
        inode = (folder / ".unfinished" / "train.bin").stat().st_ino
        first = first or inode
        assert inode == first
        # the killed run wrote tokens that it did not commit
        with (folder / ".unfinished" / "train.bin").open("ab") as file:
            file.write(b"abc")
    assert not (folder / "meta.json").exists()
    write_documents(folder, documents, SOURCE, num_proc=1)
    assert (folder / "train.bin").stat().st_ino == first
    assert not (folder / ".unfinished").exists()
    write_documents(tmp_path / "again", documents, SOURCE, num_proc=2)
    for name in ("train.bin", "val.bin"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(novels, tmp_path):
    """33 MB of text need no more memory than 8 MB."""
    fork = multiprocessing.get_context("fork")
    texts = pq.read_table(novels)[:1000]
    results = fork.SimpleQueue()

    def measure(path, folder):
        return_freed_memory()
        pa.set_memory_pool(pa.system_memory_pool())  # like malloc here: it keeps no freed memory
        cpu = torch.device("cpu")
        loading = temporary_bytes(cpu, lambda: load(path))
        documents = load(path)
        results.put((loading, temporary_bytes(cpu, lambda: work(folder, documents, num_proc=1))))

    peaks = []
    for repeat in (1, 4):
        path = tmp_path / f"{repeat}.parquet"
        with pq.ParquetWriter(path, texts.schema) as writer:
            for _ in range(repeat):
                writer.write_table(texts, row_group_size=100)
        process = fork.Process(target=measure, args=(path, tmp_path / f"data{repeat}"))
        process.start()
        peaks.append([peak / 2**20 for peak in results.get()])
        process.join()
    (loading, writing), (loading_4, writing_4) = peaks
    assert loading_4 < loading + 6, peaks
    assert writing_4 < writing + 6, peaks


def test_another_data_set_does_not_continue_there(novels, test_data, tmp_path):
    process = begin(tmp_path / "data", load(novels))
    process.kill()
    process.join()
    other = load(test_data / "novels" / "val.parquet")
    with pytest.raises(UserError, match=r"beginning of another data set .*delete .*\.unfinished"):
        write_documents(tmp_path / "data", other, SOURCE, num_proc=1)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jsonl": '{"content": "x"}\n' * 9}, "columns are content: pass one with a column"),
        ({"a.jsonl": '{"text": 5}\n' * 9}, "line 1 has 5 as its text"),
        ({"a.jsonl": '{"text": "x"}\n'}, "1 documents: too few"),
        ({"a.jsonl": '{"text": \n' * 9}, r"a\.jsonl: line 1 is no JSON"),
        ({"a.jsonl": "", "b.txt": "x"}, r"files of one kind.*\.parquet, \.jsonl"),
        ({"a.csv": "text\nx\n"}, "files of one kind"),
        ({}, r"no\.parquet: there is no such file"),
    ],
)
def test_unusable_data_is_an_error(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load(*(tmp_path / name for name in files or ["no.parquet"]))
    assert "\n" not in str(caught.value)


def test_document_without_text_is_named(tmp_path):
    texts = ["x"] * 1500
    texts[1234] = None
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="document 1,234 "):
        write_documents(tmp_path / "data", load(tmp_path / "a.parquet"), SOURCE, num_proc=1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "caf\xe9\n\n".encode("latin-1") * 9, "a.txt: line 1 is not UTF-8 .*0xe9"),
        ("a.txt", "one\n\ntwo\n\nthree".encode("utf-16"), "a.txt: line 1 is not UTF-8 .*0xff"),
        ("a.jsonl", b'{"text": "x"}\n' * 9 + b'{"text": "x\n', "line 10 is no JSON"),
        ("a.jsonl", b'{"text": "x"}\n' * 9 + b'{"text": ["x"]}\n', r"line 10 has \['x'\] as its"),
        ("a.jsonl", b'{"text": "x"}\n' * 9 + b"7\n", "line 10 is 7; it must be an object"),
        ("a.jsonl", b'{"text": "x"}\n\xff\n', "line 2 is not UTF-8"),
        ("a.parquet", b"PAR1" + bytes(90), "cannot load .*arquet magic bytes not found"),
    ],
)
def test_the_error_names_the_damage_of_a_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["novel [draft].txt", "what?.txt", "a*.txt"])
def test_file_names_are_not_patterns(tmp_path, name):
    (tmp_path / name).write_text("One.\n\nTwo.")
    (tmp_path / "abc.txt").write_text("Three.")
    assert [text.strip() for text in load(tmp_path / name)["text"]] == ["One.", "Two."]


def test_a_changed_source_does_not_continue(tmp_path):
    """The file keeps its name and length, and half of it was read before the change."""
    path, folder = tmp_path / "a.jsonl", tmp_path / "data"
    path.write_text('{"text": "old"}\n' * 5000)
    process = begin(folder, load(path), num_proc=1)
    process.kill()
    process.join()
    path.write_text('{"text": "new"}\n' * 5000)
    with pytest.raises(UserError, match=r"another data set \(files\..*delete .*\.unfinished"):
        write_documents(folder, load(path), SOURCE, num_proc=1)


def test_the_val_fraction_is_used(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"number {i}" for i in range(100)))
    documents = load(tmp_path / "a.txt")
    write_documents(tmp_path / "data", documents, SOURCE, num_proc=1, val_fraction=0.25)
    for split, count in (("train", 75), ("val", 25)):
        tokens = open_split(tmp_path / "data", split).tokens
        assert (tokens == 50_256).sum() == count
    with pytest.raises(UserError, match=r"share of 0\.999 takes all 100 .*--val_fraction"):
        write_documents(tmp_path / "data", documents, SOURCE, num_proc=1, val_fraction=0.999)


def test_a_killed_encoder_ends_with_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("One.\n\nTwo.")
    # the forked process has this change, too
    monkeypatch.setattr("striped_hf.data.documents._encode", die)
    with pytest.raises(UserError, match=r"process that encodes was killed .* the same command"):
        write_documents(tmp_path / "data", load(tmp_path / "a.txt"), SOURCE, num_proc=1)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)  # like the system when memory runs out
