"""The optimizer names in transformers: registration, arguments, param groups and failures."""

import copy
import importlib
import inspect
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trainer_runs import (
    NAMES,
    Counting,
    arguments,
    losses,
    optimizer_of,
    tiny_model,
    train,
)
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import striped_hf
from striped_hf import StripedAdamW, optimizer_cls_and_kwargs
from striped_hf.trainer import param_groups, registration


def python(script: str, *args: object) -> str:
    """Runs a script in a fresh process and returns its output."""
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, args)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout + finished.stderr


# the names


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


@pytest.mark.parametrize("name", NAMES)
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
    for name in NAMES:
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


# the arguments of the optimizer


def test_the_arguments_arrive_in_the_optimizer(tmp_path: Path) -> None:
    args = arguments(
        tmp_path,
        optim="striped_adamw_8bit",
        optim_args="momentum_dtype=bfloat16, backend=reference,nesterov=True,maximize=FALSE,"
        "stochastic_rounding=none,lagged=true",
        learning_rate=2e-3,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
        weight_decay=0.2,
    )
    optimizer = Trainer(tiny_model("gpt2"), args).create_optimizer()
    assert type(optimizer) is StripedAdamW
    assert optimizer.backend == "reference"
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (2e-3, (0.8, 0.95), 1e-6)
        assert group["momentum_dtype"] == "bfloat16"
        assert (group["nesterov"], group["maximize"]) == (True, False)
        assert (group["stochastic_rounding"], group["lagged"]) == (None, True)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.2, 0.0}


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), ("NONE", None)])
def test_booleans_are_not_strings(text: str, value: bool | None) -> None:
    args = arguments("out", optim="striped_adamw", optim_args=f"stochastic_rounding={text}")
    _, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    assert kwargs["stochastic_rounding"] is value


BAD_OPTIM_ARGS = {
    "momentum_dtype=int9": ("momentum_dtype='int9'", "float32, bfloat16, int8, int4"),
    "momentum_dtype=Int8": ("momentum_dtype='Int8'", "float32, bfloat16, int8, int4"),
    "backend=cuda": ("backend='cuda'", "reference"),
    "nesterov=1": ("nesterov='1'", "true, false"),
    "nesterov=none": ("nesterov='none'", "true, false"),
    "maximize=yes": ("maximize='yes'", "true, false"),
    "maximize=": ("maximize=''", "true, false"),
    "stochastic_rounding=maybe": ("stochastic_rounding='maybe'", "true, false, none"),
    "momentum=int8": ("'momentum'", "momentum_dtype, backend, maximize, nesterov"),
    "nesterov": ("'nesterov'", "key=value"),
    "nesterov=true,": ("''", "key=value"),
    "=true": ("''", "momentum_dtype, backend"),
    "nesterov=true,nesterov=false": ("nesterov twice", "once"),
    "blocks=(1,3)": ("blocks", "param group", "optimizer_cls_and_kwargs"),
    "lr=1e-3": ("lr", "TrainingArguments.learning_rate"),
    "learning_rate=1e-3": ("learning_rate", "TrainingArguments.learning_rate"),
    "betas=0.9": ("betas", "adam_beta1", "adam_beta2"),
    "beta2=0.9": ("beta2", "TrainingArguments.adam_beta2"),
    "eps=1e-6": ("eps", "TrainingArguments.adam_epsilon"),
    "weight_decay=0.1": ("weight_decay", "TrainingArguments.weight_decay"),
}


@pytest.mark.parametrize("optim_args", BAD_OPTIM_ARGS)
def test_bad_optim_args_say_what_to_pass(optim_args: str) -> None:
    args = arguments("out", optim="striped_adamw", optim_args=optim_args)
    model = tiny_model("gpt2")
    for call in (Trainer.get_optimizer_cls_and_kwargs, optimizer_cls_and_kwargs):
        with pytest.raises(ValueError, match="optim_args") as caught:
            call(args, model)
        assert repr(optim_args) in str(caught.value)
        for part in BAD_OPTIM_ARGS[optim_args]:
            assert part in str(caught.value)


@pytest.mark.parametrize("model", [None, tiny_model("gpt2")], ids=["without", "with"])
def test_the_caller_builds_the_groups(model: nn.Module | None) -> None:
    args = arguments("out", optim="striped_adamw_8bit")
    for call in (Trainer.get_optimizer_cls_and_kwargs, optimizer_cls_and_kwargs):
        cls, kwargs = call(args, model)
        assert cls is StripedAdamW
        assert "params" not in kwargs
        cls([nn.Parameter(torch.zeros(2, 2))], **kwargs)
    assert kwargs["weight_decay"] == 0.1  # without Trainer no param group has the decay


# the public interface


@pytest.mark.parametrize(
    ("optim", "optim_args", "momentum_dtype"),
    [
        *((name, None, momentum_dtype) for name, momentum_dtype in NAMES.items()),
        ("adamw_torch", None, "float32"),
        ("adamw_torch_fused", "momentum_dtype=int8", "int8"),
    ],
)
def test_the_public_interface_trains_like_the_name(
    tmp_path: Path, optim: str, optim_args: str | None, momentum_dtype: str
) -> None:
    model = tiny_model("gpt2")
    args = arguments(tmp_path, optim=optim, optim_args=optim_args)
    trainer = Trainer(
        model,
        args,
        train_dataset=Counting(),
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, model),
    )
    trainer.train()
    (name,) = (name for name in NAMES if NAMES[name] == momentum_dtype)
    named = train("gpt2", tmp_path, optim=name)
    assert losses(trainer) == losses(named)
    for ours, theirs in zip(
        optimizer_of(trainer).param_groups, optimizer_of(named).param_groups, strict=True
    ):
        for key in ("blocks", "weight_decay", "momentum_dtype"):
            assert ours[key] == theirs[key]
        assert len(ours["params"]) == len(theirs["params"])
    assert packed_count(optimizer_of(trainer)) == packed_count(optimizer_of(named)) == 2


def packed_count(optimizer: StripedAdamW) -> int:
    """The number of matrices whose state has the blocks of GPT-2's c_attn."""
    return sum(
        state["exp_avg_sq_row"].shape[-1] == 3
        for state in optimizer.state.values()
        if "exp_avg_sq_row" in state
    )


def stepped(optimizer: StripedAdamW, model: nn.Module) -> StripedAdamW:
    ids = torch.arange(8)[None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    return optimizer


def test_the_same_class_and_arguments_work_in_two_trainers() -> None:
    model, args = tiny_model("gpt2"), arguments("out", optim="striped_adamw")
    answer = optimizer_cls_and_kwargs(args, model)
    for _ in range(2):
        trainer = Trainer(model, args, optimizer_cls_and_kwargs=answer)
        assert packed_count(stepped(trainer.create_optimizer(), model)) == 2
    # and a direct call of the class works, too
    cls, kwargs = answer
    assert packed_count(stepped(cls(model.parameters(), **kwargs), model)) == 2


@pytest.mark.parametrize("with_model", [True, False])
def test_the_public_interface_marks_the_packed_projections_of_the_trained_model(
    with_model: bool,
) -> None:
    model = tiny_model("gpt2")
    args = arguments("out", optim="adamw_torch")
    answer = optimizer_cls_and_kwargs(args, model if with_model else None)
    model = copy.deepcopy(model)  # a model without marked parameters
    trainer = Trainer(model, args, optimizer_cls_and_kwargs=answer)
    assert packed_count(stepped(trainer.create_optimizer(), model)) == 2


def test_the_groups_are_built_when_training_begins() -> None:
    model, args = tiny_model("gpt2"), arguments("out", optim="striped_adamw")
    answer = optimizer_cls_and_kwargs(args, model)
    model.resize_token_embeddings(80, mean_resizing=False)  # another parameter
    model.transformer.h[0].requires_grad_(False)
    optimizer = Trainer(model, args, optimizer_cls_and_kwargs=answer).create_optimizer()
    params = {param for group in optimizer.param_groups for param in group["params"]}
    assert params == {param for param in model.parameters() if param.requires_grad}


def test_each_new_model_of_model_init_has_its_blocks(tmp_path: Path) -> None:
    """A hyperparameter search makes a new model for each trial."""
    trainer = Trainer(
        args=arguments(tmp_path, optim="striped_adamw_8bit", max_steps=2),
        model_init=lambda: tiny_model("gpt2"),
        train_dataset=Counting(),
    )
    for _ in range(2):
        trainer.train()
        optimizer = optimizer_of(trainer)
        assert {p for group in optimizer.param_groups for p in group["params"]} == set(
            trainer.model.parameters()
        )
        assert packed_count(optimizer) == 2


# Trainers that build their own groups


class RatesByLayer(Trainer):
    """Builds its groups and asks Trainer for the class and its arguments."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        decaying = set(self.get_decay_parameter_names(self.model))
        for name, param in self.model.named_parameters():
            layer = int(re.findall(r"\.h\.(\d+)\.", name)[0]) if ".h." in name else 2
            decay = self.args.weight_decay if name in decaying else 0.0
            groups.setdefault((1e-2 / (1 + layer), decay), []).append(param)
        cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        kwargs.pop("lr")
        self.optimizer = cls(
            [
                {"params": params, "lr": lr, "weight_decay": decay}
                for (lr, decay), params in groups.items()
            ],
            **kwargs,
        )
        return self.optimizer


class RateOfTheEmbeddings(Trainer):
    """Puts groups into the arguments, like transformers' GaLore."""

    key = "params"

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> tuple[Any, Any]:
        cls, kwargs = super().get_optimizer_cls_and_kwargs(args, model)
        embeddings = [p for name, p in model.named_parameters() if "wte" in name]
        rest = [p for name, p in model.named_parameters() if "wte" not in name]
        kwargs[self.key] = [{"params": rest}, {"params": embeddings, "lr": 1e-4}]
        return cls, kwargs


class RateInTheDictionary(RateOfTheEmbeddings):
    key = "optimizer_dict"


class DecayOnlyOfMLPs(Trainer):
    def get_decay_parameter_names(self, model: Any) -> list[str]:
        return [n for n in super().get_decay_parameter_names(model) if ".mlp." in n]


class WithScales(Trainer):
    """Adds a parameter to the optimizer that Trainer made."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        self.scales = nn.Parameter(torch.ones(3))
        optimizer.add_param_group({"params": [self.scales], "weight_decay": 0.0, "lr": 0.5})
        return optimizer


@pytest.mark.parametrize(
    "trainer_class",
    [RatesByLayer, RateOfTheEmbeddings, RateInTheDictionary, DecayOnlyOfMLPs, WithScales],
)
def test_subclasses_build_the_same_groups_as_for_adamw(
    trainer_class: type[Trainer], tmp_path: Path
) -> None:
    model = tiny_model("gpt2")
    built = {}
    for optim in ("adamw_torch", "striped_adamw_8bit"):
        optimizer = trainer_class(model, arguments(tmp_path, optim=optim)).create_optimizer()
        built[optim] = [
            {key: group[key] for key in ("lr", "weight_decay", "betas", "eps")}
            | {"params": [p for p in group["params"] if p.shape != (3,)]}
            for group in optimizer.param_groups
        ]
    assert type(optimizer) is StripedAdamW
    for ours, theirs in zip(built["striped_adamw_8bit"], built["adamw_torch"], strict=True):
        assert all(p is q for p, q in zip(ours.pop("params"), theirs.pop("params"), strict=True))
        assert ours == theirs
    assert packed_count(stepped(optimizer, model)) == 2


def test_a_subclass_trains_and_resumes(tmp_path: Path) -> None:
    def run(resume_from: str | None) -> list[float]:
        trainer = RatesByLayer(
            tiny_model("gpt2"),
            arguments(tmp_path, optim="striped_adamw_8bit", save_strategy="steps", save_steps=4),
            train_dataset=Counting(),
        )
        trainer.train(resume_from_checkpoint=resume_from)
        rates = {group["initial_lr"] for group in optimizer_of(trainer).param_groups}
        assert rates == {1e-2, 1e-2 / 2, 1e-2 / 3}
        assert packed_count(optimizer_of(trainer)) == 2
        return losses(trainer)

    whole = run(None)
    assert whole[-1] < whole[0]
    assert run(str(tmp_path / "checkpoint-4")) == whole


def test_a_checkpoint_of_named_groups_with_lists_of_blocks_resumes(tmp_path: Path) -> None:
    """Earlier versions of this package built the groups and saved such checkpoints."""

    class Named(Trainer):
        def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
            groups = param_groups(self.model, self.args.weight_decay)
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = cls(groups, **kwargs)
            return self.optimizer

    def run(trainer_class: type[Trainer], resume_from: Path | None = None) -> list[float]:
        trainer = trainer_class(
            tiny_model("gpt2"),
            arguments(tmp_path, optim="striped_adamw_8bit", save_strategy="steps", save_steps=4),
            train_dataset=Counting(),
        )
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        return losses(trainer)

    whole = run(Named)
    saved = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert all("param_names" in group for group in saved["param_groups"])
    assert all(isinstance(group["blocks"], list) for group in saved["param_groups"])
    assert run(Trainer, tmp_path / "checkpoint-4") == whole


# import before transformers, after it, and during its import


@pytest.mark.slow
def test_the_optimizer_alone_does_not_import_transformers() -> None:
    script = """
        import importlib, inspect, sys, warnings
        warnings.simplefilter("error", UserWarning)

        import striped_hf
        assert "torch" not in sys.modules and striped_hf.__version__
        from striped_hf.optim import StripedAdamW
        import torch
        weight = torch.nn.Parameter(torch.ones(4, 6))
        weight.sum().backward()
        StripedAdamW([weight]).step()
        assert (weight < 1).all()
        assert not {"transformers", "accelerate", "datasets"} & set(sys.modules)
        assert striped_hf.StripedAdamW is striped_hf.optim.StripedAdamW is StripedAdamW

        # the names come with transformers, as soon as they can be used
        import transformers.training_args as module
        assert "transformers.trainer" not in sys.modules
        args = module.TrainingArguments("out", optim="striped_adamw_8bit", use_cpu=True)
        from transformers import Trainer
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        assert (cls, kwargs["momentum_dtype"]) == (StripedAdamW, "int8")
        assert inspect.getsource(Trainer.train)

        # and they come again with modules that are loaded again
        importlib.reload(module)
        module.TrainingArguments("out", optim="striped_adamw_8bit", use_cpu=True)
        trainer = importlib.reload(sys.modules["transformers.trainer"])
        assert trainer.Trainer is not Trainer
        assert trainer.Trainer.get_optimizer_cls_and_kwargs(args)[0] is StripedAdamW
    """
    python(script)


@pytest.mark.slow
def test_striped_hf_imported_during_the_import_of_transformers() -> None:
    """An import hook imports striped_hf while ``transformers.trainer`` is half imported."""
    script = """
        import importlib.abc, importlib.util, sys, warnings
        warnings.simplefilter("error", UserWarning)

        class Hook(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name != "transformers.training_args":
                    return None
                sys.meta_path.remove(self)
                spec = importlib.util.find_spec(name)
                load = spec.loader.exec_module
                def exec_module(module):
                    spec.loader.exec_module = load
                    load(module)
                    import striped_hf
                    assert not hasattr(sys.modules["transformers.trainer"], "Trainer")
                spec.loader.exec_module = exec_module
                return spec

        sys.meta_path.insert(0, Hook())
        from transformers import Trainer, TrainingArguments
        args = TrainingArguments("out", optim="striped_adamw_4bit", use_cpu=True)
        assert Trainer.get_optimizer_cls_and_kwargs(args)[1]["momentum_dtype"] == "int4"
    """
    python(script)


@pytest.mark.slow
def test_threads_that_import_both() -> None:
    script = """
        import importlib, sys, threading, warnings
        warnings.simplefilter("error", UserWarning)
        start, errors = threading.Barrier(4), []

        def load(name):
            try:
                start.wait()
                importlib.import_module(name)
            except BaseException as error:
                errors.append(error)

        # one thread for transformers: two fail at times without striped_hf, in circular imports
        modules = ["transformers.trainer", "striped_hf", "striped_hf.optim", "striped_hf.trainer"]
        threads = [threading.Thread(target=load, args=(name,)) for name in modules]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
        from transformers import Trainer, TrainingArguments
        args = TrainingArguments("out", optim="striped_adamw", use_cpu=True)
        assert Trainer.get_optimizer_cls_and_kwargs(args)[1]["momentum_dtype"] == "float32"
    """
    python(script)


@pytest.mark.slow
def test_an_error_in_transformers_is_reported_unchanged() -> None:
    script = """
        import sys, traceback, warnings
        warnings.simplefilter("error", UserWarning)
        import striped_hf
        sys.modules["transformers.hyperparameter_search"] = None  # it cannot be imported any more
        try:
            import transformers.trainer
        except ImportError as error:
            assert "transformers.hyperparameter_search" in str(error), error
            assert error.__cause__ is error.__context__ is None
            frames = traceback.extract_tb(error.__traceback__)
            assert frames[-1].filename.endswith("trainer.py"), frames
            assert frames[-1].line.startswith("from .hyperparameter_search import"), frames
        else:
            raise SystemExit("it was imported")
        assert "transformers.trainer" not in sys.modules
        # once it is repaired, the names are there
        del sys.modules["transformers.hyperparameter_search"]
        from transformers import Trainer, TrainingArguments
        args = TrainingArguments("out", optim="striped_adamw", use_cpu=True)
        assert Trainer.get_optimizer_cls_and_kwargs(args)[0] is striped_hf.StripedAdamW
    """
    python(script)


@pytest.mark.slow
def test_an_error_in_striped_hf_leaves_transformers_alone() -> None:
    """The message does not mention changed internals."""
    script = """
        import sys, warnings
        import striped_hf
        sys.modules["striped_hf.optim.rounding"] = None  # it cannot be imported any more
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            from transformers import Trainer, TrainingArguments
        messages = {str(w.message) for w in caught if "striped_hf" in str(w.message)}
        assert len(messages) == 1, messages
        (message,) = messages
        assert "striped_hf.optim.rounding" in message and "internals" not in message, message
        TrainingArguments("out", optim="adamw_torch", use_cpu=True)
    """
    python(script)


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

        for name in ("striped_adamw", "striped_adamw_8bit", "striped_adamw_4bit"):
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


@pytest.mark.slow
def test_the_optimizer_works_without_transformers() -> None:
    script = """
        import sys
        import torch

        class Missing:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "transformers":
                    raise ModuleNotFoundError(name)

        import importlib.util
        found = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: (
            None if name == "transformers" else found(name, *rest)
        )
        sys.meta_path.insert(0, Missing())
        import striped_hf
        striped_hf.StripedAdamW([torch.nn.Parameter(torch.zeros(2, 2))])
        assert "transformers" not in sys.modules
    """
    python(script)
