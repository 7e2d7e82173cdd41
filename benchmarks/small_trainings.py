"""Short trainings of small models on a CPU, for the benchmarks that compare losses.

A training is one model, one optimizer, one learning rate and one seed. With equal seeds, trainings
of a task start from the same weights, which bfloat16 can hold, and see the same windows in each
step. Each takes from some seconds to a few minutes on one thread. The results file is written after
each training, and a later call trains only what the file does not have yet.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GPT2Config, PreTrainedModel, set_seed

from striped_hf import LayerwiseStripedAdamW
from striped_hf.data import ContiguousBlocks, RandomWindows, open_split
from striped_hf.optim.layerwise import optimizer as layerwise
from striped_hf.pretrained import load_model, new_model
from striped_hf.results import begin_results, environment, loss_text, write_json
from striped_hf.trainer import param_groups
from striped_hf.trainer.optimizer_kwargs import OPTIMIZERS

SEEDS = (1, 2, 3)
ADAMW = "adamw_torch_fused"


@dataclass(frozen=True)
class Task:
    """What is trained, on which data, and with which of AdamW's settings.

    Args:
        make_model: Returns the model, in float32. It may draw from torch's generator.
        data_dir: A data set in the model's tokens.
        block_size: The tokens of a window.
        batch_size: The windows of a step.
        steps: The optimizer steps.
        averaged: The number of last steps whose mean loss is the training loss.
        warmup: The steps in which the learning rate rises.
        final_lr: The learning rate at the end, as a share of its peak: a cosine leads there.
        beta2: Of AdamW.
        weight_decay: Of AdamW.
        stride: The validation loss is over each ``stride``-th block of the split.
    """

    make_model: Callable[[], PreTrainedModel]
    data_dir: str
    block_size: int
    batch_size: int
    steps: int
    averaged: int
    warmup: int
    final_lr: float
    beta2: float
    weight_decay: float
    stride: int = 1


@dataclass(frozen=True)
class Training:
    """One training of a task.

    Args:
        task: The task's name.
        optim: By the names that Trainer knows.
        learning_rate: Its peak.
        seed: Of the weights and of the windows.
        dtype: Of weights and gradients: "float32" or "bfloat16".
        options: Further options of the optimizer.
        micro_batches: The backward passes of a step. They share the step's windows.
        max_grad_norm: The norm that gradients are clipped to; None: they are not clipped.
        noise_every: One step in so many sees random tokens; 0: no step does.
    """

    task: str
    optim: str
    learning_rate: float
    seed: int
    dtype: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)
    micro_batches: int = 1
    max_grad_norm: float | None = 1.0
    noise_every: int = 0


def character_model() -> PreTrainedModel:
    """Makes a GPT of two layers of width 128 for the characters of tiny Shakespeare."""
    config = GPT2Config(
        vocab_size=65,
        n_positions=64,
        n_layer=2,
        n_head=4,
        n_embd=128,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        activation_function="gelu",
    )
    return new_model(config)


def character_task(data_dir: str) -> Task:
    """Returns the training of ``character_model`` from scratch, with nanoGPT's settings."""
    return Task(
        make_model=character_model,
        data_dir=data_dir,
        block_size=64,
        batch_size=12,
        steps=1000,
        averaged=200,
        warmup=100,
        final_lr=0.1,
        beta2=0.99,
        weight_decay=0.1,
    )


def finetuning_task(model: str, data_dir: str) -> Task:
    """Returns the finetuning of stories260K on Shakespeare in its own tokens."""
    return Task(
        make_model=lambda: load_model(model),
        data_dir=data_dir,
        block_size=256,
        batch_size=4,
        steps=200,
        averaged=100,
        warmup=20,
        final_lr=1.0,
        beta2=0.999,
        weight_decay=0.0,
        stride=4,
    )


def make_optimizer(model: nn.Module, task: Task, training: Training) -> torch.optim.Optimizer:
    """Makes the optimizer of a training."""
    groups = param_groups(model, task.weight_decay)
    settings = {"lr": training.learning_rate, "betas": (0.9, task.beta2), **training.options}
    if training.optim == ADAMW:
        for group in groups:
            group.pop("blocks")
        return torch.optim.AdamW(groups, fused=True, **settings)
    choice = OPTIMIZERS[training.optim]
    settings["momentum_dtype"] = choice.momentum_dtype
    if choice.cls is not LayerwiseStripedAdamW:
        return choice.cls(groups, **settings)
    return LayerwiseStripedAdamW(
        groups,
        max_grad_norm=training.max_grad_norm,
        gradient_accumulation=training.micro_batches > 1,
        **settings,
    )


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean loss over the targets, in nats: [] float32."""
    logits = model(input_ids=inputs, use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def learning_rate_at(step: int, task: Task, peak: float) -> float:
    """Returns the learning rate of a step, counted from 0."""
    if step < task.warmup:
        return peak * (step + 1) / task.warmup
    progress = (step - task.warmup) / max(1, task.steps - task.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (task.final_lr + (1 - task.final_lr) * cosine)


def train(task: Task, training: Training) -> dict[str, float | None]:
    """Performs a training; returns ``train_loss`` and ``eval_loss``, None where not finite.

    The layerwise optimizer keeps the gradients of matrices below 65,536 elements. Almost all
    matrices of these models are smaller. So the benchmark lowers this limit, and all matrices are
    folded in the backward pass.
    """
    set_seed(training.seed)
    model = task.make_model().train()
    for param in model.parameters():
        param.data = param.data.bfloat16().to(getattr(torch, training.dtype))
    with mock.patch.object(layerwise, "SMALLEST", 1):
        train_loss = _train(model, task, training)
    losses = {"train_loss": train_loss, "eval_loss": evaluate(model, task)}
    return {name: loss if math.isfinite(loss) else None for name, loss in losses.items()}


def _train(model: PreTrainedModel, task: Task, training: Training) -> float:
    """Trains the model; returns the mean loss of the last steps without noise."""
    optimizer = make_optimizer(model, task, training)
    clips = training.max_grad_norm is not None and not isinstance(optimizer, LayerwiseStripedAdamW)
    windows = RandomWindows(
        open_split(task.data_dir, "train"),
        task.block_size,
        task.steps * task.batch_size,
        training.seed,
    )
    generator = torch.Generator().manual_seed(training.seed)
    losses = []
    for step in range(task.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, task, training.learning_rate)
        first = step * task.batch_size
        batch = windows.__getitems__(range(first, first + task.batch_size))
        inputs, targets = batch["input_ids"], batch["shift_labels"]
        is_noise = training.noise_every > 0 and (step + 1) % training.noise_every == 0
        if is_noise:  # each window has one random target, so that the gradients add up
            vocabulary = model.config.vocab_size
            inputs = torch.randint(vocabulary, inputs.shape, generator=generator)
            targets = torch.randint(vocabulary, (len(targets), 1), generator=generator)
            targets = targets.repeat(1, task.block_size)
        loss = 0.0
        micro_batches = zip(
            inputs.chunk(training.micro_batches),
            targets.chunk(training.micro_batches),
            strict=True,
        )
        for each_inputs, each_targets in micro_batches:
            share = loss_of(model, each_inputs, each_targets) / training.micro_batches
            share.backward()
            loss += share.item()
        if clips:
            assert training.max_grad_norm is not None
            nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if step >= task.steps - task.averaged and not is_noise:
            losses.append(loss)
    return statistics.mean(losses)


@torch.no_grad()
def evaluate(model: nn.Module, task: Task) -> float:
    """Returns the mean loss over blocks of the validation split."""
    model.eval()
    blocks = ContiguousBlocks(open_split(task.data_dir, "val"), task.block_size)
    chosen = range(0, len(blocks) - 1, task.stride)  # some targets of the last block are masked
    losses = []
    for first in range(0, len(chosen), 16):
        batch = blocks.__getitems__(chosen[first : first + 16])
        loss = loss_of(model, batch["input_ids"], batch["shift_labels"]).item()
        losses += [loss] * len(batch["input_ids"])
    return statistics.mean(losses)


def run_trainings(path: str, tasks: dict[str, Task], trainings: Sequence[Training]) -> None:
    """Performs the trainings that a results file does not have yet, and writes it after each.

    Args:
        path: The results file.
        tasks: The tasks by name.
        trainings: All trainings, in the order of the file.

    Raises:
        UserError: The file has results of tasks with other settings.
    """
    settings = {name: _settings(task) for name, task in tasks.items()}
    results = begin_results(path, {"tasks": settings, "trainings": []}, resume=True)
    done = results["trainings"]
    keys = [_key(row) for row in done]
    left = [training for training in trainings if asdict(training) not in keys]
    commit = environment("cpu")["commit"]
    for training in tqdm(left, desc="trainings", unit="training"):
        row = asdict(training) | train(tasks[training.task], training) | {"commit": commit}
        done.append(row)
        order = [asdict(each) for each in trainings]
        done.sort(key=lambda each: order.index(_key(each)) if _key(each) in order else len(order))
        # training may have begun at an earlier commit
        commits = dict.fromkeys(each["commit"] for each in done)
        results["environment"]["commit"] = ", ".join(commits)
        results["complete"] = len(done) >= len(trainings)
        write_json(path, results)
        losses = f"{loss_text(row['train_loss'])} / {loss_text(row['eval_loss'])}"
        tqdm.write(f"{describe(training)}: {losses}")


def _settings(task: Task) -> dict[str, Any]:
    return {
        key: value for key, value in vars(task).items() if key not in ("make_model", "data_dir")
    }


def _key(row: dict[str, Any]) -> dict[str, Any]:
    """Returns what identifies a training in a results file."""
    return {key: row[key] for key in Training.__dataclass_fields__}


def label(row: dict[str, Any]) -> str:
    """Names the optimizer of a row, with its own options if it has any."""
    options = ", ".join(f"{key}={str(value).lower()}" for key, value in row["options"].items())
    return f"`{row['optim']}`" + (f" with `{options}`" if options else "")


def describe(training: Training) -> str:
    """Names a training on one line."""
    row = asdict(training)
    parts = [training.task, label(row), training.dtype, f"lr {training.learning_rate:g}"]
    return ", ".join([*parts, f"seed {training.seed}"])


def same_but_seed(results: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Groups the rows of a results file that differ only in their seeds, in the file's order.

    Groups that do not have all seeds yet are left out.
    """
    collected: dict[str, list[dict[str, Any]]] = {}
    for row in results["trainings"]:
        key = repr({**_key(row), "seed": None})
        collected.setdefault(key, []).append(row)
    return [rows for rows in collected.values() if len(rows) == len(SEEDS)]


def mean_and_range(rows: Sequence[dict[str, Any]], name: str) -> str:
    """Formats the mean of a loss over the seeds, and its lowest and highest value."""
    losses = [row[name] for row in rows]
    if None in losses:
        return "diverged"
    return f"{statistics.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"


def argument_parser(description: str | None, results: str) -> argparse.ArgumentParser:
    """Makes the parser of a benchmark's options that all benchmarks of losses have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data_dir",
        default="data/shakespeare_char",
        help="the output folder of data_scripts/shakespeare_char.py",
    )
    parser.add_argument("--results", default=results)
    return parser
