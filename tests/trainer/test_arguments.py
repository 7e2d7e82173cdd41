"""The recipes' command line: what it sets for Trainer, and a device's peak."""

import sys
from dataclasses import dataclass

import pytest

from striped_hf.trainer.arguments import RecipeArguments, parse_arguments


@dataclass
class Options:
    block_size: int = 8


def parse(monkeypatch, tmp_path, *flags: str) -> tuple[Options, RecipeArguments]:
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--output_dir", str(tmp_path), *flags])
    return parse_arguments(Options, {"optim": "striped_adamw"})


def test_a_peak_for_a_device_that_is_not_in_the_table(monkeypatch, tmp_path):
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
def test_wrong_values_are_one_line(monkeypatch, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        parse(monkeypatch, tmp_path, *flags)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_no_step_is_to_wait_for_a_device(monkeypatch, tmp_path):
    _, args = parse(monkeypatch, tmp_path)
    assert not args.logging_nan_inf_filter
    # pages that are pinned can be copied meanwhile
    assert args.accelerator_config.non_blocking == args.dataloader_pin_memory
