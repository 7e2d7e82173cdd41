"""README.md, docs/ and the other pages: their tables, figures, links, examples and commands."""

import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from tiny import QUIET

from benchmarks import render_tables
from benchmarks.loss_tables import best_rate, mean, runs_by_rate
from recipes.compare_optimizers import groups

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = {
    page.relative_to(REPOSITORY).as_posix(): page.read_text(encoding="utf-8")
    for page in render_tables.pages()
}

FEW = ("--max_steps", "2", "--eval_steps", "1", "--save_steps", "1", "--logging_steps", "1", *QUIET)
# flags that make each script's command small; the rest of the command is the page's
SMALL = {
    "train_shakespeare_char.py": (*FEW, "--n_layer", "1", "--n_head", "2", "--n_embd", "32"),
    "finetune_shakespeare.py": (*FEW, "--gradient_accumulation_steps", "1"),
    "openwebtext.py": ("--data_files", "novels.parquet", "--num_proc", "1"),
    "compare_optimizers.py": (*FEW, "--n_layer", "1"),
    "sample.py": ("--max_new_tokens", "5"),
    "plan_memory.py": ("--context", "32"),
    "eval_baselines.py": ("--max_blocks", "2", "--results", "baselines.json"),
    "eval_zero_shot.py": (
        *("--results", "zero_shot.json", "--tasks", "wikitext"),
        # the harness is an extra
        *(["lambada"] if importlib.util.find_spec("lm_eval") else []),
    ),
    "benchmarks.losses": ("--trial", "--optimizers", "adamw", "--results", "losses.json"),
    "benchmarks.optimizers": (
        *("--optimizers", "striped_int8", "--block_size", "32", "--results", "memory.json"),
    ),
    "benchmarks.training_step": (
        *("--rounds", "1", "--steps", "2", "--variants", "recipe", "--results", "step.json"),
    ),
}
# the examples use model, dataset and trainer without defining them
GIVEN = """
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from striped_hf.data import ContiguousBlocks, open_split
model = AutoModelForCausalLM.from_pretrained({model!r})
blocks = ContiguousBlocks(open_split({data!r}, "val"), 32)
dataset = [{{k: v for k, v in blocks[i].items() if k != "shift_labels"}} for i in (0, 1)]
trainer = Trainer(model, TrainingArguments("out", logging_steps=1), train_dataset=dataset)
"""
# assertions that run after the examples of a page
THEN = {
    "README.md": "assert optimizer.param_groups[0]['momentum_dtype'] == 'int8'",
    "docs/index.md": "assert args.optim == 'striped_adamw_8bit'",
    "docs/usage.md": "assert [group['weight_decay'] > 0 for group in optimizer.param_groups] == "
    "[True, False]",
    "docs/least_memory.md": "assert float(norm) > 0",
    "docs/watching.md": "trainer.train()\n"
    "assert any('grad_norm_mean' in entry for entry in trainer.state.log_history)",
}


def results(name: str) -> dict[str, Any]:
    path = REPOSITORY / "benchmarks" / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def words(page: str) -> str:
    """A page's text in one line, without list marks."""
    return " ".join(PAGES[page].split())


def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 250


def test_tables_match_the_results_files():
    texts = {REPOSITORY / page: text for page, text in PAGES.items()}
    for page, text in render_tables.render(texts).items():
        assert text == texts[page], page


@pytest.mark.parametrize("change", ["missing", "twice", "unknown"])
def test_each_table_has_one_place(change: str):
    texts = {REPOSITORY / page: text for page, text in PAGES.items()}
    readme = REPOSITORY / "README.md"
    place = re.search(
        r"<!-- begin short_losses -->.*?<!-- end short_losses -->", texts[readme], re.S
    )
    assert place is not None
    texts[readme] = {
        "missing": texts[readme].replace(place[0], ""),
        "twice": texts[readme] + place[0],
        "unknown": texts[readme] + "<!-- begin other -->\n<!-- end other -->",
    }[change]
    with pytest.raises(ValueError, match="one each"):
        render_tables.render(texts)


def test_the_table_of_a_run_that_was_cut_off_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cut_off = {**results("training_step_cpu_cpu"), "complete": False}
    name = "training_step_gpt2_cuda"
    (tmp_path / f"{name}.json").write_text(json.dumps(cut_off), encoding="utf-8")
    monkeypatch.setattr(render_tables, "RESULTS", tmp_path)
    place = render_tables.render_place(name, REPOSITORY / "docs")
    assert "| bare loop |" in place
    assert "The run was cut off before its end." in place


def spread(values: list[float], digits: int = 3) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def mean_losses(comparison: dict[str, Any]) -> dict[str, dict[tuple[str, float], float]]:
    """Returns the mean losses of compare_optimizers.py over the seeds, by (kind, learning rate)."""
    means: dict[str, dict[tuple[str, float], float]] = {}
    for (name, rate), runs in groups(comparison).items():
        for kind in ("train_loss", "eval_loss"):
            losses = [run[kind] for run in runs]
            means.setdefault(name, {})[kind, rate] = sum(losses) / len(losses)
    return means


def test_losses_in_the_readme_match_the_results_file():
    char, finetune = results("losses_char"), results("losses_finetune")

    def loss(task: dict[str, Any], name: str, kind: str, rate: float | None = None) -> float:
        rates = runs_by_rate(task, name)
        rate = rate or best_rate(rates)
        assert rate is not None
        value = mean(rates[rate], kind)
        assert value is not None
        return value

    def behind(name: str, kind: str = "val_loss", task: dict[str, Any] = char) -> float:
        return loss(task, name, kind) - loss(task, "adamw", kind)

    readme = words("README.md")
    assert (
        f"its validation loss is {behind('striped_int8', task=finetune):.4f} higher than AdamW's "
        f"with 8-bit momentum, and {behind('striped_int4', task=finetune):.4f} higher with 4-bit"
    ) in readme
    assert (
        f"it is {behind('striped_int8'):.3f} higher with 8 bits, and "
        f"{-behind('striped_int4'):.4f} lower with 4 bits"
    ) in readme
    rate = best_rate(runs_by_rate(finetune, "adamw"))
    assert best_rate(runs_by_rate(finetune, "striped_int4")) == rate / 2
    train, val = (
        loss(finetune, "striped_int4", kind, rate) - loss(finetune, "adamw", kind)
        for kind in ("train_loss", "val_loss")
    )
    assert f"{train:.4f} behind in training loss and {val:.4f} in validation loss" in readme
    costs = [behind("striped_float32", kind) for kind in ("train_loss", "val_loss")]
    assert f"costs {max(costs):.3f}." in readme
    above = {
        (name, kind, of): behind(name, kind, task)
        for name in ("striped_int8", "striped_int4")
        for kind in ("train_loss", "val_loss")
        for of, task in (("char", char), ("finetune", finetune))
    }
    missed = above.pop(("striped_int4", "train_loss", "finetune"))
    assert f"the training loss of the finetuning, {missed:.3f}." in readme
    for (name, kind, of), difference in above.items():
        is_reached = difference <= (0.005 if name == "striped_int8" else 0.010)
        assert is_reached == ((name, of) != ("striped_int8", "char")), (name, kind, of)
    assert behind("torchao_adamw4bit") < 0
    lower, higher = -behind("muon"), behind("muon", task=finetune)
    assert f"{lower:.3f} lower from scratch, and {higher:.3f} higher when finetuning" in readme
    adafactor = "adafactor8bit_adafactor"
    for task, times in ((char, 16), (finetune, 4)):
        best = [best_rate(runs_by_rate(task, name)) for name in (adafactor, "adamw")]
        assert best[0] == times * best[1]
        assert behind(adafactor, "train_loss", task) < 0
    higher, lower = behind(adafactor), -behind(adafactor, task=finetune)
    assert f"{higher:.3f} higher and {lower:.3f} lower than AdamW's" in readme
    assert "is between AdamW and `striped_int8`" in readme
    for name in ("bitsandbytes_adamw8bit", "torchao_adamw8bit"):
        assert 0 < behind(name) < behind("striped_int8"), name


def test_losses_in_the_text_match_the_results_files():
    comparison = results("shakespeare_char_cpu_quality")
    means = mean_losses(comparison)

    def behind(kind: str, names: tuple[str, ...], other: str) -> list[float]:
        return [
            loss - means[other][column]
            for name in names
            for column, loss in means[name].items()
            if column[0] == kind
        ]

    ours, adamw = ("striped_adamw", "striped_adamw_8bit"), "adamw_torch_fused"
    val, train = (behind(kind, ours, adamw) for kind in ("eval_loss", "train_loss"))
    benchmarks = words("docs/benchmarks.md")
    assert f"validation loss is {spread(val)} higher" in benchmarks
    assert f"mean training loss {spread(train)} higher" in benchmarks

    losses = {key: {run["seed"]: run for run in runs} for key, runs in groups(comparison).items()}
    pairs = [
        run["train_loss"] - losses[adamw, rate][seed]["train_loss"]
        for (name, rate), runs in losses.items()
        if name in ours
        for seed, run in runs.items()
    ]
    assert f"from {-min(pairs):.3f} lower to {max(pairs):.3f} higher" in benchmarks

    def listed(name: str) -> str:
        a, b, c = (f"{loss:.3f}" for loss in behind("eval_loss", (name,), "striped_adamw"))
        return f"{a}, {b} and {c}"

    assert (
        f"8 bits changed the mean validation loss by {listed('striped_adamw_8bit')}" in benchmarks
    )
    assert f"4 bits by {listed('striped_adamw_4bit')}" in benchmarks
    assert f"`lagged=true` by {listed('striped_adamw (lagged=true)')}" in benchmarks

    sweep = mean_losses(results("shakespeare_char_cpu_sweep"))
    column = ("train_loss", 0.004)
    difference = f"{sweep['striped_adamw_8bit'][column] - sweep[adamw][column]:.3f}"
    assert f"with 8 bits at rate 0.004 is {difference} higher than AdamW's" in benchmarks

    history = results("finetune_stories260k")["runs"][0]["history"]
    assert history["eval_steps"][0] == 0
    assert f"begins at {history['eval_losses'][0]:.2f}" in benchmarks


def test_planned_memory_in_the_text_matches_the_results_file():
    planned = {
        (model["name"], row["optim"]): f"{sum(row['bytes'].values()) / 2**30:.1f}"
        for model in results("memory_plans")["models"]
        for row in model["rows"]
        if row["dtype"] == "bfloat16" and not model["chunked_loss"]
    }
    in_chunks = next(
        f"{sum(row['bytes'].values()) / 2**30:.1f}"
        for model in results("memory_plans")["models"]
        for row in model["rows"]
        if (model["name"], row["optim"]) == ("llama-8b", "striped_adamw_4bit_layerwise")
        and model["chunked_loss"]
    )
    assert f"Llama-3.1 8B then takes {in_chunks} GiB" in words("docs/least_memory.md")
    readme, page = words("README.md"), PAGES["docs/least_memory.md"]
    seven, eight = (
        planned[name, "striped_adamw_4bit_layerwise"] for name in ("llama-2-7b", "llama-8b")
    )
    assert f"Llama-2 7B are then finetuned in {seven} GiB" in readme
    assert f"Llama-3.1 8B in {eight} GiB" in readme
    columns = (
        "striped_adamw_8bit",
        "striped_adamw_8bit_layerwise",
        "striped_adamw_4bit_layerwise",
        "adamw_torch_fused",  # of adapters
    )
    for title, name in (("Llama-2 7B", "llama-2-7b"), ("Llama-3.1 8B", "llama-8b")):
        cells = " | ".join(planned[name, optim] for optim in columns)
        assert f"| {title} | {cells} |" in page


def test_live_bytes_in_the_text_match_the_results_file():
    found = results("live_bytes_gpt2")
    rows = {row["optim"]: row["bytes"] for row in found["rows"] if row["passes"] == 1}
    eight, four = (rows[f"striped_adamw_{bits}bit_layerwise"] for bits in (8, 4))
    kept = [f"{row['kept'] / found['parameters']:.2f}" for row in (eight, four)]
    text = words("docs/least_memory.md")
    assert f"{kept[0]} bytes per parameter with `striped_adamw_8bit_layerwise`" in text
    assert f"and {kept[1]} with `striped_adamw_4bit_layerwise`" in text
    assert f"took {eight['gradients'] / found['parameters']:.2f}, those of the tied" in text


def test_times_and_memory_in_the_text_match_the_results_files():
    one_die, two_dies = (
        {row["name"]: row.get("step_ms") for row in results(name)["optimizers"]}
        for name in (render_tables.ONE_DIE, render_tables.TWO_DIES)
    )
    less = {name: 1 - ms / one_die[name] for name, ms in two_dies.items()}
    adamw = less.pop("adamw_fused")
    text = words("docs/benchmarks.md")
    assert f"takes {adamw:.0%} less time than on one die" in text
    least, most = (f"{share:.0%}" for share in (min(less.values()), max(less.values())))
    assert f"The striped steps take {least.removesuffix('%')} to {most} less" in text

    scale = results("memory_gpt2_xl_cpu")
    gathered = scale["gathered"]

    def saved_gib(state: int) -> str:
        whole = scale["weights"] + scale["gradients"] + state
        return f"{(whole - whole / 2 - gathered) / 2**30:.1f}"

    saved = {row["name"]: saved_gib(row["state"]) for row in scale["optimizers"]}
    assert (
        f"saves {saved['striped_int8']} GiB per device with 8-bit StripedAdamW, and "
        f"{saved['adamw_fused']} GiB with AdamW." in words("docs/distributed.md")
    )
    small = next(m for m in results("state_bytes")["models"] if m["name"] == "gpt2")
    gib = (8 * small["parameters"] + small["adamw"]) / 2**30
    assert f"gradients and state are {gib:.1f} GiB" in words("docs/distributed.md")


def slugs(text: str) -> set[str]:
    """The anchors of a page's headings."""
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", prose, flags=re.M)
    }


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (REPOSITORY / page).parent / path if path else REPOSITORY / page
        assert file.is_file(), f"{page}: {target}"
        if anchor:
            assert anchor in slugs(file.read_text(encoding="utf-8")), f"{page}: {target}"


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page, also those inside lists."""
    found = re.finditer(rf"^( *)```{language}\n(.*?)^\1```", PAGES[page], flags=re.S | re.M)
    return [textwrap.dedent(match[2]) for match in found]


def test_every_page_with_examples_is_run():
    assert {page for page in PAGES if blocks(page, "python")} == set(THEN)


@pytest.mark.parametrize("page", THEN)
def test_python_examples_run(page: str, tiny_run: Path, docs_data: Path, tmp_path: Path):
    """The examples of a page, one after another."""
    given = GIVEN.format(model=str(tiny_run), data=str(docs_data))
    run = subprocess.run(
        [sys.executable, "-c", "\n".join((given, *blocks(page, "python"), THEN[page]))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stderr


def commands() -> list[str]:
    """Every command of every page once, in the order of the pages."""
    lines = [
        line
        for page in PAGES
        for block in blocks(page, "bash")
        for line in block.replace("\\\n", " ").splitlines()
        if line and not line.startswith("#")
    ]
    first: dict[str, str] = {}
    for line in lines:
        first.setdefault(" ".join(line.partition("#")[0].split()), line)
    return list(first.values())


def of_the_repository(word: str) -> bool:
    return word.startswith(("recipes/", "data_scripts/", "benchmarks/", "benchmarks."))


@pytest.mark.slow
def test_commands_run(test_data: Path, tmp_path: Path):
    """Every command, in order, in a reader's working folder.

    Commands that need a GPU, a network or an installation are not run: the tests of the scripts
    cover them. --input replaces downloads of data, but not of what "network: ..." names.
    """
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):", makefile, flags=re.M)
    for name in ("benchmarks", "recipes", "data_scripts"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "stories260K").symlink_to(test_data / "stories260K")
    (tmp_path / "novels.parquet").symlink_to(test_data / "novels" / "val.parquet")
    for path in ("wikitext-2-raw/wiki.test.raw", "lambada/lambada_test.jsonl"):
        with (test_data / path).open(encoding="utf-8") as lines:
            text = "".join(itertools.islice(lines, 20))
        (tmp_path / Path(path).name).write_text(text, encoding="utf-8")
    ran = set()
    for line in commands():
        command, _, needs = line.partition("#")
        words = shlex.split(command)
        if words[0] == "make":  # the demo, the tests themselves, and installations
            assert words[1] in targets, line
            continue
        scripts = [word for word in words if of_the_repository(word)]
        for word in scripts:
            path = word if "/" in word else f"{word.replace('.', '/')}.py"
            assert (REPOSITORY / path).is_file(), line
        prepares_data = bool(scripts) and scripts[0].startswith("data_scripts/")
        if re.search("GPU|installs|network:", needs) or ("network" in needs and not prepares_data):
            continue
        assert scripts, f"{line}: is not a command of this repository and has no mark"
        script = next(word.rpartition("/")[2] for word in scripts if not word.endswith(".yaml"))
        if script == "benchmarks.render_tables":
            continue  # it would write into the repository; the test of the tables runs it
        if words[:2] == ["accelerate", "launch"]:
            words[:2] = ["python", "-m", "accelerate.commands.launch"]
        assert words[0] == "python", line
        if script.startswith("shakespeare"):
            words += ["--input", str(test_data / "tinyshakespeare" / "input.txt")]
        finished = subprocess.run(
            [sys.executable, *words[1:], *SMALL.get(script, ())],
            cwd=tmp_path,
            env={**os.environ, "TIKTOKEN_CACHE_DIR": str(test_data / "tiktoken_cache")},
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert finished.returncode == 0, line + finished.stdout + finished.stderr
        ran.add(script)
    assert ran >= {*SMALL, "shakespeare_char.py", "shakespeare.py", "python_docs.py"}
