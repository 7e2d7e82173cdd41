"""LayerwiseStripedAdamW: StripedAdamW without stored gradients."""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import ParamsT
from torch.utils.hooks import RemovableHandle

from striped_hf.optim import momentum
from striped_hf.optim.backends import reference
from striped_hf.optim.backends.chunks import chunks
from striped_hf.optim.checks import is_ordinary, problem_of_gradient, problem_of_state
from striped_hf.optim.clipping import ForwardClipping
from striped_hf.optim.interface import Entry, Folded, Group, State
from striped_hf.optim.options import settings_of
from striped_hf.optim.plain import plain_gradient, plain_parameter, problem_of_wrapper
from striped_hf.optim.sharded.layout import is_sharded
from striped_hf.optim.state import Description, description_of, name_of
from striped_hf.optim.striped_adamw import Checked, StripedAdamW

# Elements of the smallest parameter whose gradient is freed. Smaller ones, and vectors, are few:
# they keep their gradients until the step.
SMALLEST = 1 << 16

_NORM_KEY = "assumed_grad_norm"  # of a param group


class _Place(NamedTuple):
    """Where a parameter is in ``param_groups``."""

    group: Group
    position: int
    group_index: int


class _Matrix:
    """A matrix between its first gradient of a step and the step.

    Attributes:
        param: The parameter.
        place: Where it is.
        description: What its state is.
        folded: What its gradients left.
        momentum: ``exp_avg`` and perhaps ``exp_avg_scale``, to which gradients are added.
        momentum_dtype: The format of ``momentum``: the state's, or int8 while int4 gathers several
            gradients.
        count: How many gradients were folded.
    """

    def __init__(self, param: Tensor, place: _Place, description: Description) -> None:
        self.param, self.place, self.description = param, place, description
        self.folded: Folded
        self.momentum: State
        self.momentum_dtype = description.momentum_dtype
        self.count = 0


class LayerwiseStripedAdamW(StripedAdamW):
    """StripedAdamW that frees each gradient as soon as the backward pass has computed it.

    A hook folds the gradient of a matrix into its momentum and its sums of squares, and sets
    ``grad`` to None. ``step()`` then updates the parameters from the state. Parameters do not
    change during the backward pass, so that learning rate schedules, tied weights and gradient
    checkpointing work as usual. With float32 momentum, no clipping and one backward pass for each
    step the result equals StripedAdamW's to the bit. With coded momentum the update sees the stored
    momentum.

    Vectors and matrices of fewer than 65,536 elements keep their gradients until the step.

    Where several processes train and a parameter is not a DTensor (DistributedDataParallel), its
    gradient is not complete in the hook. It stays until the step, which saves no memory: use FSDP2.

    After ``zero_grad()`` in place of ``step()`` the momentum still has the dropped gradients.

    Args:
        params: As of StripedAdamW.
        max_grad_norm: Clip the gradients to this norm, as ``torch.nn.utils.clip_grad_norm_`` would.
            It must not be called: it would see the few gradients that are left. See
            ``clipping.ForwardClipping`` for how it differs from clipping. None: do not clip.
        gradient_accumulation: Whether several backward passes may come before each step. The second
            moment is then estimated (``backends.reference.fold``), for 1/32 float32 per element of
            a matrix while a step is open. An int4 momentum is kept as int8 meanwhile, for 1.03
            bytes per element.
        options: As of StripedAdamW, by keyword.

    Raises:
        ValueError: As StripedAdamW; ``max_grad_norm`` is not above zero; or ``nesterov``,
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
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm={max_grad_norm!r} is not above zero: pass a norm, or None, which "
                "does not clip"
            )
        if options.get("capturable"):
            raise ValueError(
                "capturable=True cannot be combined with hooks in the backward pass: leave it out, "
                "or use StripedAdamW"
            )
        self.gradient_accumulation = gradient_accumulation
        self._clipping = ForwardClipping(max_grad_norm)
        self._matrices: dict[Tensor, _Matrix] = {}  # since the last step
        self._places: dict[int, _Place] | None = None
        self._norm: Tensor | None = None
        self._handles: dict[int, RemovableHandle] = {}
        weakref.finalize(self, _remove, self._handles)
        super().__init__(params, *args, **options)

    @property
    def max_grad_norm(self) -> float | None:
        """The norm that gradients are clipped to; None: they are not clipped."""
        return self._clipping.max_norm

    @max_grad_norm.setter
    def max_grad_norm(self, max_norm: float | None) -> None:
        self._clipping.max_norm = max_norm

    def add_param_group(self, param_group: Group) -> None:
        """Adds a param group, as of StripedAdamW, and hooks its parameters.

        Raises:
            ValueError: As on construction; the optimizer has not changed then.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for option in ("nesterov", "lagged"):
            if group[option]:
                self.param_groups.pop()
                raise ValueError(
                    f"{option}=True needs each gradient in the update, which a layerwise optimizer "
                    "no longer has: leave it out, or use StripedAdamW"
                )
        self.attach_hooks()

    # ---------------------------------------------------------------------------------------------
    # hooks
    # ---------------------------------------------------------------------------------------------

    def attach_hooks(self) -> None:
        """Hooks every matrix that has no hook yet, such as after other code replaced parameters.

        ``step()`` does so, too. Gradients that come before it stay until the step.
        """
        self._places = None
        for group in self.param_groups:
            for param in group["params"]:
                if not (param.requires_grad and _is_large(param)) or self._is_hooked(param):
                    continue
                self._handles[id(param)] = _hook(self, param)

    def remove_hooks(self) -> None:
        """Leaves ordinary parameters, whose gradients stay until the step."""
        _remove(self._handles)

    def _is_hooked(self, param: Tensor) -> bool:
        handle = self._handles.get(id(param))
        # other code may have replaced the parameter, and its id may be in use again
        return handle is not None and handle.id in (param._post_accumulate_grad_hooks or ())

    @torch.no_grad()
    def _on_gradient(self, param: Tensor) -> None:
        """Folds a completed gradient, unless other processes will add to it."""
        if param.grad is None or not (is_sharded(param) or _is_alone()):
            return
        grad, param.grad = param.grad, None
        self._fold(param, grad)

    # ---------------------------------------------------------------------------------------------
    # folding
    # ---------------------------------------------------------------------------------------------

    def _fold(self, param: Tensor, grad: Tensor) -> None:
        matrix = self._matrices.get(param)
        if matrix is None:
            matrix = self._open(param, grad)
        elif not self.gradient_accumulation:
            raise RuntimeError(
                f"{_name(matrix.place)} got a second gradient before step(): construct the "
                "optimizer with gradient_accumulation=True"
            )
        group = matrix.place.group
        coefficient = self._clipping.coefficient(param.device)
        step = int(self.state[param]["step"].item()) + 1
        entry = Entry(
            param,
            plain_gradient(grad),
            matrix.momentum,
            matrix.momentum_dtype,
            matrix.description.blocks,
            step,
        )
        backend = self._backend(param.device.type)
        backend.fold(
            entry, matrix.folded, settings_of(group, False), matrix.count == 0, coefficient
        )
        matrix.count += 1
        self._norm = None

    def _open(self, param: Tensor, grad: Tensor) -> _Matrix:
        """Begins the step of a matrix: checks it, and creates what its gradients are folded into.

        Raises:
            RuntimeError: As ``step()``. Nothing has changed then.
        """
        place = self._place_of(param)
        description = description_of(place.group, place.position)
        state = self.state.get(param, {})
        checked = Checked(param, grad, description, is_ordinary(param, grad, state, description))
        if not checked.ordinary:
            problem = (
                problem_of_gradient(param, grad, capturable=False)
                or problem_of_wrapper(param)
                or problem_of_state(param, state, description)
            )
            if problem is not None:
                raise RuntimeError(f"{_name(place)} {problem}")
        matrix = _Matrix(param, place, description)
        state = self._state_of(checked)
        matrix.momentum = {key: state[key] for key in _MOMENTUM if key in state}
        if self.gradient_accumulation and matrix.momentum_dtype == "int4":
            matrix.momentum_dtype = "int8"
            matrix.momentum = _recoded(matrix.momentum, "int4", "int8", param.shape)
        matrix.folded = _nothing_folded(state, param.shape, self.gradient_accumulation)
        self._matrices[param] = matrix
        return matrix

    def _place_of(self, param: Tensor) -> _Place:
        if self._places is None:
            self._refresh_groups()
            self._places = {
                id(param): _Place(group, i, group_index)
                for group_index, group in enumerate(self.param_groups)
                for i, param in enumerate(group["params"])
            }
        return self._places[id(param)]

    def _fold_rest(self) -> None:
        """Folds the gradients of matrices that are still there, such as under DDP."""
        rest = [
            param
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None and _is_large(param)
        ]
        if rest and not self._matrices and self.max_grad_norm is not None:
            # nothing was clipped yet, so that the norm need not be assumed
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

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs one step, by the gradients of all backward passes since the last one.

        Raises:
            RuntimeError: As of StripedAdamW; a closure was passed; or ``torch.amp.GradScaler``
                calls, which scales gradients before they are folded.
        """
        if closure is not None:
            raise RuntimeError(
                "a layerwise optimizer takes no closure, because a second backward pass would be "
                "added to the first: call backward() yourself, or use StripedAdamW"
            )
        if hasattr(self, "grad_scale"):
            raise RuntimeError(
                "torch.amp.GradScaler scales gradients that a layerwise optimizer has folded by "
                "then: train in bfloat16 instead of float16, or use StripedAdamW"
            )
        return super().step()

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """Returns the norm of the gradients of the step to come, before clipping: [] float32.

        After several backward passes it is an estimate, within about 1%.
        """
        self._fold_rest()
        if self._norm is None:
            self._norm = self._compute_norm()
        return self._norm

    def _compute_norm(self) -> Tensor:
        matrices = self._matrices.values()
        squares = [
            matrix.folded.row_sums.sum() if matrix.count == 1 else _sum_of_squares(matrix.folded)
            for matrix in matrices
        ]
        kept = torch.nn.utils.get_total_norm(self._kept_gradients())
        device = squares[0].device if squares else kept.device
        total = kept.to(device).square()
        if squares:
            coefficient = self._clipping.coefficient(device)
            folded = torch.stack([each.to(device) for each in squares]).sum()
            total = total + (folded if coefficient is None else folded / coefficient.square())
        return total.sqrt()

    def _kept_gradients(self) -> list[Tensor]:
        params = [param for group in self.param_groups for param in group["params"]]
        return [param.grad for param in params if param.grad is not None]

    def _update(self) -> None:
        self._fold_rest()
        self._check_matrices()
        correction = None
        if self.max_grad_norm is not None:
            norm = self.grad_norm()
            correction = self._clipping.correction(norm)
            coefficient = self._clipping.clip(norm)
            for grad in self._kept_gradients():
                grad.mul_(coefficient.to(grad.device))
        super()._update()
        self._update_matrices(correction)
        if self.max_grad_norm is not None:
            self._clipping.end_step(norm)
        self._forget_step()
        self.attach_hooks()

    def _check_matrices(self) -> None:
        for matrix in self._matrices.values():
            problem = problem_of_state(
                matrix.param, self.state.get(matrix.param, {}), matrix.description
            )
            if problem is not None:
                raise RuntimeError(f"{_name(matrix.place)} {problem}")

    def _update_matrices(self, correction: Tensor | None) -> None:
        """Updates the matrices whose gradients were folded.

        Args:
            correction: [] float32, what the folded gradients are to be multiplied by.
        """
        batches: dict[tuple[int, torch.device], list[_Matrix]] = {}
        for matrix in self._matrices.values():
            key = (matrix.place.group_index, matrix.param.device)
            batches.setdefault(key, []).append(matrix)
        for (group_index, device), matrices in batches.items():
            settings = settings_of(self.param_groups[group_index], False)
            states = [self.state[matrix.param] for matrix in matrices]
            steps = self._count_steps(states)
            entries, sums = [], []
            for matrix, state, step in zip(matrices, states, steps, strict=True):
                blocks = matrix.description.blocks
                stepped = {**state, **matrix.momentum}
                param = plain_parameter(matrix.param)
                entries.append(Entry(param, None, stepped, matrix.momentum_dtype, blocks, step))
                row_sums, col_sums = reference.whole_sums(matrix.folded, blocks, matrix.count)
                if correction is not None:
                    factor = correction.to(device)
                    row_sums, col_sums = row_sums * factor.square(), col_sums * factor.square()
                    _multiply(matrix.momentum, factor)
                sums.append((row_sums, col_sums))
            roots = reference.stripes(entries, sums, settings)
            self._backend(device.type).update(entries, roots, settings)
            for matrix, entry in zip(matrices, entries, strict=True):
                if entry.param is not matrix.param:
                    matrix.param.copy_(entry.param)
                if matrix.momentum_dtype != matrix.description.momentum_dtype:
                    self._store(matrix)
        torch.autograd.graph.increment_version(list(self._matrices))

    def _store(self, matrix: _Matrix) -> None:
        """Stores a momentum that was kept in int8 as the state has it."""
        state, stored = self.state[matrix.param], matrix.description.momentum_dtype
        recoded = _recoded(matrix.momentum, matrix.momentum_dtype, stored, matrix.param.shape)
        for key, value in recoded.items():
            state[key].copy_(value)

    def _forget_step(self) -> None:
        self._matrices.clear()
        self._norm = None

    # ---------------------------------------------------------------------------------------------
    # torch.optim.Optimizer
    # ---------------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients, and what was folded since the last step but for the momentum."""
        super().zero_grad(set_to_none)
        self._forget_step()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, as of StripedAdamW, with the norm that the next step assumes.

        Raises:
            RuntimeError: A backward pass was not followed by ``step()``.
        """
        if self._matrices:
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
        """Loads a state, as of StripedAdamW.

        Raises:
            ValueError: As of StripedAdamW; the optimizer has not changed then.
        """
        super().load_state_dict(state_dict)
        self._forget_step()
        assumed = self.param_groups[0].get(_NORM_KEY) if self.param_groups else None
        self._clipping = ForwardClipping(self.max_grad_norm)
        if assumed is not None:
            self._clipping.assumed = torch.tensor(assumed, dtype=torch.float32)


_MOMENTUM = ("exp_avg", "exp_avg_scale")


def _is_large(param: Tensor) -> bool:
    return not is_lazy(param) and param.dim() >= 2 and param.numel() >= SMALLEST


def _is_alone() -> bool:
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def _hook(optimizer: LayerwiseStripedAdamW, param: Tensor) -> RemovableHandle:
    """Hooks a parameter. The hook does not keep the optimizer alive."""
    of = weakref.ref(optimizer)

    def on_gradient(param: Tensor) -> None:
        optimizer = of()
        if optimizer is not None:
            optimizer._on_gradient(param)

    return param.register_post_accumulate_grad_hook(on_gradient)


def _remove(handles: dict[int, RemovableHandle]) -> None:
    for handle in handles.values():
        handle.remove()
    handles.clear()


def _name(place: _Place) -> str:
    return name_of(place.group, place.position, place.group_index)


def _nothing_folded(state: State, shape: torch.Size, has_sketch: bool) -> Folded:
    row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
    sketch = None
    if has_sketch:
        sketch = row.new_zeros((*shape[:-1], momentum.scale_columns(shape[-1])))
    return Folded(torch.zeros_like(row), torch.zeros_like(col), sketch)


def _sum_of_squares(folded: Folded) -> Tensor:
    assert folded.sketch is not None
    return folded.sketch.square().sum()


def _multiply(of_state: State, factor: Tensor) -> None:
    """Multiplies a momentum: codes by their scales."""
    if factor.device.type == "cpu" and factor == 1:
        return
    of_state.get("exp_avg_scale", of_state["exp_avg"]).mul_(factor)


def _recoded(of_state: State, before: str, after: str, shape: torch.Size) -> State:
    """Returns a momentum in another integer format."""
    rows = torch.Size(shape[:-1]).numel()
    device = of_state["exp_avg"].device
    new = momentum.init(shape, after, device)
    flat_old = {key: value.view(rows, -1) for key, value in of_state.items()}
    flat_new = {key: value.view(rows, -1) for key, value in new.items()}
    for index, _ in chunks(torch.Size((rows,)), shape[-1], device):
        part = index[1:]
        values = momentum.decode(
            flat_old["exp_avg"][part], flat_old["exp_avg_scale"][part], before, shape[-1]
        )
        codes, scale = momentum.encode(values, after)
        assert scale is not None
        flat_new["exp_avg"][part] = codes
        flat_new["exp_avg_scale"][part] = scale
    return new
