"""A Trainer for long runs: windows in the order they have, and batches that grow with the tokens.

``Trainer`` knows a run's batch size as one number, ``gradient_accumulation_steps``: where a step
ends, what a resumed run skips, how long the run is and the learning rate all follow from it, so it
cannot change on the way. Where the batch is to grow, one step's whole batch is therefore one batch
of Trainer's, and it is taken apart, and its gradients accumulated, inside of ``training_step``.
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
    """Counts the rounds of each step of a run whose batch grows linearly with what it has read.

    A round is one forward and backward pass on every process. The first step has one, and a step
    that begins after r rounds has 1 + (full - 1) r / warmup, rounded down, ``full`` at most.

    Args:
        full: The rounds of a full step.
        total: The rounds of the whole run; its last step takes what is left of them.
        warmup: After how many rounds a step is full.

    Returns:
        Rounds, one number a step.
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
    """The batches of one process: windows in their order, of each batch the process's own part.

    A ``batch_sampler`` for ``DataLoader``. It yields ranges, so that a resumed run skips millions
    of batches in seconds and no permutation of all windows is kept.

    Args:
        sizes: How many windows each batch has on every process.
        process: Which process this is.
        processes: How many there are.
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
    """Trainer over random windows, which it takes in their order, on any number of processes.

    It counts the tokens it has trained on, over all processes, in ``state.num_input_tokens_seen``
    and in every log, without the synchronisation that ``include_num_input_tokens_seen`` costs.

    Args:
        args: As for ``Trainer``; ``max_steps`` and the schedule's warm-up count steps of the full
            batch, and so fix how many tokens the run has and the learning rate at each of them.
        train_dataset: Windows enough for the run.
        batch_size_warmup: After how many tokens a step has the full batch. Before, the batch grows
            linearly with the tokens, from one window batch on every process, by accumulation; the
            run then takes more steps for its tokens (``trainer.args.max_steps``), and each has the
            learning rate that a run of full batches has at the same token. 0: all are full.

    Raises:
        ValueError: ``batch_size_warmup`` is negative, longer than the run, or there is nothing to
            grow by; or the learning rate's schedule is no function of the step.
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
        self._rounds: NDArray[np.int64] | None = None  # of each step, where they grow
        if batch_size_warmup:
            tokens = args.train_batch_size * args.world_size * train_dataset.block_size  # a round
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
            args = copy.copy(args)  # the caller's stays as it was
            args.max_steps, args.gradient_accumulation_steps = len(self._rounds), 1
        super().__init__(args=args, train_dataset=train_dataset, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Returns this process's batches. They need no preparation by accelerate."""
        args = self.args
        if self._rounds is None:  # no array of millions where all are the same
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
        """Makes the schedule, which where batches grow is the full batches' at the same tokens."""
        if self._rounds is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        scheduler = super().create_scheduler(self._full_steps, optimizer)
        if not isinstance(scheduler, LambdaLR):
            raise ValueError(
                f"lr_scheduler_type={self.args.lr_scheduler_type}: its rate is no function of the "
                "step, and batch_size_warmup needs one: pass another, or batch_size_warmup=0"
            )
        # the full step that has the step's first token: a schedule may not know of parts of one
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
        """Accumulates the gradients of a batch, window batch by window batch; returns its loss."""
        if self.args.include_num_input_tokens_seen in (False, "no"):  # else Trainer counts too
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
        # what Trainer divides by for a model that does not take the number of its targets
        self.current_gradient_accumulation_steps = len(parts)
        losses = []
        for part in parts[:-1]:
            with self.accelerator.no_sync(model):
                losses.append(super().training_step(model, part, num_items_in_batch))
        losses.append(super().training_step(model, parts[-1], num_items_in_batch))
        return torch.stack(losses).sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs as ``Trainer`` does, with the tokens so far."""
        logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
        super().log(logs, start_time)
