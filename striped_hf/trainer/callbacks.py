"""Callbacks that measure a run."""

import statistics
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from striped_hf.trainer.memory import peak_memory_mib, state_bytes


class RunMeasurements(TrainerCallback):
    """Measures step time, memory and optimizer state of a run, without a synchronisation per step.

    A step's time is the time from its beginning to the next one's, data loading included, so that
    on a GPU queued work is counted where the queue makes the loop wait. The steps that are followed
    by logging, evaluation or a checkpoint are a few outliers, which the median leaves out.
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
        """Returns what was measured.

        Returns:
            ``state_bytes``: of all tensors in the optimizer's state; of sharded ones, of the
            shards of all processes together, so that they compare with the number of parameters.
            ``peak_memory_mib``: of this process: its device's allocator, or without a GPU all of
            its memory.
            ``median_step_ms``: None where fewer than two steps were made.
        """
        times = [end - begin for begin, end in zip(self._begins, self._begins[1:], strict=False)]
        return {
            "state_bytes": self._state_bytes,
            "peak_memory_mib": peak_memory_mib(),
            "median_step_ms": 1e3 * statistics.median(times) if times else None,
        }


class LoggedFigures(TrainerCallback):
    """A callback whose figures join what Trainer logs in training.

    It has to run before the callbacks that report logs, as ``watch`` puts it.
    """

    def figures(
        self, args: TrainingArguments, state: TrainerState, **kwargs: Any
    ) -> dict[str, Any]:
        """Returns the figures for the log of this moment: numbers by name."""
        raise NotImplementedError

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the figures to a log of training, for the other callbacks and in the history."""
        if logs is not None and "loss" in logs:
            figures = self.figures(args, state, **kwargs)
            logs.update(figures)
            state.log_history[-1].update(figures)
