"""A run and its folder: locked, begun or continued, and left as a Hugging Face model folder."""

import contextlib
import math
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch.utils.data import Subset
from transformers import PreTrainedModel, TrainingArguments
from transformers.training_args import OptimizerNames

from striped_hf.cli import UserError, is_main_process, one_line
from striped_hf.data import ContiguousBlocks, TokenSplit
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
    """Keeps a run's folder, ``args.output_dir``, for this run as long as the context lasts.

    Raises:
        UserError: Another run is in it, or it cannot be written to.
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
    """Trains, from the beginning or from ``args.resume_from_checkpoint`` where that is of this run.

    Where it begins, and the folder has an earlier run, that run's checkpoints and its ``run.json``
    go when the first checkpoint of this one is written.

    Args:
        trainer: Over the data sets of ``striped_hf.data``.
        args: As they were parsed.
        options: The recipe's own settings that make another run of it.

    Raises:
        UserError: The checkpoint is of another run, a checkpoint cannot be written, or a tracker of
            ``args.report_to`` refuses.
    """
    trainer.identity = run_identity(trainer, args, **options)
    folder = Path(args.output_dir or "")
    if args.resume_from_checkpoint is not None:
        check_same_run(Path(args.resume_from_checkpoint), trainer.identity)
    elif found := checkpoints(folder):
        trainer.replaced = (*found, folder / "run.json", folder / "trainer_state.json")
        if is_main_process():
            print(
                f"{folder} has an earlier run's checkpoints, up to {found[-1].name}: the first one "
                "of this run replaces them (--resume_from_checkpoint last goes on with them)",
                flush=True,
            )
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    except Exception as error:
        tracker = type(error).__module__.partition(".")[0]
        if tracker not in (args.report_to or ()):
            raise
        raise UserError(
            f"--report_to {tracker} cannot begin ({one_line(error)}): log in to it, or leave the "
            "flag out"
        ) from error


def finish_run(
    trainer: CausalLMTrainer,
    measurements: RunMeasurements,
    train: TokenSplit,
    base_model: str | None = None,
) -> dict[str, Any]:
    """Evaluates the trained model and writes the run's folder, ``args.output_dir``.

    The folder holds the model, its tokenizer, ``trainer_state.json`` with the losses over time,
    ``run.json`` with what was measured, and a model card. Only the main process writes. With
    ``args.push_to_hub`` it is then pushed as it is.

    Args:
        trainer: After ``train()``; its ``eval_dataset`` are the val split's ``ContiguousBlocks``.
        measurements: The callback that accompanied the training.
        train: The training split, for the training loss and for the card.
        base_model: What was finetuned; None for a model trained from scratch.

    Returns:
        What ``run.json`` holds: ``optim``, ``learning_rate``, ``seed``, ``processes``, ``steps``,
        ``tokens`` trained on, ``parameters`` and their ``dtype``, the optimizer's ``state_bytes``
        and ``state_bytes_per_param``, both over all processes, this process's ``peak_memory_mib``,
        ``median_step_ms``, ``train_loss``, ``eval_loss``, ``eval_tokens`` and more. What is not
        finite, such as the losses of a run that diverged, is None.

    Raises:
        UserError: The folder cannot be written to.
    """
    args, model, blocks = trainer.args, trainer.model, trainer.eval_dataset
    assert isinstance(model, PreTrainedModel)
    assert isinstance(blocks, ContiguousBlocks)
    folder = Path(args.output_dir or "")
    measured = measurements.results()  # before evaluation below adds to the peak
    evaluation = trainer.evaluate()
    train_blocks = ContiguousBlocks(train, blocks.block_size)
    head = Subset(train_blocks, range(min(len(blocks), len(train_blocks))))
    train_evaluation = trainer.evaluate(head, metric_key_prefix="train_blocks")

    model.config.use_cache = True  # Trainer turned it off for training
    if trainer.is_fsdp_enabled:  # else each process would keep its shards to itself
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    with saving(folder):
        # internal, or it would be pushed before the rest is there
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
        # counted where steps differ in their tokens
        "tokens": trainer.state.num_input_tokens_seen
        or trainer.state.global_step * windows_per_step(args) * blocks.block_size,
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
        architecture = type(model).__name__.removeprefix("FSDP")  # FSDP2 makes a class of its own
        card = _card(folder.resolve().name, architecture, run, train, blocks, base_model)
        write_text(folder / "README.md", card)
    if args.push_to_hub:
        trainer.push_to_hub(revision=args.hub_revision)
    return run


def _dtype(model: PreTrainedModel, args: TrainingArguments) -> str:
    """Names the dtype of the weights, and of the computation where autocast makes it another."""
    autocast = "bfloat16" if args.bf16 else "float16" if args.fp16 else ""
    weights = str(model.dtype).removeprefix("torch.")
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
    ModelCard(text)  # parses the metadata, and so checks it
    return text
