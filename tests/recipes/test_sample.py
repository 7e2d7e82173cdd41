"""Sampling from a run's folder."""

import shutil
import socket
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from striped_hf.data.characters import character_tokenizer

SCRIPT = "recipes/sample.py"
pytestmark = pytest.mark.slow


def samples(printed: str) -> list[str]:
    return printed.split("\n---------------\n")[:-1]


def test_samples_continue_past_the_context(tiny_run, run_script, tmp_path):
    flags = ("--start", "The ", "--num_samples", 2, "--max_new_tokens", 60)  # the context is 32
    first, second = samples(run_script(SCRIPT, tiny_run, *flags, cwd=tmp_path).stdout)
    assert first != second
    for text in (first, second):
        assert text.startswith("The ")
        assert len(text) == 4 + 60


def test_seed_and_prompt_file(tiny_run, run_here, tmp_path):
    (tmp_path / "prompt.txt").write_text("A module\n", encoding="utf-8")
    flags = ("--start", "FILE:prompt.txt", "--num_samples", 1, "--max_new_tokens", 10, "--seed")
    once, again, other = (samples(run_here(SCRIPT, tiny_run, *flags, seed)) for seed in (1, 1, 2))
    assert once == again != other
    assert once[0].startswith("A module\n")


@pytest.fixture
def alphabet(tmp_path) -> Path:
    """A model that generates the alphabet up to its end-of-text token "f"; its context is 8."""
    letters = "abcdef."
    config = GPT2Config(
        vocab_size=7, n_positions=8, n_layer=1, n_head=1, n_embd=8, bos_token_id=None,
        eos_token_id=6, tie_word_embeddings=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.wte.weight[:, :7] = torch.eye(7)
        model.transformer.ln_f.weight.fill_(1)
        model.lm_head.weight[:, :7] = torch.eye(7).roll(1, 0)  # each letter is followed by the next
    model.save_pretrained(tmp_path / "alphabet")
    tokenizer = character_tokenizer(letters)
    tokenizer.eos_token = "."
    tokenizer.save_pretrained(tmp_path / "alphabet")
    return tmp_path / "alphabet"


@pytest.mark.parametrize("start", ["a", "aaaaaaa", "aaaaaaaa", "aaaaaaaaaaaaaaa"])
def test_a_finished_text_stays_finished(alphabet, run_here, start):
    """This holds within the context, at its end and past it."""
    flags = ("--start", start, "--top_k", 1, "--num_samples", 2, "--max_new_tokens", 30)
    assert samples(run_here(SCRIPT, alphabet, *flags)) == [f"{start}bcdef"] * 2


def test_each_sample_ends_at_its_end_of_text_token(alphabet, run_here):
    flags = ("--start", "a" * 9, "--temperature", 100, "--num_samples", 6, "--max_new_tokens", 30)
    found = samples(run_here(SCRIPT, alphabet, *flags))
    assert len({len(text) for text in found}) > 1
    ended = run_here(SCRIPT, alphabet, *flags, "--seed", 1337)
    assert samples(ended) == found
    # skip_special_tokens hides an end-of-text token: the output must have none inside a text
    assert all(len(text) <= 9 + 30 for text in found)


def test_a_context_of_one_token_is_enough(tmp_path, run_here):
    config = GPT2Config(vocab_size=3, n_positions=1, n_layer=1, n_head=1, n_embd=4)
    config.bos_token_id = config.eos_token_id = None
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "one")
    character_tokenizer("abc").save_pretrained(tmp_path / "one")
    flags = ("--start", "ab", "--num_samples", 1, "--max_new_tokens", 5)
    (text,) = samples(run_here(SCRIPT, "one", *flags))
    assert len(text) == 7


def test_a_folder_without_tokenizer_is_an_error(tiny_run, run_here, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    for path in (tmp_path / "run").glob("tokenizer*"):
        path.unlink()
    run_here(SCRIPT, "run", fails="run has no tokenizer: pass a folder that has one")


def test_the_error_of_an_unfinished_run_names_its_checkpoint(tiny_run, run_here, tmp_path):
    for step in (10, 20):
        name = f"checkpoint-{step}"
        shutil.copytree(tiny_run / name, tmp_path / "run" / name)
    run_here(SCRIPT, "run", fails="pass its last checkpoint, run/checkpoint-20")


def test_unknown_characters_of_a_long_prompt_are_named(tiny_run, run_here, tmp_path):
    text = "The " * 3000 + "\N{SNOWMAN}" + "A" * 3000
    (tmp_path / "prompt.txt").write_text(text, encoding="utf-8")
    message = run_here(SCRIPT, tiny_run, "--start", "FILE:prompt.txt", fails="\N{SNOWMAN}")
    assert "--start FILE:prompt.txt has characters unknown" in message
    assert len(message) < 300
    (tmp_path / "prompt.txt").write_bytes(b"caf\xe9")
    fails = "--start FILE:prompt.txt is not UTF-8"
    run_here(SCRIPT, tiny_run, "--start", "FILE:prompt.txt", fails=fails)


def test_top_k_of_one_is_greedy(tiny_run, run_here):
    flags = ("--start", "The ", "--num_samples", 2, "--max_new_tokens", 20, "--top_k", 1)
    first, second = samples(run_here(SCRIPT, tiny_run, *flags))
    assert first == second


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--start", "\N{SNOWMAN}"), "unknown to the model"),
        (("--start", ""), "no beginning-of-text token"),
        (("--start", "FILE:no.txt"), "no.txt"),
    ],
)
def test_bad_prompts_end_with_one_line(tiny_run, run_here, flags, message):
    run_here(SCRIPT, tiny_run, *flags, fails=message)


def test_hub_name_without_network(run_script, tmp_path):
    with socket.socket() as unused:
        # the socket is bound but does not listen: connections fail at once
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        error = run_script(
            *(SCRIPT, "someone/some-model"),
            cwd=tmp_path,
            status=1,
            HF_ENDPOINT=endpoint,
            HF_HOME=str(tmp_path),
        ).stderr
    assert "Traceback" not in error
    assert "pass a local folder" in error.splitlines()[-1]
