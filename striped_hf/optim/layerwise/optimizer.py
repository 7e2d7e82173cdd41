"""LayerwiseStripedAdamW: StripedAdamW without stored gradients."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import ParamsT

from striped_hf.optim.checked import problem_of_step
from striped_hf.optim.checks import is_ordinary
from striped_hf.optim.interface import Entry, Group, State, Sums
from striped_hf.optim.layerwise.clipping import ForwardClipping
from striped_hf.optim.layerwise.hooks import GradientHooks, RowBlocks, RowConsumer
from striped_hf.optim.layerwise.norm_estimate import NormEstimate
from striped_hf.optim.layerwise.norms import square_norms_of_folded, square_norms_of_gradients
from striped_hf.optim.layerwise.open_matrix import OpenMatrix
from striped_hf.optim.options import settings_of
from striped_hf.optim.sharded import step as sharded_step
from striped_hf.optim.sharded.layout import is_sharded
from striped_hf.optim.state import description_of, name_of
from striped_hf.optim.steps import count_step, next_step
from striped_hf.optim.striped_adamw import StripedAdamW

logger = logging.getLogger(__name__)

# The number of elements of the smallest parameter whose gradient is freed. Smaller parameters and
# vectors have few elements: they keep their gradients until the step.
SMALLEST = 1 << 16

_NORM_KEY = "assumed_grad_norm"  # of a param group


class _Place(NamedTuple):
    """Where a parameter is in ``param_groups``."""

    group: Group
    position: int
    group_index: int


class LayerwiseStripedAdamW(StripedAdamW):
    """StripedAdamW that frees each gradient as soon as the backward pass has computed it.

    A hook folds the gradient of a matrix into its momentum and its sums of squares, and sets
    ``grad`` to None. ``step()`` then updates the parameters from the state. Parameters do not
    change during the backward pass, so that learning rate schedules, tied weights and gradient
    checkpointing work as usual. With float32 momentum, no clipping and one backward pass for each
    step the result equals StripedAdamW's to the bit. With coded momentum the update sees the stored
    momentum.

    Vectors, convolutions' kernels, and matrices of fewer than 65,536 elements keep their gradients
    until the step.

    Where several processes train and a parameter is not a DTensor (DistributedDataParallel), its
    gradient is not complete in the hook. It stays until the step, which saves no memory: use FSDP2.

    After ``zero_grad()`` in place of ``step()`` the momentum still has the dropped gradients.

    Args:
        params: As for StripedAdamW.
        max_grad_norm: Clip the gradients to this norm, as ``torch.nn.utils.clip_grad_norm_`` would.
            Do not call that function: it would see only the few gradients that are left.
            ``clipping.ForwardClipping`` explains the differences from clipping. None: do not clip.
        gradient_accumulation: Whether several backward passes may come before each step. The second
            moment is then estimated (``backends.reference.fold``), for 1/32 byte per element of a
            matrix while a step is open. An int4 momentum is kept as int8 meanwhile, in 1.03 bytes
            per element in place of 0.53 (of a sharded matrix: in addition to 0.53).
        options: As for StripedAdamW, by keyword.

    Attributes:
        gradient_hook: A function that gets a parameter and each of its gradients before the
            gradient is folded, such as to look for infinities. A gradient may come in blocks of
            rows: see ``striped_hf.losses.linear_cross_entropy``. None: no function.

    Raises:
        ValueError: As for StripedAdamW; ``max_grad_norm`` is not above zero; or ``nesterov``,
            ``lagged`` or ``capturable`` is True.
    """

    # torch.amp.GradScaler then calls step() with its own arguments, and is refused there
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        *args: Any,
        max_grad_norm: float | None = None,
        gradient_accumulation: bool = False,
        **options: Any,
    ) -> None:
        if options.get("capturable"):
            raise ValueError(
                "capturable=True cannot be combined with hooks in the backward pass: leave it out, "
                "or use StripedAdamW"
            )
        self.gradient_accumulation = gradient_accumulation
        self.gradient_hook: Callable[[Tensor, Tensor], None] | None = None
        self._clipping = ForwardClipping(None)
        self.max_grad_norm = max_grad_norm
        self._open: dict[Tensor, OpenMatrix] = {}  # since the last step
        self._places: dict[int, _Place] | None = None
        self._norm: Tensor | None = None
        self._norm_estimate: NormEstimate | None = None  # of this step
        self._hooks = GradientHooks(self._on_gradient, self._row_consumer)
        super().__init__(params, *args, **options)

    @property
    def max_grad_norm(self) -> float | None:
        """The norm that gradients are clipped to; None: they are not clipped.

        Raises:
            ValueError: The new value is not above zero.
        """
        return self._clipping.max_norm

    @max_grad_norm.setter
    def max_grad_norm(self, max_norm: float | None) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(
                f"max_grad_norm={max_norm!r} is not above zero: pass a norm, or None, which does "
                "not clip"
            )
        self._clipping.max_norm = max_norm

    def add_param_group(self, param_group: Group) -> None:
        """Adds a param group, as StripedAdamW does, and hooks its parameters.

        Raises:
            ValueError: As on construction. The optimizer has not changed then.
        """
        super().add_param_group(param_group)
        try:
            check_layerwise(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
        self._places = None
        self.attach_hooks()

    # ---------------------------------------------------------------------------------------------
    # hooks
    # ---------------------------------------------------------------------------------------------

    def attach_hooks(self) -> None:
        """Hooks every matrix that has no hook yet, such as after other code replaced parameters.

        ``step()`` does so, too. A gradient that comes before its hook stays until the step.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        self._hooks.attach(p for p in params if p.requires_grad and _is_large(p))

    def remove_hooks(self) -> None:
        """Removes all hooks. Gradients then stay until the step, as for ordinary parameters."""
        self._hooks.remove()

    @torch.no_grad()
    def _on_gradient(self, param: Tensor) -> None:
        """Folds a completed gradient, unless other processes will add to it."""
        if param.grad is None:
            return
        if not (is_sharded(param) or _is_alone()):
            _warn_of_kept_gradients()
            return
        if self._is_folded(param):
            grad, param.grad = param.grad, None
            self._fold(param, grad)

    def _row_consumer(self, param: Tensor) -> RowConsumer | None:
        """Returns a function that folds a gradient in blocks of rows; None: pass it as a whole.

        A gradient passes as a whole where other processes add to it, where an earlier one has
        stayed, where other code has hooks on it, and if the stripes are divided into blocks.
        """
        group, position, _ = self._place_of(param)
        if (
            is_sharded(param)
            or not _is_alone()
            or param.grad is not None
            or param._backward_hooks
            or not self._is_folded(param)
            or description_of(group, position).blocks != (1, 1)
        ):
            return None
        return partial(self._fold_rows, param)

    # ---------------------------------------------------------------------------------------------
    # folding
    # ---------------------------------------------------------------------------------------------

    def _fold(self, param: Tensor, grad: Tensor) -> None:
        self._add(param, self._opened(param, grad), [(None, grad)])

    @torch.no_grad()
    def _fold_rows(self, param: Tensor, blocks: RowBlocks) -> None:
        self._add(param, self._opened(param, None), blocks)

    def _add(
        self,
        param: Tensor,
        opened: OpenMatrix,
        blocks: Iterable[tuple[slice | None, Tensor]],
    ) -> None:
        step = next_step(self.state[param], capturable=False)
        settings = settings_of(self._place_of(param).group, False)
        backend = self._backend(param.device.type)
        is_decided = opened.count > 0
        for rows, grad in blocks:
            if self.gradient_hook is not None:
                self.gradient_hook(param, grad)
            if not is_decided:
                opened.coefficient = self._coefficient(param, rows, grad)
                is_decided = True
            opened.fold(grad, step, backend, settings, rows)
        opened.count += 1
        if opened.count == 1 and self._norm_estimate is not None:
            self._norm_estimate.add(param, opened.square_norm())
        self._norm = None

    def _coefficient(self, param: Tensor, rows: slice | None, grad: Tensor) -> Tensor | None:
        """Returns the factor with which clipping folds a matrix's gradients; None: 1.

        Args:
            param: The matrix.
            rows: The rows that the first of its gradients has; None: all.
            grad: That gradient.
        """
        if not self._clipping.decide():
            return None
        estimate = None
        if not (is_sharded(param) or self._clipping.is_exact):
            if self._norm_estimate is None:
                self._norm_estimate = NormEstimate(self._known_matrices())
            estimate = self._norm_estimate.norm()
            if estimate is None:
                estimate = self._norm_estimate.norm_by(param, self.state[param], rows, grad)
        return self._clipping.coefficient(param.device, estimate)

    def _known_matrices(self) -> Iterator[tuple[Tensor, State, float]]:
        """Yields what ``NormEstimate`` needs of the plain matrices that had a step."""
        for group in self.param_groups:
            for param in group["params"]:
                if not param.requires_grad or is_sharded(param) or not _is_large(param):
                    continue
                state = self.state.get(param)
                if state and "exp_avg_sq_row" in state and self._is_folded(param):
                    step = next_step(state, capturable=False) - 1
                    if step > 0:
                        yield param, state, 1 - group["betas"][1] ** step

    def _opened(self, param: Tensor, grad: Tensor | None) -> OpenMatrix:
        """Returns a matrix that is open for a gradient.

        Raises:
            RuntimeError: It got a gradient already, and gradients are not accumulated.
        """
        opened = self._open.get(param)
        if opened is None:
            return self._new_opened(param, grad)
        if not self.gradient_accumulation:
            raise RuntimeError(
                f"{self._name_of(param)} got a second gradient before step(): where that is "
                "intended, construct the optimizer with gradient_accumulation=True, or in Trainer "
                "set optim_args='gradient_accumulation=true'; checkpointed layers that share "
                "a parameter need use_reentrant=False"
            )
        return opened

    def _new_opened(self, param: Tensor, grad: Tensor | None) -> OpenMatrix:
        """Checks a matrix, creates its state where there is none, and opens it.

        Args:
            param: The matrix.
            grad: Its gradient; None if it comes in blocks of rows.

        Raises:
            RuntimeError: As ``step()``. Nothing has changed then.
        """
        group, position, _ = self._place_of(param)
        description = description_of(group, position)
        state = self.state.get(param, {})
        is_placed = grad is not None and is_ordinary(param, grad, state, description)
        if not is_placed:
            problem = problem_of_step(param, grad, state, description, capturable=False)
            if problem is not None:
                raise RuntimeError(f"{self._name_of(param)} {problem}")
        state = self._state_of(param, description, is_placed, [])
        opened = OpenMatrix(description, state, self.gradient_accumulation)
        self._open[param] = opened
        if opened.replaces_momentum:
            # not in place: an earlier state_dict() has the same dict
            self.state[param] = {k: v for k, v in state.items() if k not in opened.momentum}
        return opened

    def _is_folded(self, param: Tensor) -> bool:
        """Whether a large parameter is stepped in its own shape; a convolution's kernel is not."""
        group, position, _ = self._place_of(param)
        return description_of(group, position).stepped == param.shape

    def _place_of(self, param: Tensor) -> _Place:
        if self._places is None:
            self._refresh_groups()
            self._places = {
                id(param): _Place(group, i, group_index)
                for group_index, group in enumerate(self.param_groups)
                for i, param in enumerate(group["params"])
            }
        return self._places[id(param)]

    def _name_of(self, param: Tensor) -> str:
        return name_of(*self._place_of(param))

    def _fold_rest(self) -> None:
        """Folds the gradients of matrices that stayed until the step, such as under DDP."""
        rest = [
            param
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None and _is_large(param) and self._is_folded(param)
        ]
        if rest and not self._open and self.max_grad_norm is not None:
            # no gradient was clipped yet, so the true norm can be used instead of an assumed one
            self._clipping.assume(self._compute_norm())
        for param in rest:
            grad, param.grad = param.grad, None
            self._fold(param, grad)

    # ---------------------------------------------------------------------------------------------
    # the step
    # ---------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs one step, by the gradients of all backward passes since the last step.

        Raises:
            RuntimeError: As for StripedAdamW; a closure was passed; or ``torch.amp.GradScaler``
                calls the step, which scales gradients before they are folded.
        """
        if closure is not None:
            raise RuntimeError(
                "a layerwise optimizer takes no closure, because a second backward pass would be "
                "added to the first: call backward() yourself, or use StripedAdamW"
            )
        if hasattr(self, "grad_scale"):
            raise RuntimeError(
                "torch.amp.GradScaler unscales gradients at the step, when a layerwise optimizer "
                "has folded them: train in bfloat16 instead of float16, or use StripedAdamW"
            )
        self._update()  # super().step() would run the hooks of a step a second time
        return None

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """Returns the norm of the gradients of the next step, before clipping: [] float32.

        After several backward passes it is an estimate: within 1% where gradients have millions of
        elements, and within a few percent where they have 100,000.
        """
        self._fold_rest()
        if self._norm is None:
            self._norm = self._compute_norm()
        return self._norm

    def _compute_norm(self) -> Tensor:
        squares = square_norms_of_gradients(self._kept_gradients())
        squares += square_norms_of_folded(self._open)
        if not squares:
            return torch.zeros(())
        return torch.stack([each.to(squares[-1].device) for each in squares]).sum().sqrt()

    def _kept_gradients(self) -> list[Tensor]:
        params = [param for group in self.param_groups for param in group["params"]]
        return [param.grad for param in params if param.grad is not None]

    def _update(self) -> None:
        self._fold_rest()
        for param, opened in self._open.items():
            problem = opened.problem_of_state(param, self.state.get(param, {}))
            if problem is not None:
                raise RuntimeError(f"{self._name_of(param)} {problem}")
        if self.max_grad_norm is not None:
            self._clip(self.grad_norm())
        super()._update()
        self._update_matrices()
        self._end_step()
        self.attach_hooks()

    def _clip(self, norm: Tensor) -> None:
        """Clips the gradients that stayed, and corrects the sums of the folded gradients."""
        coefficient = self._clipping.clip(norm)
        for grad in self._kept_gradients():
            local = grad.to_local() if is_sharded(grad) else grad
            local.mul_(coefficient.to(local.device))
        of_device: dict[torch.device, list[OpenMatrix]] = {}
        for param, opened in self._open.items():
            of_device.setdefault(param.device, []).append(opened)
        for device, some in of_device.items():
            one = torch.ones((), device=device)
            used = [one if each.coefficient is None else each.coefficient for each in some]
            corrections = self._clipping.corrections(norm, torch.stack(used))
            for each, correction in zip(some, corrections.unbind(), strict=True):
                each.multiply(correction)
        self._clipping.end_step(norm)

    def _folded_of(self, param: Tensor) -> OpenMatrix | None:
        opened = self._open.get(param)
        return opened if opened is not None and opened.needs_exchange else None

    def _update_matrices(self) -> None:
        """Updates the matrices with folded gradients whose sums are not exchanged."""
        batches: dict[tuple[int, torch.device], list[Tensor]] = {}
        for param, opened in self._open.items():
            if not opened.needs_exchange:
                key = (self._place_of(param).group_index, param.device)
                batches.setdefault(key, []).append(param)
        for (group_index, device), params in batches.items():
            settings = settings_of(self.param_groups[group_index], False)
            entries: list[Entry] = []
            sums: list[Sums] = []
            copies: list[tuple[Tensor, Tensor]] = []
            states = [self.state[param] for param in params]
            for param, state in zip(params, states, strict=True):
                opened, step = self._open[param], next_step(state, capturable=False)
                if is_sharded(param):
                    group, position, _ = self._place_of(param)
                    sharded = self._sharded(settings, group, position, is_valid=True)
                    assert sharded is not None
                    sharded = replace(sharded, folded=opened)
                    pieces, _, copied = sharded_step.localize(sharded, state, step)
                else:
                    pieces, copied = opened.whole(param, state, step)
                if pieces:
                    entries += pieces
                    sums.append(opened.sums())
                copies += copied
            count_step(states, capturable=False)
            self._backend(device.type).step_folded(entries, sums, settings)
            for target, copy in copies:
                target.copy_(copy)
            changed = [p.to_local() if is_sharded(p) else p for p in params]
            torch.autograd.graph.increment_version(changed)

    def _end_step(self) -> None:
        """Stores the momentum of every open matrix in its state, and forgets the gradients."""
        for param, opened in self._open.items():
            state = self.state.get(param)
            if state:  # other code may have dropped it
                opened.close(state)
        self._forget_step()

    def _forget_step(self) -> None:
        self._open.clear()
        self._norm = self._norm_estimate = None
        self._clipping.begin_step()
        self._places = None  # other code may change the groups until the next step

    # ---------------------------------------------------------------------------------------------
    # torch.optim.Optimizer
    # ---------------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients and their sums; the momentum keeps the folded gradients."""
        super().zero_grad(set_to_none)
        self._end_step()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, as StripedAdamW does, with the norm that the next step assumes.

        Raises:
            RuntimeError: A backward pass was not followed by ``step()``.
        """
        if self._open:
            raise RuntimeError(
                "gradients were folded into the momentum since the last step: call step() before "
                "state_dict()"
            )
        assumed = self._clipping.assumed
        for group in self.param_groups:
            group.pop(_NORM_KEY, None)
            if assumed is not None:
                group[_NORM_KEY] = assumed.item()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, as StripedAdamW does.

        Raises:
            ValueError: As for StripedAdamW. The optimizer has not changed then.
        """
        super().load_state_dict(state_dict)
        self._forget_step()
        assumed = self.param_groups[0].get(_NORM_KEY) if self.param_groups else None
        self._clipping = ForwardClipping(self.max_grad_norm)
        if assumed is not None:
            self._clipping.assumed = torch.tensor(assumed, dtype=torch.float32)


def check_layerwise(options: dict[str, Any]) -> None:
    """Raises ValueError if options need a gradient in the update; they may be a param group's."""
    for option in ("nesterov", "lagged"):
        if options.get(option):
            raise ValueError(
                f"{option}=True needs each gradient in the update, which a layerwise optimizer "
                "no longer has: leave it out, or use StripedAdamW"
            )


def _is_large(param: Tensor) -> bool:
    return not is_lazy(param) and param.dim() >= 2 and param.numel() >= SMALLEST


def _is_alone() -> bool:
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


@cache  # once per process
def _warn_of_kept_gradients() -> None:
    if dist.get_rank() == 0:
        logger.warning(
            "LayerwiseStripedAdamW: several processes train parameters that are not DTensors, as "
            "under DistributedDataParallel, whose buckets keep all gradients until the step: the "
            "training is right but saves no gradient memory. To save it use FSDP2: torch's "
            "fully_shard, or fsdp_version: 2 in accelerate's config"
        )
