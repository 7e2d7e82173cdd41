"""Watching a run: speed, memory and the health of its gradients, in every log.

``watch(trainer)`` adds them to each log of training, beside the loss: in the console, in
``trainer_state.json`` and in every tracker of ``report_to``.

Nothing waits for a GPU between two logs: measurements stay on the device until then.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from striped_hf.trainer.callbacks import LoggedFigures
from striped_hf.trainer.flops import device_peak_tflops, flops_per_token
from striped_hf.trainer.gradient_health import GradientHealth
from striped_hf.trainer.memory import peak_memory_mib, tensor_bytes


def watch(trainer: Trainer, peak_tflops: float | None = None) -> None:
    """Makes a Trainer log its speed, its memory and the health of its gradients.

    Every log with a ``loss`` gets the figures of :class:`Throughput`, :class:`MemoryUse` and
    :class:`GradientHealth`. The progress bar shows loss and tokens per second. To remove a
    callback again: ``trainer.remove_callback(GradientHealth)``.

    Args:
        trainer: Any ``transformers.Trainer``, before ``train()``.
        peak_tflops: The device's peak in dense bfloat16 TFLOPS, for MFU. None: look it up in the
            table of ``striped_hf.trainer.flops``; a device not in the table gets no MFU.

    Raises:
        ValueError: The peak is not positive.
    """
    if peak_tflops is not None and not peak_tflops > 0:
        raise ValueError(
            f"peak_tflops={peak_tflops}: must be positive, the device's dense bfloat16 TFLOPS"
        )
    throughput, health = Throughput(peak_tflops), GradientHealth()
    # Trainer has no event with a step's inputs, and none with its gradients before clipping
    trainer.training_step = throughput.counting(trainer.training_step)  # type: ignore[method-assign]
    accelerator = trainer.accelerator
    accelerator.clip_grad_norm_ = health.recording(accelerator.clip_grad_norm_)
    # before the trackers' callbacks, which come first in Trainer's list
    trainer.callback_handler.callbacks[:0] = [throughput, MemoryUse(), health]
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ThroughputBar())


class Throughput(LoggedFigures):
    """Logs tokens per second since the last log, and MFU if the device's peak is known.

    - ``tokens_per_second``: the tokens of ``input_ids``, including padding, over all processes
      (each is assumed to have as many as this one). The time of evaluation and checkpoints is
      excluded.
    - ``mfu``: see ``striped_hf.trainer.flops``; 1 is the peak of all devices.

    Args:
        peak_tflops: As for :func:`watch`.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        self._peak_tflops = peak_tflops
        self._begin: float | None = None  # of the interval
        self._last_event = self._paused = 0.0
        self._tokens = self._positions = 0  # positions: the sequence length, summed over tokens

    def counting(self, training_step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Wraps ``Trainer.training_step`` to count its tokens."""

        @functools.wraps(training_step)
        def counted(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
            tokens = inputs.get("input_ids")
            if isinstance(tokens, Tensor) and tokens.ndim:
                self._tokens += tokens.numel()
                self._positions += tokens.numel() * tokens.shape[-1]
            return training_step(model, inputs, *args, **kwargs)

        return counted

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finds the device's peak, and clears the figures of an earlier run."""
        if self._peak_tflops is None and not args.use_cpu:
            self._peak_tflops = device_peak_tflops()
        self._begin = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins the first interval; each later one begins at the end of the one before."""
        if self._begin is None:
            self._restart()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes the time at which evaluation or a checkpoint may begin."""
        self._last_event = time.perf_counter()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Excludes the time of the evaluation."""
        now = time.perf_counter()
        self._paused += now - self._last_event
        self._last_event = now

    on_save = on_evaluate

    def figures(
        self, args: TrainingArguments, state: TrainerState, **kwargs: Any
    ) -> dict[str, Any]:
        """Returns the speed of the interval that ends here, and begins the next."""
        if self._begin is None or self._tokens == 0:
            return {}
        # Trainer has read the loss, so the device has finished the interval's work
        per_second = self._tokens / (time.perf_counter() - self._begin - self._paused)
        length = self._positions / self._tokens
        self._restart()
        figures = {"tokens_per_second": round(per_second * args.world_size)}
        operations = flops_per_token(kwargs["model"], length) if self._peak_tflops else None
        if self._peak_tflops and operations is not None:
            devices = max(1, args.n_gpu)  # of this process
            mfu = operations * per_second / (1e12 * self._peak_tflops * devices)
            return {**figures, "mfu": mfu}
        return figures

    def _restart(self) -> None:
        self._begin = self._last_event = time.perf_counter()
        self._paused = 0.0
        self._tokens = self._positions = 0


class MemoryUse(LoggedFigures):
    """Logs this process's peak memory and the size of its optimizer state.

    - ``peak_memory_mib``: of the GPU's allocator, or without a GPU of the whole process.
    - ``state_mib_exp_avg``, ...: the size of the optimizer's state entries, by key; logged only
      when a size has changed.
    """

    def __init__(self) -> None:
        self._logged: dict[str, float] = {}

    def figures(
        self, args: TrainingArguments, state: TrainerState, **kwargs: Any
    ) -> dict[str, Any]:
        """Returns the peak, and the state's sizes if they have changed."""
        sizes = {
            f"state_mib_{kind}": size / 2**20
            for kind, size in state_bytes_by_kind(kwargs["optimizer"]).items()
        }
        new = sizes if sizes != self._logged else {}
        self._logged = sizes
        return {"peak_memory_mib": round(peak_memory_mib()), **new}


class ThroughputBar(ProgressCallback):
    """Trainer's progress bar with the last logged loss and tokens per second."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the log above the bar, and its loss and speed into it."""
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None and logs is not None and "loss" in logs:
            shown = {"loss": f"{logs['loss']:.4f}"}
            if "tokens_per_second" in logs:
                shown["tok/s"] = f"{logs['tokens_per_second']:,}"
            self.training_bar.set_postfix(shown)


def state_bytes_by_kind(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Returns the bytes of an optimizer's state on this process by key, without ``step``."""
    kinds: dict[str, list[Any]] = {}
    for state in optimizer.state.values():
        for kind, value in state.items():
            kinds.setdefault(kind, []).append(value)
    sizes = {kind: tensor_bytes(values) for kind, values in kinds.items()}
    return {kind: size for kind, size in sizes.items() if size and kind != "step"}
