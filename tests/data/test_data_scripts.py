"""The scripts in data_scripts/, without network: each once as a separate process."""

import hashlib
import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from striped_hf.data import open_split

prepare = pytest.importorskip("striped_hf.data.prepare", exc_type=ImportError)

TEXT = "It was the best of times,\nit was the worst of times.\n" * 40

pytestmark = pytest.mark.usefixtures("no_network")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def own_text(tmp_path):
    (tmp_path / "own.txt").write_text(TEXT)
    return tmp_path / "own.txt"


@pytest.mark.slow
def test_python_docs(docs_data, run_here):
    first = contents(docs_data)
    assert sorted(first) == [
        "meta.json", "tokenizer.json", "tokenizer_config.json", "train.bin", "val.bin",
    ]  # fmt: skip
    meta = json.loads(first["meta.json"])
    train, val = (open_split(docs_data, split) for split in ("train", "val"))
    assert len(train) > 400_000
    assert len(train) == int((len(train) + len(val)) * 0.9)
    text = AutoTokenizer.from_pretrained(docs_data).decode([*train.tokens, *val.tokens])
    assert text.startswith('The "assert" statement\n***')
    assert hashlib.sha256(text.encode()).hexdigest() == meta["source"]["sha256"]
    assert meta["vocab_size"] == len(set(text))
    # again at once, over the existing files
    assert f"{len(train):,}" in run_here("python_docs.py", "--output_dir", docs_data).out
    assert contents(docs_data) == first


@pytest.mark.slow
def test_a_text_of_the_user_as_characters(run_script, run_here, own_text, tmp_path):
    arguments = ["--input", own_text, "--output_dir", tmp_path / "own"]
    run_script("data_scripts/shakespeare_char.py", *arguments, cwd=tmp_path)
    first = contents(tmp_path / "own")
    meta = json.loads(first["meta.json"])
    sha256 = hashlib.sha256(TEXT.encode()).hexdigest()
    assert meta["source"] == {"name": "own.txt", "url": None, "sha256": sha256}
    assert meta["tokenizer"] == "characters"
    symbols = sorted(set(TEXT))
    # the same tokens as from nanoGPT's prepare.py
    expected = np.array([symbols.index(c) for c in TEXT[: int(len(TEXT) * 0.9)]], dtype=np.uint16)
    assert first["train.bin"] == expected.tobytes()
    run_here("shakespeare_char.py", *arguments)
    assert contents(tmp_path / "own") == first


@pytest.mark.slow
def test_a_text_of_the_user_in_a_models_tokens(run_script, own_text, tmp_path):
    prepare.character_tokenizer("".join(sorted(set(TEXT)))).save_pretrained(tmp_path / "model")
    arguments = ["--input", own_text, "--tokenizer", "model", "--output_dir", "out"]
    run_script("data_scripts/shakespeare.py", *arguments, cwd=tmp_path)
    train = open_split(tmp_path / "out", "train")
    assert len(train) == int(len(TEXT) * 0.9)
    assert train.meta["tokenizer"] == "model"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").decode(train.tokens[:9]) == TEXT[:9]


def test_shakespeare_in_gpt2_tokens(run_here, test_data, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(test_data / "tiktoken_cache"))
    out = run_here("shakespeare.py", "--input", corpus).out
    for count in ("50,257", "301,966", "36,059"):
        assert count in out
    folder = tmp_path / "data" / "shakespeare"
    assert np.memmap(folder / "train.bin", dtype=np.uint16, mode="r").shape == (301_966,)
    val = AutoTokenizer.from_pretrained(folder).decode(open_split(folder, "val").tokens.tolist())
    assert val == corpus.read_text()[1_003_854:]


@pytest.mark.parametrize(
    ("name", "counts"),
    [("gpt2_tokenizer", (50_257, 301_966, 36_059)), ("stories260K", (512, 623_343, 70_021))],
)
def test_shakespeare_in_a_models_tokens(run_here, test_data, corpus, tmp_path, name, counts):
    folder = test_data / name
    run_here("shakespeare.py", "--input", corpus, "--tokenizer", folder, "--output_dir", "out")
    train, val = (open_split(tmp_path / "out", split) for split in ("train", "val"))
    assert (train.vocab_size, len(train), len(val)) == counts
    own, given = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "out", folder))
    assert type(own) is type(given)
    ids = given(corpus.read_text()[1_003_854:], add_special_tokens=False)["input_ids"]
    assert val.tokens.tolist() == ids
    assert own("The king.\n")["input_ids"] == given("The king.\n")["input_ids"]


@pytest.fixture
def documents(test_data, tmp_path, monkeypatch):
    """Some documents as JSON lines, and a cache for `datasets`."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(test_data / "tiktoken_cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "openwebtext" / "train.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": f"Number {i}."}) + "\n" for i in range(2001)))
    return path


def test_openwebtext_from_files(run_here, documents, tmp_path):
    out = run_here("openwebtext.py", "--data_files", documents, "--num_proc", 2).out
    counts = [" ".join(line.split()) for line in out.splitlines()]
    train, val = (open_split(tmp_path / "data" / "openwebtext", s) for s in ("train", "val"))
    assert train.meta["source"] == {"name": "train.jsonl", "url": None, "sha256": None}
    assert counts[1:] == [
        *("documents 2,001", f"train tokens {len(train):,}", f"val tokens {len(val)}")
    ]
    end = train.vocab_size - 1
    assert ((train.tokens == end).sum(), (val.tokens == end).sum()) == (1999, 2)


def test_openwebtext_prints_the_expected_counts(run_here, documents):
    run_here("openwebtext.py", "--num_proc", 0, fails="--num_proc 0: pass at least 1")
    # a folder of this name in the working directory replaces the hub's data set
    run_here("openwebtext.py", "--num_proc", 1, fails="counts differ from the known counts")
    assert json.loads((documents.parents[1] / "data/openwebtext/meta.json").read_text())["source"][
        "url"
    ].endswith("/openwebtext")


@pytest.mark.slow
def test_openwebtext_without_network_ends_with_one_line(run_script, tmp_path):
    done = run_script(
        "data_scripts/openwebtext.py", cwd=tmp_path, status=1, HF_HOME=str(tmp_path / "hf")
    )
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("openwebtext.py: error: cannot load openwebtext: pass the name")
    assert "--data_files FILE" in last
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_no_network_ends_a_process_with_one_line(run_script, tmp_path):
    done = run_script("data_scripts/shakespeare_char.py", cwd=tmp_path, status=1)
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("shakespeare_char.py: error: cannot download https://raw.githubuser")
    assert "--input FILE" in last
    assert list((tmp_path / "data" / "shakespeare_char").iterdir()) == []


@pytest.mark.slow
def test_unreachable_hub_ends_a_process_with_one_line(run_script, own_text, tmp_path):
    arguments = ["--input", own_text, "--tokenizer", "nobody/nothing"]
    done = run_script("data_scripts/shakespeare.py", *arguments, cwd=tmp_path, status=1)
    assert "Traceback" not in done.stderr
    assert "cannot load nobody/nothing: pass a local folder" in done.stderr
    assert not (tmp_path / "data").exists()


def test_tiktoken_without_network_and_cache(run_here, own_text, tmp_path, monkeypatch):
    # tiktoken keeps the encodings it has made for the life of the process
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    run_here(
        "shakespeare.py", "--input", own_text, fails="TIKTOKEN_CACHE_DIR .* or pass --tokenizer"
    )
    assert not (tmp_path / "data").exists()


def test_missing_input(run_here, tmp_path):
    run_here("python_docs.py", "--input", "nowhere.txt", fails=r"python_docs\.py: error: .*nowhere")
    run_here("python_docs.py", "--input", tmp_path, fails="directory")
    assert not (tmp_path / "data").exists()
