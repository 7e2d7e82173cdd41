"""Callbacks that measure a run."""

import statistics
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from striped_hf.trainer.memory import peak_memory_mib, state_bytes


class RunMeasurements(TrainerCallback):
    """Measures step time, memory and optimizer state of a run, without synchronizing each step.

    A step's time runs from its beginning to the beginning of the next step and includes data
    loading. A GPU's queued work therefore counts when the queue makes the loop wait. Logging,
    evaluation and checkpoints make a few steps long; the median is robust to them.
    """

    def __init__(self) -> None:
        self._begins: list[float] = []
        self._state_bytes: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the measurement of memory."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes the time."""
        self._begins.append(time.perf_counter())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Counts the optimizer's state."""
        self._state_bytes = state_bytes(kwargs["optimizer"])

    def results(self) -> dict[str, float | int | None]:
        """Returns the measurements.

        Returns:
            ``state_bytes``: the bytes of all tensors in the optimizer's state. A sharded tensor
            counts with the shards of all processes. None before the end of training.
            ``peak_memory_mib``: this process's peak: of the GPU's allocator, or without a GPU of
            all its memory.
            ``median_step_ms``: None after fewer than two steps.
        """
        times = [end - begin for begin, end in zip(self._begins, self._begins[1:], strict=False)]
        return {
            "state_bytes": self._state_bytes,
            "peak_memory_mib": peak_memory_mib(),
            "median_step_ms": 1e3 * statistics.median(times) if times else None,
        }


class LoggedFigures(TrainerCallback):
    """A callback that adds figures to Trainer's logs of training.

    It must run before the callbacks that report logs; ``watch`` puts it there.
    """

    def figures(
        self, args: TrainingArguments, state: TrainerState, **kwargs: Any
    ) -> dict[str, Any]:
        """Returns the figures for the current log: numbers by name."""
        raise NotImplementedError

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the figures to a log of training and to ``state.log_history``."""
        if logs is not None and "loss" in logs:
            figures = self.figures(args, state, **kwargs)
            logs.update(figures)
            state.log_history[-1].update(figures)
