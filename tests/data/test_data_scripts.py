"""The scripts in data_scripts/, run as processes without network."""

import hashlib
import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from striped_hf.data import open_split, prepare

TEXT = "It was the best of times,\nit was the worst of times.\n" * 40


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def own_text(tmp_path):
    (tmp_path / "own.txt").write_text(TEXT)
    return tmp_path / "own.txt"


def assert_one_line(done, *words):
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    *_, last = done.stderr.splitlines()
    for word in words:
        assert word in last


def test_python_docs_twice(run_script, tmp_path):
    folder = tmp_path / "data" / "python_docs"
    for _ in range(2):
        done = run_script("python_docs.py")
        assert done.returncode == 0, done.stderr
        meta = json.loads((folder / "meta.json").read_text())
        assert f"{meta['tokens']['train']:,}" in done.stdout
        assert sorted(contents(folder)) == [
            "meta.json", "tokenizer.json", "tokenizer_config.json", "train.bin", "val.bin",
        ]  # fmt: skip
    train, val = (open_split(folder, split) for split in ("train", "val"))
    assert len(train) > 400_000
    assert len(train) == int((len(train) + len(val)) * 0.9)
    text = AutoTokenizer.from_pretrained(folder).decode([*train.tokens, *val.tokens])
    assert text.startswith('The "assert" statement\n***')
    assert hashlib.sha256(text.encode()).hexdigest() == meta["source"]["sha256"]
    assert meta["vocab_size"] == len(set(text))


def test_characters_of_an_own_file_twice(run_script, own_text, tmp_path):
    seen = []
    for _ in range(2):
        done = run_script("shakespeare_char.py", "--input", own_text, "--output_dir", "own")
        assert done.returncode == 0, done.stderr
        seen.append(contents(tmp_path / "own"))
    assert seen[0] == seen[1]
    meta = json.loads(seen[0]["meta.json"])
    sha256 = hashlib.sha256(TEXT.encode()).hexdigest()
    assert meta["source"] == {"name": "own.txt", "url": None, "sha256": sha256}
    assert meta["tokenizer"] == "characters"
    symbols = sorted(set(TEXT))
    # as nanoGPT's prepare.py makes them
    expected = np.array([symbols.index(c) for c in TEXT[: int(len(TEXT) * 0.9)]], dtype=np.uint16)
    assert seen[0]["train.bin"] == expected.tobytes()


def test_real_corpus_by_characters(run_script, corpus, tmp_path):
    done = run_script("shakespeare_char.py", "--input", corpus)
    assert done.returncode == 0, done.stderr
    for count in ("65", "1,003,854", "111,540"):
        assert count in done.stdout
    meta = json.loads((tmp_path / "data" / "shakespeare_char" / "meta.json").read_text())
    assert meta["source"] == prepare.TINY_SHAKESPEARE
    assert meta["vocab_size"] == 65


def test_real_corpus_by_tiktoken(run_script, real_data, corpus, tmp_path):
    cache = str(real_data / "tiktoken_cache")
    done = run_script("shakespeare.py", "--input", corpus, TIKTOKEN_CACHE_DIR=cache)
    assert done.returncode == 0, done.stderr
    for count in ("50,257", "301,966", "36,059"):
        assert count in done.stdout
    folder = tmp_path / "data" / "shakespeare"
    assert np.memmap(folder / "train.bin", dtype=np.uint16, mode="r").shape == (301_966,)
    val = AutoTokenizer.from_pretrained(folder).decode(open_split(folder, "val").tokens.tolist())
    assert val == corpus.read_text()[1_003_854:]


@pytest.mark.parametrize(
    ("folder", "counts"),
    [("gpt2_tokenizer", (50_257, 301_966, 36_059)), ("stories260K", (512, 623_343, 70_021))],
)
def test_real_corpus_by_a_models_tokenizer(run_script, real_data, corpus, folder, counts, tmp_path):
    done = run_script(
        "shakespeare.py",
        "--input",
        corpus,
        "--tokenizer",
        real_data / folder,
        "--output_dir",
        "out",
    )
    assert done.returncode == 0, done.stderr
    assert "longer than" not in done.stderr
    train, val = (open_split(tmp_path / "out", split) for split in ("train", "val"))
    assert (train.vocab_size, len(train), len(val)) == counts
    own, given = (
        AutoTokenizer.from_pretrained(path) for path in (tmp_path / "out", real_data / folder)
    )
    assert type(own) is type(given)
    ids = given(corpus.read_text()[1_003_854:], add_special_tokens=False)["input_ids"]
    assert val.tokens.tolist() == ids
    assert own("The king.\n")["input_ids"] == given("The king.\n")["input_ids"]


def test_own_text_by_a_saved_tokenizer(run_script, own_text, tmp_path):
    prepare.character_tokenizer("".join(sorted(set(TEXT)))).save_pretrained(tmp_path / "model")
    done = run_script(
        "shakespeare.py", "--input", own_text, "--tokenizer", "model", "--output_dir", "out"
    )
    assert done.returncode == 0, done.stderr
    assert len(open_split(tmp_path / "out", "train")) == int(len(TEXT) * 0.9)
    assert open_split(tmp_path / "out", "train").meta["tokenizer"] == "model"


def test_no_network(run_script, own_text, tmp_path):
    done = run_script("shakespeare_char.py")
    assert_one_line(done, "raw.githubusercontent.com", "--input FILE")
    assert list((tmp_path / "data" / "shakespeare_char").iterdir()) == []
    (tmp_path / "empty").mkdir()
    done = run_script("shakespeare.py", "--input", own_text, TIKTOKEN_CACHE_DIR="empty")
    assert_one_line(done, "TIKTOKEN_CACHE_DIR", "--tokenizer")
    done = run_script("shakespeare.py", "--input", own_text, "--tokenizer", "nobody/nothing")
    assert_one_line(done, "--tokenizer nobody/nothing", "local folder")
    assert not (tmp_path / "data" / "shakespeare").exists()


def test_missing_input(run_script, tmp_path):
    done = run_script("python_docs.py", "--input", "nowhere.txt")
    assert_one_line(done, "nowhere.txt")
    assert not (tmp_path / "data").exists()
