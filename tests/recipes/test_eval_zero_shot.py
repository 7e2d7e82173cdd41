"""WikiText and LAMBADA against independent computations, token by token."""

import importlib.util
import json
import math
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.eval_zero_shot import read_wikitext
from striped_hf.data.prepare import character_tokenizer

RECIPE = "recipes/eval_zero_shot.py"
REPOSITORY = Path(__file__).resolve().parents[2]
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed: pip install '.[eval]'",
)

LINES = (" = A = \n", " \n", " bad cab , a cab . \n", "\n", " a bed = = a bead ab\n")
WIKITEXT = ("--tasks", "wikitext", "--wikitext", "wiki.raw", "--results", "results.json")


@pytest.fixture
def model(model, tmp_path):
    """The same model with characters as tokens, and a text of these characters."""
    character_tokenizer("\n ,.=Aabcde").save_pretrained(model)
    (tmp_path / "wiki.raw").write_text("".join(LINES), encoding="utf-8")
    return model


def read(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))["scores"]


@torch.no_grad()
@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 15), (12, 5), (16, 1)])
def test_wikitext_is_the_mean_over_tokens(model, run_here, tmp_path, window, stride):
    printed = run_here(RECIPE, model, *WIKITEXT, "--window", window, "--stride", stride)
    text = "\n\n".join((" = A = \n", "", " bad cab , a cab . \n", "", LINES[-1]))
    ids = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    one = AutoModelForCausalLM.from_pretrained(model).double().eval()
    losses = []
    for target in range(1, len(ids)):
        begin = 0  # from the first window that contains the target
        while begin + window <= target:
            begin += stride
        logits = one(torch.tensor([ids[begin:target]])).logits[0, -1]
        losses.append(-logits.log_softmax(-1)[ids[target]].item())
    (score,) = read(tmp_path)
    assert score["tokens"] == len(losses) == len(text) - 1
    assert score["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert score["perplexity"] == pytest.approx(math.exp(score["loss"]))
    assert f"windows of {window} tokens and strides of {stride}, float32" in printed


def test_lines_are_joined_as_in_the_guide(test_data):
    text = read_wikitext(test_data / "wikitext-2-raw" / "wiki.test.raw")
    tokenizer = AutoTokenizer.from_pretrained(test_data / "gpt2_tokenizer")
    assert len(tokenizer(text, verbose=False)["input_ids"]) == 287_644


def test_stride_is_half_of_the_window(model, run_here, tmp_path):
    run_here(RECIPE, model, *WIKITEXT, "--window", 16)
    half = read(tmp_path)
    run_here(RECIPE, model, *WIKITEXT, "--window", 16, "--stride", 8)
    assert read(tmp_path) == half


def test_resume_keeps_finished_measurements(model, run_here, tmp_path):
    run_here(RECIPE, model, *WIKITEXT, "--window", 16)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    results["scores"][0]["perplexity"] = 99.0
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    assert "99.00" in run_here(RECIPE, model, *WIKITEXT, "--window", 16, "--resume")
    fails = "other settings (window 16 before and 12 now"
    run_here(RECIPE, model, *WIKITEXT, "--window", 12, "--resume", fails=fails)


def test_resume_recognises_model_and_text_by_their_content(model, run_here, tmp_path):
    flags = (RECIPE, model, *WIKITEXT, "--window", 16)
    run_here(*flags)
    (tmp_path / "wiki.raw").write_text("a bed\n" * 9, encoding="utf-8")
    run_here(*flags, "--resume", fails="was measured with other inputs (text ")
    run_here(*flags)
    other = AutoModelForCausalLM.from_pretrained(model)
    other.init_weights()
    with torch.no_grad():
        other.transformer.wpe.weight.mul_(2)
    other.save_pretrained(model)
    run_here(*flags, "--resume", fails="was measured with other inputs (weights ")


def test_weights_are_float32_whatever_their_saved_dtype(model, run_here, tmp_path):
    torch.manual_seed(1)
    coarse = AutoModelForCausalLM.from_pretrained(model).bfloat16()
    coarse.save_pretrained(model)
    run_here(RECIPE, model, *WIKITEXT, "--window", 16)
    (measured,) = read(tmp_path)
    coarse.float().save_pretrained(model)
    run_here(RECIPE, model, *WIKITEXT, "--window", 16)
    (exact,) = read(tmp_path)
    assert measured["loss"] == pytest.approx(exact["loss"], abs=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--wikitext wiki.raw: 0 tokens are too few"),
        ("a", "1 tokens are too few"),
        ("a xyz", "characters unknown to the model: 'x', 'y', 'z'; leave"),
    ],
)
def test_texts_that_cannot_be_evaluated_are_errors(model, run_here, tmp_path, text, message):
    (tmp_path / "wiki.raw").write_text(text, encoding="utf-8")
    run_here(RECIPE, model, *WIKITEXT, "--window", 16, fails=message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--window", 17), "pass --window 16 or less"),
        (("--window", 1), "--window 1: pass 2 or more"),
        (("--window", 16, "--stride", 16), "--stride 16: pass a number from 1 to 15"),
        (("--window", 16, "--stride", 0), "--stride 0: pass a number from 1 to 15"),
        (("--window", 16, "--wikitext", "no.raw"), "--wikitext no.raw: there is no such file"),
        (("--window", 16, "--tasks", "piqa"), "invalid choice: 'piqa'"),
    ],
)
def test_wrong_arguments(model, run_here, flags, message):
    run_here(RECIPE, model, *WIKITEXT, *flags, fails=message)


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is not None, reason="the harness is installed"
)
def test_lambada_without_the_harness(model, run_here):
    run_here(RECIPE, model, fails="needs lm-evaluation-harness: pip install")


@needs_harness
@pytest.mark.parametrize("line", ["no json", '{"passage": "a b"}', '{"text": "alone"}'])
def test_lambada_in_another_format_is_an_error(model, run_here, tmp_path, line):
    lines = f'{{"text": "bad cab"}}\n{line}\n'
    (tmp_path / "lambada.jsonl").write_text(lines, encoding="utf-8")
    flags = ("--tasks", "lambada", "--lambada", "lambada.jsonl", "--window", 16)
    run_here(RECIPE, model, *flags, fails="--lambada lambada.jsonl: line 2 is no")


@needs_harness
@torch.no_grad()
def test_lambada_is_the_last_word_of_each_passage(test_data, run_here, tmp_path):
    """The passages have different lengths. They come from a story that the model can continue."""
    folder = test_data / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = torch.tensor(
        [[1, *tokenizer("Once upon a time", add_special_tokens=False)["input_ids"]]]
    )
    story = tokenizer.decode(model.generate(start, max_new_tokens=120, do_sample=False)[0, 1:])
    words = story.split(" ")
    passages = [" ".join(words[: 8 + 3 * i]).strip() for i in range(12)]
    with (test_data / "lambada" / "lambada_test.jsonl").open(encoding="utf-8") as lines:
        passages += [json.loads(next(lines))["text"] for _ in range(12)]
    (tmp_path / "passages.jsonl").write_text(
        "".join(json.dumps({"text": passage}) + "\n" for passage in passages), encoding="utf-8"
    )
    run_here(
        *(RECIPE, folder, "--tasks", "lambada", "--lambada", "passages.jsonl"),
        *("--window", 512, "--results", "results.json"),
    )

    right, losses = [], []
    for passage in passages:
        before = len(tokenizer(passage.rsplit(" ", 1)[0])["input_ids"])
        ids = torch.tensor(tokenizer(passage)["input_ids"])
        logits = model(ids[None]).logits[0, before - 1 : -1]
        right.append(bool((logits.argmax(-1) == ids[before:]).all()))
        losses.append(
            torch.nn.functional.cross_entropy(logits, ids[before:], reduction="sum").item()
        )
    assert any(right)
    assert not all(right)
    (score,) = read(tmp_path)
    assert score["passages"] == len(passages)
    assert score["accuracy"] == pytest.approx(sum(right) / len(right))
    assert score["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


@pytest.mark.compat
@pytest.mark.slow
def test_with_the_harness(tmp_path):
    """Runs the tests above that need the harness, in an environment that has it."""
    venv.create(tmp_path, with_pip=False, symlinks=True)
    python = str(tmp_path / "bin" / "python")
    (packages,) = tmp_path.glob("lib/python*/site-packages")
    paths = [*site.getsitepackages(), str(REPOSITORY)]
    (packages / "this_environment.pth").write_text("\n".join(paths))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    constraints = REPOSITORY / "constraints.txt"
    subprocess.run([*pip, "--constraint", str(constraints), "lm_eval"], check=True)
    finished = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "lambada", Path(__file__)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-10_000:]
    assert "4 passed, 1 skipped" in finished.stdout
