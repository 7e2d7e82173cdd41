"""A Trainer for long runs: windows in the data set's order, and batches that grow with the tokens.

``Trainer`` has one ``gradient_accumulation_steps``, which cannot change during the run: the end of
a step, the batches that a resumed run skips, the length of the run and the learning rate depend on
it. With a growing batch, the data loader therefore gives Trainer the whole batch of a step as one
batch. ``training_step`` splits it and accumulates the gradients.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from striped_hf.data import RandomWindows
from striped_hf.trainer.causal_lm import CausalLMTrainer


def growing_accumulation(full: int, total: int, warmup: float) -> NDArray[np.int64]:
    """Returns the number of rounds in each step, for a batch that grows linearly with the tokens.

    A round is one forward and backward pass on every process. The first step has one round. A step
    that begins after r rounds has 1 + (full - 1) r / warmup rounds, rounded down, at most ``full``.

    Args:
        full: The rounds of a full step.
        total: The rounds of the whole run. The last step gets the rounds that remain.
        warmup: The number of rounds after which every step is full.

    Returns:
        The rounds of each step, [steps], int64.
    """
    steps: list[int] = []
    done = 0
    while done < min(warmup, total):
        steps.append(min(1 + int((full - 1) * done / warmup), total - done))
        done += steps[-1]
    steps += [full] * ((total - done) // full)
    rest = (total - done) % full
    return np.array([*steps, rest] if rest else steps, dtype=np.int64)


class WindowBatches:
    """One process's part of each batch: windows in the data set's order.

    A ``batch_sampler`` for ``DataLoader``. It yields ranges, so a resumed run skips millions of
    batches in seconds, and no permutation of all windows is in memory.

    Args:
        sizes: The number of windows in each batch on each process, [batches], int64.
        process: The index of this process.
        processes: The number of processes.
    """

    def __init__(self, sizes: NDArray[np.int64], process: int, processes: int) -> None:
        self._sizes, self._process, self._processes = sizes, process, processes

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[range]:
        start = 0
        for size in map(int, self._sizes):
            own = start + self._process * size
            yield range(own, own + size)
            start += self._processes * size


class PretrainingTrainer(CausalLMTrainer):
    """A Trainer that reads random windows in the data set's order, on any number of processes.

    ``state.num_input_tokens_seen`` and every log count the tokens of training over all processes,
    without the synchronization of ``include_num_input_tokens_seen``.

    Args:
        args: As for ``Trainer``. ``max_steps`` and the schedule's warm-up count steps of the full
            batch, so they fix the number of tokens and the learning rate at each token.
        train_dataset: Enough windows for the run.
        batch_size_warmup: The number of tokens after which every step has the full batch. Until
            then the batch grows linearly with the tokens, by gradient accumulation, from one
            micro-batch on every process. The run takes more steps (``trainer.args.max_steps``) for
            the same tokens. At each token it has the same learning rate as a run of full batches.
            0: all batches are full.

    Raises:
        ValueError: ``batch_size_warmup`` is negative or longer than the run;
            ``gradient_accumulation_steps`` is 1, so that the batch cannot grow; or the schedule's
            learning rate is not a function of the step.
    """

    def __init__(
        self,
        *,
        args: TrainingArguments,
        train_dataset: RandomWindows,
        batch_size_warmup: int = 0,
        **kwargs: Any,
    ) -> None:
        self._full_steps, self._full = args.max_steps, args.gradient_accumulation_steps
        self._rounds: NDArray[np.int64] | None = None  # the rounds of each step, if the batch grows
        if batch_size_warmup:
            # tokens in a round
            tokens = args.train_batch_size * args.world_size * train_dataset.block_size
            total = self._full_steps * self._full
            if not 0 < batch_size_warmup <= total * tokens:
                raise ValueError(
                    f"batch_size_warmup={batch_size_warmup}: pass a number of tokens up to the "
                    f"run's {total * tokens:,}, or 0 for full batches from the beginning"
                )
            if self._full == 1:
                raise ValueError(
                    f"batch_size_warmup={batch_size_warmup}: gradient_accumulation_steps is 1, and "
                    "the batch grows by accumulation: raise it and lower "
                    "per_device_train_batch_size, or pass batch_size_warmup=0"
                )
            self._rounds = growing_accumulation(self._full, total, batch_size_warmup / tokens)
            args = copy.copy(args)  # do not change the caller's arguments
            args.max_steps, args.gradient_accumulation_steps = len(self._rounds), 1
        super().__init__(args=args, train_dataset=train_dataset, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Returns this process's batches. They need no preparation by accelerate."""
        args = self.args
        if self._rounds is None:  # all sizes are the same: the view needs no array of millions
            batches = args.max_steps * args.gradient_accumulation_steps
            sizes = np.broadcast_to(np.int64(args.train_batch_size), batches)
        else:
            sizes = self._rounds * args.train_batch_size
        return DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=WindowBatches(sizes, args.process_index, args.world_size),  # type: ignore[arg-type]
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
        )

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LRScheduler:
        """Makes the schedule, with the learning rate of full batches at each token."""
        if self._rounds is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        scheduler = super().create_scheduler(self._full_steps, optimizer)
        if not isinstance(scheduler, LambdaLR):
            raise ValueError(
                f"lr_scheduler_type={self.args.lr_scheduler_type}: batch_size_warmup needs a "
                "learning rate that is a function of the step: pass another schedule, or "
                "batch_size_warmup=0"
            )
        # the full step that has this step's first token: a schedule may accept only whole steps
        full_step = np.concatenate(([0], self._rounds.cumsum())) // self._full

        def by_tokens(rate: Callable[[int], float]) -> Callable[[int], float]:
            return lambda step: rate(int(full_step[step]))

        scheduler.lr_lambdas = [by_tokens(rate) for rate in scheduler.lr_lambdas]
        return scheduler

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Accumulates a batch's gradients, one micro-batch at a time; returns the batch's loss."""
        if self.args.include_num_input_tokens_seen in (False, "no"):  # else Trainer counts
            self.state.num_input_tokens_seen += inputs["input_ids"].numel() * self.args.world_size
        if self._rounds is None:
            return super().training_step(model, inputs, num_items_in_batch)
        names = list(inputs)
        parts = [
            dict(zip(names, part, strict=True))
            for part in zip(
                *(inputs[name].split(self.args.train_batch_size) for name in names), strict=True
            )
        ]
        # Trainer's divisor for a model that does not accept num_items_in_batch
        self.current_gradient_accumulation_steps = len(parts)
        losses = []
        for part in parts[:-1]:
            with self.accelerator.no_sync(model):
                losses.append(super().training_step(model, part, num_items_in_batch))
        losses.append(super().training_step(model, parts[-1], num_items_in_batch))
        return torch.stack(losses).sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs like ``Trainer``, and adds the number of tokens so far."""
        logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
        super().log(logs, start_time)
