"""A run and its folder: locked during the run, and a Hugging Face model folder at its end."""

import contextlib
import math
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch.utils.data import Subset
from transformers import PreTrainedModel, TrainingArguments
from transformers.training_args import OptimizerNames

from striped_hf.cli import UserError, is_main_process, one_line
from striped_hf.data import ContiguousBlocks, TokenSplit
from striped_hf.fingerprint import file_fingerprint
from striped_hf.locking import lock_folder
from striped_hf.results import environment, loss_text, markdown_table, write_json, write_text
from striped_hf.trainer.callbacks import RunMeasurements
from striped_hf.trainer.causal_lm import CausalLMTrainer
from striped_hf.trainer.checkpoints import saving
from striped_hf.trainer.resuming import (
    check_same_run,
    checkpoints,
    run_identity,
    windows_per_step,
)

_CARD = """\
---
{card_data}
---

# {name}

{model_description} on {source} by the recipe `{recipe}` of striped_hf, with the optimizer
`{optim}`.

{table}

Losses are in nats per token, over contiguous blocks of {block_size} tokens: all of the validation
split, and as many tokens of the training split.

```
{command}
```
"""


@contextlib.contextmanager
def run_folder(args: TrainingArguments) -> Iterator[None]:
    """Locks a run's folder, ``args.output_dir``, for as long as the context lasts.

    Raises:
        UserError: Another run uses the folder, or the folder is not writable.
    """
    if not is_main_process():
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock_folder(args.output_dir or ""))
        except OSError as error:
            raise UserError(
                f"--output_dir {args.output_dir} cannot be written to ({one_line(error)}): pass "
                "another folder"
            ) from error
        yield


def train(trainer: CausalLMTrainer, args: TrainingArguments, **options: Any) -> None:
    """Trains from the beginning, or from ``args.resume_from_checkpoint``.

    If a new run finds an earlier run in its folder, it deletes the earlier checkpoints and
    ``run.json`` when it writes its own first checkpoint.

    Args:
        trainer: A trainer over the data sets of ``striped_hf.data``.
        args: The parsed arguments.
        options: The recipe's own settings that are part of the run's identity.

    Raises:
        UserError: The checkpoint belongs to another run, a checkpoint cannot be written, or a
            tracker of ``args.report_to`` fails.
    """
    trainer.identity = run_identity(trainer, args, **options)
    folder = Path(args.output_dir or "")
    if args.resume_from_checkpoint is not None:
        check_same_run(Path(args.resume_from_checkpoint), trainer.identity)
    elif found := checkpoints(folder):
        trainer.replaced = (*found, folder / "run.json", folder / "trainer_state.json")
        if is_main_process():
            print(
                f"{folder} has an earlier run's checkpoints, up to {found[-1].name}: this "
                "run's first checkpoint replaces them (--resume_from_checkpoint last continues "
                "from them)",
                flush=True,
            )
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    except Exception as error:
        tracker = type(error).__module__.partition(".")[0]
        if tracker not in (args.report_to or ()):
            raise
        raise UserError(
            f"--report_to {tracker} cannot start ({one_line(error)}): log in to it, or leave the "
            "flag out"
        ) from error


def finish_run(
    trainer: CausalLMTrainer,
    measurements: RunMeasurements,
    train: TokenSplit,
    base_model: str | None = None,
) -> dict[str, Any]:
    """Evaluates the trained model and writes the run's folder, ``args.output_dir``.

    The folder gets the model, its tokenizer, ``trainer_state.json`` with the losses over time,
    ``run.json`` with the measurements, and a model card. Only the main process writes. With
    ``args.push_to_hub`` the folder is then pushed to the hub.

    Args:
        trainer: After ``train()``; ``eval_dataset`` is the ``ContiguousBlocks`` of the val split.
        measurements: The trainer's ``RunMeasurements`` callback.
        train: The training split, for the training loss and the card.
        base_model: The name or folder of the finetuned model; None for training from scratch.

    Returns:
        The content of ``run.json``: ``optim``, ``learning_rate``, ``seed``, ``processes``,
        ``steps``, ``tokens`` of training, ``data`` (its files and their fingerprints),
        ``parameters`` and their ``dtype``, the optimizer's ``state_bytes`` and
        ``state_bytes_per_param`` over all processes, this process's ``peak_memory_mib``,
        ``median_step_ms``, ``train_loss``, ``eval_loss`` (nats per token), ``eval_tokens`` and
        more. Values that are not finite, such as the losses of a run that diverged, are None.

    Raises:
        UserError: The folder is not writable.
    """
    args, model, blocks = trainer.args, trainer.model, trainer.eval_dataset
    assert isinstance(model, PreTrainedModel)
    assert isinstance(blocks, ContiguousBlocks)
    folder = Path(args.output_dir or "")
    measured = measurements.results()  # before the evaluation, which may raise the peak
    evaluation = trainer.evaluate()
    train_blocks = ContiguousBlocks(train, blocks.block_size)
    head = Subset(train_blocks, range(min(len(blocks), len(train_blocks))))
    train_evaluation = trainer.evaluate(head, metric_key_prefix="train_blocks")

    model.config.use_cache = True  # Trainer turned it off for training
    if trainer.is_fsdp_enabled:  # otherwise each process would save only its shards
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    with saving(folder):
        # _internal_call: do not push before the other files are there
        trainer.save_model(_internal_call=True)
        trainer.save_state()
    parameters = model.num_parameters(only_trainable=True)
    state_bytes = measured["state_bytes"]
    run = {
        "recipe": Path(sys.argv[0]).name,
        "command": shlex.join(["python", *sys.argv]),
        "optim": OptimizerNames(args.optim).value,
        "optim_args": args.optim_args or None,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "processes": args.world_size,
        "steps": trainer.state.global_step,
        # Trainer's count, if it has one: steps may differ in their tokens
        "tokens": trainer.state.num_input_tokens_seen
        or trainer.state.global_step * windows_per_step(args) * blocks.block_size,
        "data": {str(path): file_fingerprint(path) for path in (train.path, blocks.split.path)},
        "parameters": parameters,
        "dtype": _dtype(model, args),
        **measured,
        "state_bytes_per_param": None if state_bytes is None else state_bytes / parameters,
        "train_loss": train_evaluation["train_blocks_loss"],
        "eval_loss": evaluation["eval_loss"],
        "eval_perplexity": evaluation["eval_perplexity"],
        "eval_tokens": evaluation["eval_tokens"],
        "environment": environment(),
    }
    run = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in run.items()
    }
    if trainer.is_world_process_zero():
        write_json(folder / "run.json", run)
        architecture = type(model).__name__.removeprefix("FSDP")  # FSDP2 changes the model's class
        card = _card(folder.resolve().name, architecture, run, train, blocks, base_model)
        write_text(folder / "README.md", card)
    if args.push_to_hub:
        trainer.push_to_hub(revision=args.hub_revision)
    return run


def dtype_name(dtype: torch.dtype) -> str:
    """Returns a dtype's name, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _dtype(model: PreTrainedModel, args: TrainingArguments) -> str:
    """Names the dtype of the weights, and autocast's dtype if it is on."""
    autocast = "bfloat16" if args.bf16 else "float16" if args.fp16 else ""
    weights = dtype_name(model.dtype)
    return f"{weights}, {autocast} autocast" if autocast else weights


def _card(
    name: str,
    architecture: str,
    run: dict[str, Any],
    train: TokenSplit,
    blocks: ContiguousBlocks,
    base_model: str | None,
) -> str:
    source = train.meta.get("source", {}).get("name") or train.path.parent.name
    rows = [
        ("validation loss", loss_text(run["eval_loss"])),
        ("validation perplexity", loss_text(run["eval_perplexity"], digits=3)),
        ("training loss", loss_text(run["train_loss"])),
        ("steps", f"{run['steps']:,}"),
        ("tokens", f"{run['tokens']:,}"),
        ("learning rate", f"{run['learning_rate']:g}"),
        ("seed", str(run["seed"])),
        ("dtype of the weights", run["dtype"]),
        ("optimizer state, bytes per parameter", f"{run['state_bytes_per_param']:.2f}"),
    ]
    card_data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["striped_hf", run["optim"]],
        base_model=base_model if base_model and not Path(base_model).exists() else None,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="text",
                dataset_name=source,
                dataset_split="validation",
                metric_type=metric,
                metric_value=run[f"eval_{metric}"],
            )
            for metric in ("loss", "perplexity")
            if run[f"eval_{metric}"] is not None
        ],
    )
    text = _CARD.format(
        card_data=card_data.to_yaml(),
        name=name,
        model_description=(
            f"{architecture} of {run['parameters']:,} parameters, "
            + (f"finetuned from `{base_model}`" if base_model else "trained from scratch")
        ),
        source=source,
        recipe=run["recipe"],
        optim=run["optim"],
        table=markdown_table(("", ""), rows),
        block_size=blocks.block_size,
        command=run["command"],
    )
    ModelCard(text)  # parses and so checks the metadata
    return text
