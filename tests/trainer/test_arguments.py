"""The recipes' command line: Trainer's settings, and a device's peak."""

import sys
from dataclasses import dataclass

import pytest

from striped_hf.trainer.arguments import RecipeArguments, parse_arguments


@dataclass
class Options:
    block_size: int = 8


def parse(monkeypatch, tmp_path, *flags: str) -> tuple[Options, RecipeArguments]:
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--output_dir", str(tmp_path), *flags])
    return parse_arguments(Options, {"optim": "striped_adamw", "max_steps": 10})


def test_peak_tflops_gives_the_peak_of_a_device_outside_the_table(monkeypatch, tmp_path):
    assert parse(monkeypatch, tmp_path)[1].peak_tflops is None
    options, args = parse(monkeypatch, tmp_path, "--peak_tflops", "0.5", "--block_size", "4")
    assert (args.peak_tflops, options.block_size) == (0.5, 4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--peak_tflops", "0"), "--peak_tflops 0.0: must be positive"),
        (("--bf16", "--fp16"), "At most one of fp16 and bf16"),
    ],
)
def test_wrong_values_end_with_one_line(monkeypatch, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        parse(monkeypatch, tmp_path, *flags)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max_steps", "0"), "--max_steps 0: pass a number above 0; the recipes count steps"),
        (("--max_steps", "-1", "--num_train_epochs", "1"), "--max_steps -1: pass a number above 0"),
        (("--per_device_train_batch_size", "0"), "--per_device_train_batch_size 0: pass"),
        (("--block_size", "-8"), "--block_size -8: pass a number above 0"),
        (("--lr_scheduler_type", "cosin"), "cosin"),
        (("--lr_scheduler_type", "warmup_stable_decay"), "num_decay_steps"),
        (("--lr_scheduler_kwargs", '{"min_lr": 1, "x": 2}'), "the schedule takes other arguments"),
        (("--resume_from_checkpoint", "True"), "--resume_from_checkpoint True: "),
        (("--resume_from_checkpoint", "no"), "there is no such folder"),
    ],
)
def test_mistakes_end_with_one_line(monkeypatch, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        parse_with_schedule(monkeypatch, tmp_path, *flags)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def parse_with_schedule(monkeypatch, tmp_path, *flags):
    defaults = {
        "optim": "striped_adamw",
        "max_steps": 10,
        "lr_scheduler_type": "cosine_warmup_with_min_lr",
        "lr_scheduler_kwargs": '{"min_lr_rate": 0.1}',
    }
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--output_dir", str(tmp_path), *flags])
    return parse_arguments(Options, defaults)[1]


@pytest.mark.parametrize(
    "name",
    [
        *("cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"),
        *("cosine_with_restarts", "reduce_lr_on_plateau"),
    ],
)
def test_another_schedule_does_not_get_the_default_arguments(monkeypatch, tmp_path, name):
    args = parse_with_schedule(monkeypatch, tmp_path, "--lr_scheduler_type", name)
    assert not args.lr_scheduler_kwargs


def test_arguments_of_a_schedule_are_kept(monkeypatch, tmp_path):
    args = parse_with_schedule(monkeypatch, tmp_path)
    assert args.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    same = ("--lr_scheduler_type", "cosine_warmup_with_min_lr")
    assert parse_with_schedule(monkeypatch, tmp_path, *same).lr_scheduler_kwargs == {
        "min_lr_rate": 0.1
    }
    decay = '{"num_decay_steps": 4}'
    flags = ("--lr_scheduler_type", "warmup_stable_decay", "--lr_scheduler_kwargs", decay)
    args = parse_with_schedule(monkeypatch, tmp_path, *flags)
    assert args.lr_scheduler_kwargs == {"num_decay_steps": 4}


def test_the_defaults_do_not_make_a_step_wait_for_a_device(monkeypatch, tmp_path):
    _, args = parse(monkeypatch, tmp_path)
    assert not args.logging_nan_inf_filter
    # pinned memory can be copied during the step
    assert args.accelerator_config.non_blocking == args.dataloader_pin_memory
