"""The health of a run's gradients: norms, clipping, sizes of updates, non-finite values."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import TrainerControl, TrainerState, TrainingArguments

from striped_hf.optim import LayerwiseStripedAdamW
from striped_hf.trainer.callbacks import LoggedFigures
from striped_hf.trainer.layerwise import layerwise_among

_SAMPLED_VALUES = 4096  # of each matrix; the error of a norm is 1 to 2%
_COUNTED_VALUES = 1 << 22  # at a time, to keep temporaries small


class GradientHealth(LoggedFigures):
    """Logs gradient norms, clipping, sizes of updates and non-finite values.

    Over all steps since the last log:

    - ``grad_norm_mean``, ``grad_norm_max``: mean and maximum of the finite norms before clipping.
      (Trainer's own ``grad_norm`` is the last step's norm.)
    - ``clipped_share``: the share of steps with a norm above ``max_grad_norm``, from 0 to 1.
    - ``nonfinite_steps``: the number of steps with an infinity or a NaN in the gradient.

    For the first step and each logged step only, to save time:

    - ``nonfinite_values``: the number of infinities and NaNs in the gradient. Where a layerwise
      optimizer accumulates gradients, a matrix counts by its worst backward pass.
    - ``update_ratio_attn``, ...: the norm of a matrix's update divided by the norm of the matrix,
      both estimated from 4,096 values. The figure is the largest ratio in a group of layers. A
      group has the name of its layers in a block (``attn``, ``mlp``) or in the model (``wte``).
    """

    def __init__(self) -> None:
        self._norms: list[Tensor] = []
        self._clipped_above = math.inf
        self._sampling = False
        self._layerwise: list[LayerwiseStripedAdamW] = []
        self._in_folded: dict[Tensor, Tensor] = {}  # non-finite values of gradients that are gone
        self._in_rows: dict[Tensor, tuple[int, Tensor]] = {}  # of a gradient's first rows
        self._nonfinite: Tensor | None = None
        self._before: dict[str, Tensor] = {}
        self._squares: tuple[list[str], Tensor] | None = None  # groups [n], squares [n, 2]
        self._sharded = False

    def recording(self, clip_grad_norm: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps ``Accelerator.clip_grad_norm_`` to keep the norms that it returns."""

        @functools.wraps(clip_grad_norm)
        def recorded(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
            parameters = list(parameters)
            if self._sampling:  # before clipping: a norm that is NaN makes every value NaN
                self._nonfinite = _nonfinite_values(parameters)
                for count in self._in_folded.values():
                    self._nonfinite = self._nonfinite.to(count.device) + count
                self._watch_folding(False)
            norm = clip_grad_norm(parameters, max_norm, *args, **kwargs)
            if norm is not None:  # None from DeepSpeed before its first step
                self._norms.append(norm if isinstance(norm, Tensor) else torch.tensor(norm))
            self._clipped_above = max_norm
            return norm

        return recorded

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clears the figures of an earlier run."""
        self._norms.clear()
        self._nonfinite = self._squares = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Decides whether to sample this step."""
        step = state.global_step + 1
        self._sampling = step == 1 or step % state.logging_steps == 0
        self._layerwise = layerwise_among([kwargs.get("optimizer")])
        self._watch_folding(self._sampling)

    def _watch_folding(self, watching: bool) -> None:
        self._in_folded, self._in_rows = {}, {}
        for optimizer in self._layerwise:
            optimizer.gradient_hook = self._count_nonfinite if watching else None

    def _count_nonfinite(self, param: Tensor, grad: Tensor) -> None:
        count = _nonfinite_in(grad)
        if isinstance(grad, DTensor):
            count /= _processes_with_the_same(grad)
        rows = len(grad)
        if param in self._in_rows:
            rows_before, in_rows = self._in_rows.pop(param)
            rows, count = rows + rows_before, count + in_rows
        if rows < len(param):  # the gradient comes in blocks of rows
            self._in_rows[param] = rows, count
            return
        before = self._in_folded.get(param)
        self._in_folded[param] = count if before is None else torch.maximum(count, before)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Samples the weights before the step."""
        if self._sampling:
            self._before = {
                name: _sample(param).clone() for name, param in _matrices(kwargs["model"])
            }

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compares the sample with the weights after the step."""
        if not self._before:
            return
        squares, groups = [], []
        for name, param in _matrices(kwargs["model"]):
            after = _sample(param).float()
            moved = after - self._before[name]
            squares += [moved.square().sum(), after.square().sum()]
            groups.append(layer_group(name))
            self._sharded |= isinstance(param, DTensor)
        self._squares = groups, torch.stack(squares).view(-1, 2)
        self._before = {}

    def figures(
        self, args: TrainingArguments, state: TrainerState, **kwargs: Any
    ) -> dict[str, Any]:
        """Returns the figures of the steps since the last log."""
        figures: dict[str, Any] = {}
        if self._norms:
            norms = torch.stack([_whole(norm).detach().float() for norm in self._norms]).cpu()
            finite = norms[norms.isfinite()]
            if len(finite):
                figures["grad_norm_mean"] = finite.mean().item()
                figures["grad_norm_max"] = finite.max().item()
            figures["clipped_share"] = (norms > self._clipped_above).float().mean().item()
            figures["nonfinite_steps"] = len(norms) - len(finite)
            self._norms = []
        if self._nonfinite is not None:
            figures["nonfinite_values"] = round(self._over_processes(self._nonfinite).item())
        if self._squares is not None:
            groups, squares = self._squares
            moved, weights = self._over_processes(squares).sqrt().T.tolist()
            for group, distance, length in zip(groups, moved, weights, strict=True):
                key = f"update_ratio_{group}"
                ratio = distance / length if length else 0.0
                # not max(), which can drop a NaN
                figures[key] = figures[key] if figures.get(key, -1.0) >= ratio else ratio
        self._nonfinite = self._squares = None
        return figures

    def _over_processes(self, sums: Tensor) -> Tensor:
        """Sums over the processes if parameters are sharded; replicas have the whole sums."""
        if self._sharded:
            dist.all_reduce(sums)
        return sums


def layer_group(name: str) -> str:
    """Returns the name of a parameter's group of layers.

    ``transformer.h.3.attn.c_attn.weight`` is in ``attn``, like its counterparts in other blocks;
    ``transformer.wte.weight`` is in ``wte``.
    """
    path = name.split(".")[:-1] or [name]
    in_block = [part for number, part in itertools.pairwise(path) if number.isdigit()]
    return in_block[0] if in_block else next((p for p in path[::-1] if not p.isdigit()), name)


def _matrices(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Lists the trained parameters of two or more dimensions."""
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad and p.ndim > 1]


def _local(tensor: Tensor) -> Tensor:
    """Returns this process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _sample(param: Tensor) -> Tensor:
    """Returns about 4,096 evenly spread values of this process's part: [n], in its own dtype."""
    values = _local(param.detach()).flatten()
    # an odd stride: an even one would hit only a few of the columns
    return values[:: values.numel() // _SAMPLED_VALUES | 1]


def _nonfinite_values(parameters: list[nn.Parameter]) -> Tensor:
    """Counts infinities and NaNs in gradients: a float64 scalar, to be summed over the processes.

    The norm shows whether there are any, so a healthy gradient is read only once.
    """
    gradients = [param.grad for param in parameters if param.grad is not None]
    count = 0.0
    if gradients and not get_total_norm([_local(grad) for grad in gradients]).isfinite():
        sharded = any(isinstance(grad, DTensor) for grad in gradients)
        for grad in gradients:
            found = _nonfinite_in(grad).item()
            count += found / (_processes_with_the_same(grad) if sharded else 1)
    device = gradients[0].device if gradients else None
    return torch.tensor(count, dtype=torch.float64, device=device)


def _nonfinite_in(gradient: Tensor) -> Tensor:
    """Counts infinities and NaNs in this process's part of a gradient: a float64 scalar."""
    pieces = _local(gradient).flatten().split(_COUNTED_VALUES)
    return torch.stack([piece.isfinite().logical_not_().sum() for piece in pieces]).sum().double()


def _processes_with_the_same(tensor: Tensor) -> int:
    """Counts the processes with the same values as this one, including this one."""
    if not isinstance(tensor, DTensor):
        return dist.get_world_size()
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_shard())
