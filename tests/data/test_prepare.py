"""Downloads from a real local server, the tokenizers, and a model's folder with a tokenizer."""

import hashlib

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline

from striped_hf.cli import UserError
from striped_hf.data import open_split

tiktoken = pytest.importorskip("tiktoken")
prepare = pytest.importorskip("striped_hf.data.prepare")

SOURCE = {"name": "abc", "url": None, "sha256": ""}
CONTENT = b"Twice two makes four.\n" * 20_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()

# characters that a tokenizer might normalize, merge, strip or split
ODD_TEXT = (
    "a  b\n\n\tc \r\n  ' s n't , . \x00 <unk> </s> \ufeff "
    "\u00e9 e\u0301 \u4f60\u597d \U0001f600\U0001f468\u200d\U0001f469 "
)


def test_download(server, tmp_path, capfd):
    server.files["/text"] = CONTENT
    path = tmp_path / "data" / "text"
    prepare.download(f"{server.url}/text", SHA256, path)
    assert path.read_bytes() == CONTENT
    assert "100%" in capfd.readouterr().err  # the progress bar
    prepare.download(f"{server.url}/text", SHA256, path)
    assert len(server.requests) == 1  # the second call finds the file
    path.write_bytes(b"spoiled")
    prepare.download(f"{server.url}/text", SHA256, path)
    assert path.read_bytes() == CONTENT
    assert len(server.requests) == 2
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("route", ["/other", "/cut/text", "/nothing", None])
def test_failed_download_leaves_nothing_and_says_what_to_do(server, tmp_path, route):
    server.files.update({"/text": CONTENT, "/other": b"something else"})
    url = "http://127.0.0.1:9/refused" if route is None else server.url + route
    path = tmp_path / "text"
    with pytest.raises(UserError, match="--input FILE") as caught:
        prepare.download(url, SHA256, path)
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"older")
    with pytest.raises(UserError):
        prepare.download(url, SHA256, path)
    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_whole_script_with_downloads(server, corpus, monkeypatch, run_here):
    server.files["/input.txt"] = corpus.read_bytes()
    monkeypatch.setitem(prepare.TINY_SHAKESPEARE, "url", f"{server.url}/input.txt")
    for _ in range(2):
        assert "vocabulary 65; train.bin 1,003,854" in run_here("shakespeare_char.py").out
        val = open_split("data/shakespeare_char", "val")
        assert len(val) == 111_540
        assert val.meta["source"] == prepare.TINY_SHAKESPEARE
    assert server.requests == ["/input.txt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "0 characters"), (b"x", "1 characters"), (b"ab\xff", "not UTF-8")],
)
def test_unusable_text_is_an_error(tmp_path, content, message):
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare.read_text(tmp_path / "text")


def test_text_is_read_as_nanogpt_reads_it(tmp_path):
    content = "\ufeffa\r\nb\rc\n\u2028\x0c".encode()
    (tmp_path / "text").write_bytes(content)
    text, source = prepare.read_text(tmp_path / "text")
    with (tmp_path / "text").open(encoding="utf-8") as file:  # as in nanoGPT's prepare.py
        assert text == file.read() == "\ufeffa\nb\nc\n\u2028\x0c"
    sha256 = hashlib.sha256(content).hexdigest()
    assert source == {"name": "text", "url": None, "sha256": sha256}


@pytest.mark.parametrize("spelled", ["<|endoftext|>", "<|endoftext|>x<|endoftext|>"])
def test_a_special_token_in_the_text_is_text(test_data, tmp_path, monkeypatch, spelled):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(test_data / "tiktoken_cache"))
    text = f"one story.{spelled}another story. " * 20
    prepare.write_gpt2_tokens(tmp_path / "a", text, SOURCE)
    prepare.write_model_tokens(tmp_path / "b", text, SOURCE, str(test_data / "gpt2_tokenizer"))
    for split in ("train", "val"):
        one, other = (open_split(tmp_path / name, split).tokens.tolist() for name in "ab")
        assert one == other
        assert 50_256 not in one
    # and the saved tokenizer still recognises the special token
    assert 50_256 in AutoTokenizer.from_pretrained(tmp_path / "b")(spelled)["input_ids"]


def test_characters_that_a_model_lacks_are_named(tmp_path):
    prepare.character_tokenizer("abc").save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"^odd has characters unknown .*: '\u20ac', '\\n'; leave"):
        prepare.write_model_tokens(
            tmp_path / "data", "a\u20ac\n" * 3000, SOURCE | {"name": "odd"}, str(tmp_path / "model")
        )
    assert not (tmp_path / "data").exists()


def test_unexpected_counts_write_nothing(tmp_path):
    source = {"name": "abc", "url": None, "sha256": ""}
    with pytest.raises(UserError, match=r"\(3, 2, 1\).*\(3, 2, 2\)"):
        prepare.write_characters(tmp_path / "data", "abc", source, expected=(3, 2, 2))
    assert not (tmp_path / "data").exists()


def test_characters_round_trip_through_the_saved_tokenizer(tmp_path):
    text = ODD_TEXT * 3
    prepare.write_characters(tmp_path, text, {"name": "odd", "url": None, "sha256": ""})
    symbols = sorted(set(text))
    ids = np.concatenate([open_split(tmp_path, split).tokens for split in ("train", "val")])
    assert ids.tolist() == [symbols.index(character) for character in text]
    assert len(open_split(tmp_path, "train")) == int(len(text) * 0.9)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == open_split(tmp_path, "train").vocab_size == len(symbols)
    assert tokenizer(text)["input_ids"] == ids.tolist()
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=True) == text


def test_unknown_character_is_an_error_not_dropped():
    tokenizer = prepare.character_tokenizer("abc")
    assert tokenizer("cab")["input_ids"] == [2, 0, 1]
    with pytest.raises(Exception, match="UNK"):
        tokenizer("cabd")


def test_shakespeare_round_trip(corpus, tmp_path):
    text, source = prepare.read_text(corpus)
    prepare.write_characters(tmp_path, text, source)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = np.concatenate([open_split(tmp_path, split).tokens for split in ("train", "val")])
    np.testing.assert_array_equal(tokenizer(text)["input_ids"], ids)
    assert tokenizer.decode(ids.tolist()) == text


def test_gpt2_tokenizer_equals_tiktoken(test_data, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(test_data / "tiktoken_cache"))
    prepare.gpt2_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 50_257
    assert tokenizer.eos_token_id == 50_256
    encoding = tiktoken.get_encoding("gpt2")
    published = AutoTokenizer.from_pretrained(test_data / "gpt2_tokenizer")
    for text in (corpus.read_text(), ODD_TEXT.replace("</s>", "")):
        ids = tokenizer(text, verbose=False)["input_ids"]
        assert ids == encoding.encode_ordinary(text)
        assert ids == published(text, verbose=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_pipeline_on_a_models_folder(tmp_path):
    symbols = "\n !',.?abn"  # everything that a clean-up of spaces would change
    config = GPT2Config(
        n_layer=1,
        n_head=1,
        n_embd=8,
        n_positions=32,
        vocab_size=len(symbols),
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    prepare.character_tokenizer(symbols).save_pretrained(tmp_path)
    generate = pipeline("text-generation", str(tmp_path), device="cpu")
    prompt = "a  b\n\n . ' n"
    (result,) = generate(prompt, max_new_tokens=20, do_sample=True)
    assert result["generated_text"].startswith(prompt)
    # one token per character, and none is lost
    assert len(result["generated_text"]) == len(prompt) + 20
    assert set(result["generated_text"]) <= set(symbols)
