"""The optimizer names in transformers, also in a version with unexpected internals."""

import importlib
import inspect
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from fresh_process import python
from trainer_runs import (
    LAYERWISE,
    NAMES,
    arguments,
)
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import striped_hf
from striped_hf import StripedAdamW
from striped_hf.trainer import registration


@pytest.mark.slow
def test_a_fresh_process_knows_the_names_by_import_alone(tmp_path: Path) -> None:
    """It accepts them on a command line, as an argument, and in a pickle from another process."""
    script = """
        import sys
        import striped_hf, torch
        from transformers import HfArgumentParser, TrainingArguments

        (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
            ["--output_dir", "out", "--use_cpu", "--optim", sys.argv[1]]
        )
        assert args.optim == TrainingArguments("out", optim=sys.argv[1], use_cpu=True).optim
        torch.save(args, sys.argv[2])
    """
    file = tmp_path / "training_args.bin"
    python(script, "striped_adamw_8bit", file)
    read = """
        import sys
        import striped_hf
        import torch

        args = torch.load(sys.argv[1], weights_only=False)
        from transformers.training_args import OptimizerNames
        assert args.optim is OptimizerNames.STRIPED_ADAMW_8BIT, args.optim
        assert args.to_dict()["optim"] == "striped_adamw_8bit"
    """
    python(read, file)


@pytest.mark.parametrize("name", [*NAMES, *LAYERWISE])
def test_a_name_is_an_ordinary_enum_member(name: str) -> None:
    member = OptimizerNames(name)
    assert member is OptimizerNames[name.upper()] is getattr(OptimizerNames, name.upper())
    assert member is TrainingArguments("out", optim=name, use_cpu=True).optim
    assert (member.name, member.value, str(member)) == (
        name.upper(),
        name,
        str(OptimizerNames.ADAFACTOR).replace("ADAFACTOR", name.upper()).replace("adafactor", name),
    )
    assert list(OptimizerNames).count(member) == 1
    assert member in OptimizerNames
    assert pickle.loads(pickle.dumps(member)) is member
    with pytest.raises(AttributeError):
        setattr(OptimizerNames, name.upper(), "another")


def test_the_parser_offers_the_names_and_refuses_others(capsys: pytest.CaptureFixture[str]) -> None:
    parser = HfArgumentParser(TrainingArguments)
    for name in (*NAMES, *LAYERWISE):
        assert name in parser.format_help()
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--output_dir", "out", "--optim", "striped_adam"])
    assert "'striped_adamw'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="striped_adamw_8bit"):  # in the list of choices
        TrainingArguments("out", optim="striped_adam")


def test_registering_again_changes_nothing() -> None:
    members = list(OptimizerNames)
    args = arguments("out", optim="striped_adamw_4bit")
    for _ in range(2):
        importlib.reload(registration)
        importlib.reload(striped_hf)
    assert list(OptimizerNames) == members
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    assert (cls, kwargs["momentum_dtype"]) == (StripedAdamW, "int4")
    # one wrapper, not one in another
    for method in (Trainer.get_optimizer_cls_and_kwargs, Trainer.create_optimizer):
        assert not hasattr(inspect.unwrap(method), "_striped_hf_wraps")
        assert inspect.unwrap(method) is method.__wrapped__


def test_other_names_are_unchanged() -> None:
    cls, _ = Trainer.get_optimizer_cls_and_kwargs(arguments("out", optim="adamw_torch"))
    assert cls is torch.optim.AdamW


def other_pythons() -> list[str]:
    names = ["python3.10", "python3.11", "python3.12", "python3.13", "python3.14"]
    found = [path for name in names if (path := shutil.which(name)) and "shims" not in path]
    # Pythons of pyenv need not be on the path
    return found + list(map(str, Path.home().glob(".pyenv/versions/3.1[0-9]*/bin/python")))


def test_members_are_added_in_every_python() -> None:
    """The internals of enums differ between versions."""
    script = """
        import copy, pickle
        from enum import Enum, EnumMeta

        class Names(str, Enum):
            ADAM = "adam"

        for _ in range(2):
            _add_member(Names, "STRIPED", "striped")
        member = Names.STRIPED
        assert member is Names("striped") is Names["STRIPED"] is pickle.loads(pickle.dumps(member))
        assert copy.deepcopy(member) is member in Names
        assert list(Names) == [Names.ADAM, member] == list(reversed(Names))[::-1]
        assert repr(member) == "<Names.STRIPED: 'striped'>" and "STRIPED" in Names.__members__
        assert member == "striped" and {"striped": 1}[member] == 1 and "STRIPED" in dir(Names)
        if hasattr(Names, "_hashable_values_"):
            assert "striped" in Names
    """
    source = "from typing import Any\nfrom enum import EnumMeta\n"
    source += inspect.getsource(registration._add_member) + textwrap.dedent(script)
    for interpreter in (sys.executable, *other_pythons()):
        subprocess.run([interpreter, "-c", source], check=True)


# an unexpected version of transformers


CHANGED_INTERNALS = {
    "the method is gone": "del Trainer.get_optimizer_cls_and_kwargs",
    "the enum's list is a tuple": "type.__setattr__(names, '_member_names_', (*list(names),))",
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGED_INTERNALS)
def test_with_changed_internals_the_public_interface_still_works(
    change: str, tmp_path: Path
) -> None:
    script = f"""
        import sys, warnings
        from transformers import Trainer, TrainingArguments
        from transformers.training_args import OptimizerNames as names

        {CHANGED_INTERNALS[change]}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import striped_hf
        messages = [str(w.message) for w in caught if "striped_adamw" in str(w.message)]
        assert len(messages) == 1 and "optimizer_cls_and_kwargs(args, model)" in messages[0], caught

        from striped_hf.trainer.optimizer_kwargs import OPTIMIZERS
        assert len(OPTIMIZERS) == 6
        for name in OPTIMIZERS:
            try:
                TrainingArguments(sys.argv[1], optim=name)
            except ValueError as error:
                assert str(error) == messages[0], error
            else:
                raise SystemExit(name + " was accepted")
        try:
            TrainingArguments(sys.argv[1], optim="nonsense")
        except ValueError as error:
            assert "optimizer_cls_and_kwargs" not in str(error)

        from trainer_runs import Counting, arguments, losses, optimizer_of, tiny_model
        model, args = tiny_model("gpt2"), arguments(sys.argv[1], max_steps=3)
        trainer = Trainer(
            model,
            args,
            train_dataset=Counting(),
            optimizer_cls_and_kwargs=striped_hf.optimizer_cls_and_kwargs(args, model),
        )
        trainer.train()
        assert type(optimizer_of(trainer)) is striped_hf.StripedAdamW
        assert losses(trainer)[-1] < losses(trainer)[0]
    """
    python(script, tmp_path)


@pytest.mark.slow
def test_without_the_enum_there_is_one_warning() -> None:
    script = """
        import warnings
        from transformers import training_args
        import transformers.trainer

        del training_args.OptimizerNames
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import striped_hf
        assert sum("optimizer_cls_and_kwargs" in str(w.message) for w in caught) == 1
        striped_hf.StripedAdamW
    """
    python(script)
