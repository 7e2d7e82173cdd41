"""The tasks of benchmarks/losses.py, and one training run on one of them.

Every optimizer starts a seed of a task from the same weights and sees the same batches.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, PreTrainedModel, get_scheduler, set_seed

from benchmarks.loss_peers import Peer, peer_state_bytes, set_learning_rate
from recipes import train_shakespeare_char
from striped_hf.cli import UserError
from striped_hf.data import ContiguousBlocks, RandomWindows, TokenSplit, open_split
from striped_hf.pretrained import check_tokens, load_model, new_model
from striped_hf.published_configs import load_config

_RECIPE = train_shakespeare_char.DEFAULTS
_CPU_COMMAND = train_shakespeare_char.PRESETS["cpu"]
WEIGHT_DECAY = _RECIPE["weight_decay"]
MAX_GRAD_NORM = _RECIPE["max_grad_norm"]
_SCHEDULE = {
    "schedule": _RECIPE["lr_scheduler_type"],
    "schedule_kwargs": json.loads(_RECIPE["lr_scheduler_kwargs"]),
}


@dataclass(frozen=True)
class Task:
    """A model, its data, and the settings that all optimizers share.

    Args:
        name: Its name on the command line.
        text: What is trained, for the line under the table.
        model: Makes the model from the vocabulary of the data and a model's name or folder.
        steps: Optimizer steps of a run.
        batch_size: Windows of a step.
        block_size: Tokens of a window.
        betas: Of AdamW, and of every optimizer that has them.
        seeds: Of the weights, if they are random, and of the batches.
        rates: The learning rates with which every grid begins, a factor of 2 apart.
        schedule: The name of transformers' learning-rate schedule.
        warmup: Steps of its warm-up.
        schedule_kwargs: Its further settings.
        evaluated: How many blocks of each split are evaluated, evenly spaced; None for all of the
            validation split, and as many blocks from the beginning of the training split.
        autocast: Whether a GPU computes in bfloat16.
    """

    name: str
    text: str
    model: Callable[[int, str], PreTrainedModel]
    steps: int
    batch_size: int
    block_size: int
    betas: tuple[float, float]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    schedule: str = "constant"
    warmup: int = 0
    schedule_kwargs: dict[str, float] = field(default_factory=dict)
    evaluated: int | None = None
    autocast: bool = False

    def settings(self) -> dict[str, Any]:
        """Returns the settings that decide a run's losses, for the results file."""
        return {
            "task": self.name,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "block_size": self.block_size,
            "betas": list(self.betas),
            "weight_decay": WEIGHT_DECAY,
            "schedule": self.schedule,
            "warmup": self.warmup,
            "evaluated": self.evaluated,
        }


def character_model(vocab_size: int, name_or_path: str) -> PreTrainedModel:
    """Makes the model of ``train_shakespeare_char.py --preset cpu``."""
    dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), _CPU_COMMAND["dropout"])
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=_CPU_COMMAND["block_size"],
        **{key: _CPU_COMMAND[key] for key in ("n_layer", "n_head", "n_embd")},
        **dropout,
        activation_function="gelu",
        bos_token_id=None,
        eos_token_id=None,
    )
    return new_model(config)


def pretrained_model(vocab_size: int, name_or_path: str) -> PreTrainedModel:
    """Loads a pretrained model, with its weights in float32."""
    return load_model(name_or_path)


def random_model(vocab_size: int, name_or_path: str) -> PreTrainedModel:
    """Makes a model with random weights from a published configuration."""
    return new_model(load_config(name_or_path))


TASKS = {
    task.name: task
    for task in (
        Task(
            "char",
            "nanoGPT's CPU-sized model on tiny Shakespeare, from scratch",
            character_model,
            steps=_CPU_COMMAND["max_steps"],
            batch_size=_CPU_COMMAND["per_device_train_batch_size"],
            block_size=_CPU_COMMAND["block_size"],
            betas=(0.9, _RECIPE["adam_beta2"]),
            seeds=(1, 2, 3),
            rates=(2e-3, 4e-3, 8e-3),
            warmup=_RECIPE["warmup_steps"],
            **_SCHEDULE,
        ),
        Task(
            "finetune",
            "SmolLM2-135M-Instruct, finetuned on tiny Shakespeare in its own tokens",
            pretrained_model,
            steps=30,
            batch_size=1,
            block_size=1024,
            betas=(0.9, 0.95),
            seeds=(1, 2),
            rates=(5e-5, 1e-4, 2e-4),
            evaluated=16,
        ),
        Task(
            "novels",
            "GPT-2 124M on novels, from scratch",
            random_model,
            steps=500,
            batch_size=12,
            block_size=1024,
            betas=(0.9, 0.95),
            seeds=(1,),
            rates=(3e-4, 6e-4, 1.2e-3),
            warmup=50,
            evaluated=64,
            **_SCHEDULE,
            autocast=True,
        ),
    )
}


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        task: The task.
        peer: The optimizer.
        learning_rate: Its learning rate, before the schedule.
        seed: Of the weights and the batches.
        data_dir: The data set.
        model: The model's name or folder.
        device: "cpu" or "cuda".
    """

    task: Task
    peer: Peer
    learning_rate: float
    seed: int
    data_dir: str
    model: str
    device: str

    @property
    def key(self) -> tuple[str, float, int]:
        return self.peer.name, self.learning_rate, self.seed


def rate_factors(task: Task) -> list[float]:
    """Returns the factor of the learning rate for each step, by transformers' own schedule."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    scheduler = get_scheduler(
        task.schedule,
        torch.optim.SGD([parameter], lr=1.0),
        num_warmup_steps=task.warmup,
        num_training_steps=task.steps,
        scheduler_specific_kwargs=task.schedule_kwargs,
    )
    factors = []
    for _ in range(task.steps):
        factors.append(float(scheduler.get_last_lr()[0]))
        scheduler.optimizer.step()
        scheduler.step()
    return factors


def token_loss(
    model: nn.Module, batch: dict[str, torch.Tensor], run: Run, reduction: str = "mean"
) -> torch.Tensor:
    """Returns the loss of a batch's targets, in nats; masked targets do not count."""
    inputs, targets = (batch[key].to(run.device) for key in ("input_ids", "shift_labels"))
    autocast = run.task.autocast and run.device == "cuda"
    with torch.autocast(run.device, torch.bfloat16, enabled=autocast):
        logits = model(input_ids=inputs, use_cache=False).logits
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction
    )


@torch.no_grad()
def evaluate(model: nn.Module, split: TokenSplit, blocks: int, chosen: int, run: Run) -> float:
    """Returns the mean loss per token over ``chosen`` of the first ``blocks`` blocks of a split."""
    task = run.task
    data = ContiguousBlocks(split, task.block_size)
    indices = [i * min(blocks, len(data)) // chosen for i in range(chosen)]
    size = max(1, 4096 // task.block_size)
    total, tokens = 0.0, 0
    model.eval()
    for first in range(0, len(indices), size):
        batch = data.__getitems__(indices[first : first + size])
        total += token_loss(model, batch, run, "sum").item()
        tokens += int((batch["shift_labels"] != -100).sum())
    return total / tokens


def begin(run: Run) -> tuple[Any, RandomWindows]:
    """Makes the model of a run and the windows that it trains on, both from its seed.

    Raises:
        UserError: The data set's tokens are not the model's, or its context is shorter than the
            windows.
    """
    task = run.task
    set_seed(run.seed)
    train_split, val_split = (open_split(run.data_dir, name) for name in ("train", "val"))
    if task.model is pretrained_model:
        check_tokens(run.data_dir, run.model)
    model: Any = task.model(max(train_split.vocab_size, val_split.vocab_size), run.model)
    if (longest := model.config.max_position_embeddings) < task.block_size:
        raise UserError(
            f"--model {run.model}: its context of {longest} tokens is shorter than the windows of "
            f"--task {task.name}, {task.block_size}: pass another model"
        )
    model.to(device=run.device, dtype=getattr(torch, run.peer.dtype))
    model.train()
    windows = RandomWindows(
        train_split, task.block_size, task.steps * task.batch_size, seed=run.seed
    )
    return model, windows


def batch_loss(model: nn.Module, windows: RandomWindows, step: int, run: Run) -> torch.Tensor:
    """Returns the loss of a step's batch; steps count from 0."""
    first = step * run.task.batch_size
    return token_loss(model, windows.__getitems__(range(first, first + run.task.batch_size)), run)


def backward(loss: torch.Tensor, model: nn.Module) -> None:
    """Computes the gradients of a loss, and clips them."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)


def train(run: Run) -> dict[str, Any]:
    """Trains a model and evaluates it.

    Returns:
        ``optimizer``, ``learning_rate``, ``seed``, ``package``, ``version``,
        ``state_bytes_per_param`` (counted after the first step), ``train_loss`` and ``val_loss`` in
        nats per token, both None if the run diverged. If the optimizer cannot be built, or its
        first step fails: ``reason`` instead of the losses.
    """
    task, peer = run.task, run.peer
    result: dict[str, Any] = {
        "optimizer": peer.name,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "package": peer.package,
        "version": peer.version(),
    }
    if peer.version() is None:
        return {**result, "reason": f"{peer.package} is not installed"}
    model, windows = begin(run)
    parameters = model.num_parameters(only_trainable=True)
    try:
        optimizer = peer.build(model, run.learning_rate, task.betas, WEIGHT_DECAY)
    except Exception as error:  # each package has errors of its own
        return {**result, "reason": reason(error)}

    for step, factor in enumerate(rate_factors(task)):
        set_learning_rate(optimizer, run.learning_rate * factor)
        loss = batch_loss(model, windows, step, run)
        if not math.isfinite(loss.item()):
            return {**result, "train_loss": None, "val_loss": None}
        backward(loss, model)
        try:
            optimizer.step()
        except Exception as error:
            if step:
                raise
            return {**result, "reason": reason(error)}
        model.zero_grad()
        if step == 0:
            result["state_bytes_per_param"] = peer_state_bytes(optimizer) / parameters

    train_split, val_split = (open_split(run.data_dir, name) for name in ("train", "val"))
    blocks = len(ContiguousBlocks(val_split, task.block_size))
    for name, split in (("train", train_split), ("val", val_split)):
        loss_value = evaluate(model, split, blocks, task.evaluated or blocks, run)
        result[f"{name}_loss"] = loss_value if math.isfinite(loss_value) else None
    return result


def reason(error: Exception) -> str:
    """Formats an error of an optimizer that cannot run: its class and the first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def check_device(device: str) -> None:
    """Raises UserError if there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device: pass --device cpu")
