"""Resuming a checkpoint, and refusing other runs and incomplete or damaged checkpoints."""

import json
import multiprocessing
import resource
import shutil

import pytest
import torch
from tiny import QUIET, STEPS, TINY, read_run
from transformers import AutoTokenizer

from striped_hf.cli import UserError
from striped_hf.data.characters import character_tokenizer
from striped_hf.differences import differences
from striped_hf.locking import lock_folder
from striped_hf.trainer.resuming import IDENTITY, check_whole, last_checkpoint

RECIPE = "recipes/train_shakespeare_char.py"
pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tiny_run, tmp_path):
    """A run's folder with two checkpoints."""
    for step in (10, 20):
        name = f"checkpoint-{step}"
        shutil.copytree(tiny_run / name, tmp_path / "run" / name)
    return tmp_path / "run"


@pytest.fixture
def flags(docs_data):
    return (*TINY, *STEPS, *QUIET, "--data_dir", docs_data, "--output_dir", "run")


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (("--seed", 2), "seed 1337 before and 2 now"),
        (("--learning_rate", 1e-5), "learning_rate 0.004 before and 1e-05 now"),
        (("--per_device_train_batch_size", 24), "windows_per_step 12 before and 24 now"),
        (("--gradient_accumulation_steps", 2), "windows_per_step 12 before and 24 now"),
        (("--dropout", 0.1), "model.attn_pdrop 0.0 before and 0.1 now"),
        (("--lr_scheduler_type", "linear"), "lr_scheduler_type cosine_warmup_with_min_lr before"),
        (("--warmup_steps", 3), "warmup_steps 2"),
        (("--weight_decay", 0), "weight_decay 0.1 before and 0.0 now"),
    ],
)
def test_another_runs_checkpoint_is_an_error(folder, flags, run_here, other, named):
    last = ("--resume_from_checkpoint", "last")
    run_here(RECIPE, *flags, *last, *other, fails=f"checkpoint-20 belongs to another run ({named}")


def test_other_data_under_the_same_name_is_an_error(folder, docs_data, run_here, tmp_path):
    data = shutil.copytree(docs_data, tmp_path / "data")
    flags = (*TINY, *STEPS, *QUIET, "--data_dir", data, "--output_dir", "run")
    flags += ("--resume_from_checkpoint", folder / "checkpoint-10")
    # the same ids for other characters
    symbols = sorted(AutoTokenizer.from_pretrained(data).get_vocab())
    other = [*symbols[:-1], "\N{SNOWMAN}"]
    character_tokenizer("".join(other)).save_pretrained(data)
    run_here(RECIPE, *flags, fails="belongs to another run (data.vocabulary ")
    shutil.copy(docs_data / "tokenizer.json", data)
    with (data / "train.bin").open("r+b") as file:
        file.write(bytes(2))
    run_here(RECIPE, *flags, fails="belongs to another run (data.train ")


def test_a_run_continues_to_more_steps(folder, flags, run_here):
    more = ("--max_steps", 22, "--resume_from_checkpoint", "true")
    printed = run_here(RECIPE, *flags, *more)
    assert "its run had 20 steps, this run has 22" in printed
    run = read_run(folder)
    assert (run["steps"], run["tokens"], run["dtype"]) == (22, 22 * 12 * 32, "float32")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_partial_checkpoint_is_an_error(folder, name):
    checkpoint = folder / "checkpoint-20"
    (checkpoint / name).unlink()
    with pytest.raises(UserError, match=f"checkpoint-20 lacks {name}"):
        check_whole(checkpoint)


def test_a_runs_folder_is_not_a_checkpoint(tiny_run, folder, flags, run_here):
    for path in filter(lambda path: path.is_file(), tiny_run.iterdir()):
        shutil.copy(path, folder)
    given = ("--resume_from_checkpoint", folder)
    run_here(RECIPE, *flags, *given, fails="is a run's folder: pass its checkpoint, such as")
    run_here(RECIPE, *flags, "--resume_from_checkpoint", "no", fails="no such folder; pass a check")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("optimizer.pt", lambda content: content[:-100]),
        ("optimizer.pt", lambda content: b""),
        # one byte of a tensor
        (
            "optimizer.pt",
            lambda content: (
                content[: len(content) // 2]
                + bytes([content[len(content) // 2] ^ 255])
                + content[len(content) // 2 + 1 :]
            ),
        ),
        ("scheduler.pt", lambda content: content[: len(content) // 2]),
        ("model.safetensors", lambda content: content[:-1]),
        ("trainer_state.json", lambda content: content[:-5]),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(folder, capsys, name, damage):
    path = folder / "checkpoint-20" / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=rf"checkpoint-20/{name} is damaged .*: delete") as caught:
        check_whole(path.parent)
    assert "\n" not in str(caught.value)
    assert last_checkpoint(str(folder)) == folder / "checkpoint-10"
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{name} is damaged" in line
    assert line.endswith("checkpoint-10, the checkpoint before it")
    (folder / "checkpoint-10" / "optimizer.pt").unlink()
    with pytest.raises(UserError, match=r"checkpoint-10 lacks optimizer\.pt"):
        last_checkpoint(str(folder))


def test_a_checkpoint_of_save_only_model_continues_with_a_note(folder, flags, run_here):
    for name in ("checkpoint-10", "checkpoint-20"):
        path = folder / name / IDENTITY
        identity = json.loads(path.read_text())
        assert identity["save_only_model"] is False
        path.write_text(json.dumps(identity | {"save_only_model": True}))
        (folder / name / "optimizer.pt").unlink()
        (folder / name / "scheduler.pt").unlink()
    given = ("--resume_from_checkpoint", folder / "checkpoint-10", "--max_steps", 11)
    printed = run_here(RECIPE, *flags, *given)
    assert "was saved by --save_only_model: optimizer and schedule start anew" in printed


def test_a_new_run_replaces_an_earlier_one(folder, flags, run_here):
    (folder / "run.json").write_text("{}")
    few = ("--seed", 2, "--max_steps", 3, "--save_steps", 2, "--eval_steps", 2)
    printed = run_here(RECIPE, *flags, *few)
    assert "has an earlier run's checkpoints, up to checkpoint-20: this run's first" in printed
    found = {path.name for path in folder.glob("checkpoint-*")}
    assert found == {"checkpoint-2", "checkpoint-3"}
    assert read_run(folder)["seed"] == 2
    assert not [path for path in folder.iterdir() if path.name.startswith("_")]


def test_a_new_run_that_saves_nothing_keeps_the_earlier_one(folder, flags, run_here):
    run_here(RECIPE, *flags, "--n_head", 3, fails="no gpt2 model has this configuration")
    assert {path.name for path in folder.iterdir()} == {"checkpoint-10", "checkpoint-20"}


def hold(folder, ready):
    with lock_folder(folder):
        ready.set()
        multiprocessing.Event().wait()


def test_two_runs_cannot_use_one_folder(flags, run_here, tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "run", ready))
    process.start()
    assert ready.wait(60)
    run_here(RECIPE, *flags, fails=f"run is in use by process {process.pid} on ")
    process.kill()
    process.join()
    with lock_folder(tmp_path / "run"):  # a crash releases it
        pass


def test_a_folder_that_cannot_be_written_to_is_an_error_before_the_training(
    flags, run_here, tmp_path
):
    (tmp_path / "run").write_text("")  # a file in its place: not even root can write into it
    run_here(RECIPE, *flags, fails="--output_dir run cannot be written to")


# bytes: too few for the model, and for the optimizer
@pytest.mark.parametrize("limit", [20_000, 150_000])
def test_a_full_disk_ends_with_one_line(flags, run_here, tmp_path, limit):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        # float32: its state is larger than the model
        own = ("--max_steps", 2, "--save_steps", 1, "--eval_steps", 1, "--optim", "adamw_torch")
        run_here(RECIPE, *flags, *own, fails="make space there, or pass an --output_dir")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "run" / "_partial").exists()


def test_the_card_of_a_run_that_diverged_says_so(flags, run_here, tmp_path):
    own = ("--learning_rate", 1e30, "--warmup_steps", 0, "--max_grad_norm", 0)
    assert "val loss diverged" in run_here(RECIPE, *flags, *own, "--optim", "adamw_torch")
    run = read_run(tmp_path / "run")
    assert run["eval_loss"] is run["train_loss"] is run["eval_perplexity"] is None
    assert run["steps"] == 20
    assert "| validation loss | diverged |" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        ({"a": 1, "b": {"c": [1]}}, {"a": 1, "b": {"c": [1]}}, ""),
        ({"a": 1}, {"a": 2}, "a 1 before and 2 now"),
        ({"a": {"b": 1}}, {"a": {}}, "a.b 1 before and None now"),
        ({}, {"a": "x" * 99}, f"a None before and {'x' * 40}...{'x' * 15} now"),
        (dict.fromkeys("abcde", 0), dict.fromkeys("abcde", 1), ", and 2 more"),
        (None, {"a": 1}, "None before and {'a': 1} now"),
    ],
)
def test_differences_are_named(before, now, named):
    found = differences(before, now)
    assert found == named if not named.startswith(",") else found.endswith(named)


def test_memory_is_measured_where_python_has_no_resource(monkeypatch):
    """Windows has no ``resource``; psutil gives the peak."""
    from striped_hf.trainer import memory

    class Info:
        peak_wset = 5 << 20

    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setitem(__import__("sys").modules, "resource", None)
    monkeypatch.setattr("psutil.Process.memory_info", lambda self: Info, raising=True)
    assert memory.peak_memory_mib() == 5 or torch.cuda.is_available()
