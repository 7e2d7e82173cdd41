"""Sampling from a run's folder."""

import socket

import pytest

SCRIPT = "recipes/sample.py"
pytestmark = pytest.mark.slow


def samples(printed: str) -> list[str]:
    return printed.split("\n---------------\n")[:-1]


def test_samples_go_on_past_the_context(tiny_run, run_script, tmp_path):
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


def test_top_k_of_one_is_greedy(tiny_run, run_here):
    flags = ("--start", "The ", "--num_samples", 2, "--max_new_tokens", 20, "--top_k", 1)
    first, second = samples(run_here(SCRIPT, tiny_run, *flags))
    assert first == second


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--start", "\N{SNOWMAN}"), "unknown to the model"),
        (("--start", ""), "no token to begin with"),
        (("--start", "FILE:no.txt"), "no.txt"),
    ],
)
def test_bad_prompts_are_one_line(tiny_run, run_here, flags, message):
    run_here(SCRIPT, tiny_run, *flags, fails=message)


def test_hub_name_without_network(run_script, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
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
