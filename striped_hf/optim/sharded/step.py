"""The step of sharded parameters: local statistics, one exchange of sums, local updates."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from striped_hf.optim.interface import Batch, Entry, State
from striped_hf.optim.plain import plain_gradient, plain_parameter
from striped_hf.optim.sharded.agreement import Agreement, Item, MeshDimension, Plan
from striped_hf.optim.sharded.layout import Layout, is_sharded, local_of, wrap
from striped_hf.optim.sharded.matrix import (
    Matrix,
    ShardedParameter,
    new_matrix,
    set_block_sums,
    set_stripes,
    set_sums,
)
from striped_hf.optim.views import as_stepped

# returns the state of a parameter, created if there is none, and the number of this step, from 1
StateOf = Callable[[ShardedParameter], tuple[State, int]]


@dataclass
class Exchanged:
    """The result of a step's exchange, by which the step may now change tensors.

    Attributes:
        states: The states of all parameters that are stepped.
        unused: Parameters that got a state, but have a gradient in no process.
        matrices: The matrices that are stepped, with their new stripes.
        batches: Batches of parameters that were redistributed, but whose sums need no exchange.
        copies: As ``localize`` returns them.
    """

    states: list[State] = field(default_factory=list)
    unused: list[DTensor] = field(default_factory=list)
    matrices: list[Matrix] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def localize(
    sharded: ShardedParameter, state: State, step: int
) -> tuple[list[Entry], Tensor, list[tuple[Tensor, Tensor]]]:
    """Returns the entries by which this process steps its part of a sharded parameter.

    Args:
        sharded: The parameter. If this process has no gradient and has folded none, the gradient is
            zero.
        state: Its state.
        step: The number of this step, from 1.

    Returns:
        Entries for a backend, none if the part is empty; and the part, a copy if it is stepped by
        rows. If no kernel can step the local tensor, also the local tensor and the copy that is
        stepped in its place.
    """
    param, layout, description = sharded.param, sharded.layout, sharded.description
    target = param.to_local()
    local_grad = None
    if sharded.folded is None:
        grad = sharded.grad
        if grad is None:
            grad = wrap(torch.zeros_like(target), param.shape, param.device_mesh, param.placements)
        local_grad = local_gradient(grad, layout)
    local = plain_parameter(target)
    dims = len(description.stepped)
    if dims != param.dim() and not local.is_contiguous():
        local = local.contiguous()
    copies = [] if local is target else [(target, local)]
    if tuple(param.placements) != layout.placements:
        # without clone it would be no copy if the parameter was sharded by rows already
        local = param.redistribute(placements=layout.placements).to_local()
        local = plain_parameter(local).clone(memory_format=torch.contiguous_format)
        copies = []  # ``_return_rows`` copies it back
    local_state = {key: value.to_local() for key, value in state.items() if is_sharded(value)}
    stepped, stepped_grad = local, local_grad
    if dims != param.dim():
        assert local_grad is not None  # only parameters stepped in their own shape are folded
        stepped, stepped_grad = as_stepped(local, dims), as_stepped(local_grad.contiguous(), dims)
        if dims == 1:
            local_state = {key: value.view(-1) for key, value in local_state.items()}
    entries = []
    for piece in layout.pieces:
        piece_state = {}
        for key, part in local_state.items():
            is_stripe = key in ("exp_avg_sq_row", "exp_avg_sq_col")
            if not (is_stripe and layout.needs_exchange):
                piece_state[key] = part[piece.col_index if key == "exp_avg_sq_col" else piece.index]
        entries.append(
            Entry(
                param=stepped[piece.index],
                grad=None if stepped_grad is None else stepped_grad[piece.index],
                state=piece_state,
                momentum_dtype=description.momentum_dtype,
                blocks=piece.blocks,
                step=step,
                whole_start=piece.whole_start,
                whole_stride=piece.whole_stride,
            )
        )
    if sharded.folded is not None:
        entries = sharded.folded.entries(entries)
    return entries, local, copies


def local_gradient(grad: Tensor, layout: Layout) -> Tensor:
    """Returns this process's part of a DTensor's gradient, placed as the momentum is."""
    assert is_sharded(grad)
    if tuple(grad.placements) != layout.placements:
        grad = grad.redistribute(placements=layout.placements)
    return plain_gradient(grad.to_local())


def plan_of(parameters: list[ShardedParameter]) -> Plan:
    """Returns, for each mesh dimension, the parameters of which a tensor is exchanged."""
    plan: dict[MeshDimension, list[Item]] = {}
    for each in parameters:
        for mesh_dim in each.mesh_dims:
            plan.setdefault(mesh_dim, []).append(each.item)
    return {mesh_dim: tuple(items) for mesh_dim, items in plan.items()}


def exchange(
    parameters: list[ShardedParameter],
    agreement: Agreement,
    states: Mapping[Tensor, State],
    state_of: StateOf,
) -> Exchanged:
    """Adds up the sums of all processes; every process of the meshes joins in.

    No tensor changes.

    Args:
        parameters: Parameters with ``mesh_dims``, with or without a gradient in this process.
        agreement: The optimizer's agreement.
        states: The optimizer's states, by parameter.
        state_of: As ``StateOf``.

    Raises:
        RuntimeError: The processes differ in their exchanges, or only some of them have a gradient
            of a matrix of which all have a part.
    """
    plan = plan_of(parameters)
    exchanged = Exchanged()
    redistributed = [each for each in parameters if each.item.is_redistributed]
    others = [each for each in parameters if not each.item.is_redistributed]
    matrices = _matrices(others, states, state_of, exchanged)
    later = []
    for mesh_dim in agreement.mesh_dims(plan):
        items = plan.get(mesh_dim, ())
        if not agreement.settle(mesh_dim, items):
            continue
        if any(item.is_redistributed for item in items):
            later.append(mesh_dim)
        else:
            agreement.add_up(mesh_dim, [a for m in matrices for a in m.addends])
    if later:
        agreement.check()  # before any redistribution
        matrices += _matrices(redistributed, states, state_of, exchanged)
        for mesh_dim in later:
            agreement.add_up(mesh_dim, [a for m in matrices for a in m.addends])
    set_stripes(matrices)
    agreement.check()  # as late as possible: on a GPU it waits for the sums
    if not matrices:
        return exchanged
    found = torch.stack([matrix.gradients.value for matrix in matrices]).tolist()
    for matrix, (present, missing) in zip(matrices, found, strict=True):
        of = matrix.of
        if present and missing:
            raise RuntimeError(
                f"{of.item} has a gradient in {present:.0f} processes and none in {missing:.0f} "
                "with other parts of it: where it has none, give it zeros (parameter.grad = "
                "torch.zeros_like(parameter)), or give it none in all processes. No parameter has "
                "changed"
            )
        if not present:
            exchanged.unused.append(of.param)
            continue
        if matrix.state is None:
            _localize(matrix, state_of(of)[0], exchanged)
        assert matrix.state is not None
        exchanged.states.append(matrix.state)
        exchanged.matrices.append(matrix)
    return exchanged


def update(exchanged: Exchanged) -> None:
    """Updates the parameters and the state of matrices by their new stripes."""
    matrices = exchanged.matrices
    if not matrices:
        return
    new = [stripe for m in matrices for stripe in (m.new_stripes.row, m.new_stripes.col)]
    torch._foreach_copy_([stripe for m in matrices for stripe in (m.row, m.col)], new)
    for of_batch in _batches(matrices):
        for is_folded in (False, True):
            some = [matrix for matrix in of_batch if (matrix.of.folded is not None) is is_folded]
            entries = [entry for matrix in some for entry in matrix.entries]
            roots = [root for matrix in some for root in matrix.new_stripes.roots]
            of_batch[0].of.backend.update(entries, roots, of_batch[0].of.settings)
    for matrix in matrices:
        _return_rows(matrix)


def _batches(matrices: list[Matrix]) -> list[list[Matrix]]:
    """Returns the matrices by param group and device."""
    batches: dict[tuple[int, torch.device], list[Matrix]] = {}
    for matrix in matrices:
        key = (id(matrix.of.settings), matrix.of.param.device)
        batches.setdefault(key, []).append(matrix)
    return list(batches.values())


def _matrices(
    parameters: list[ShardedParameter],
    states: Mapping[Tensor, State],
    state_of: StateOf,
    exchanged: Exchanged,
) -> list[Matrix]:
    """Returns the matrices among the parameters, with this process's sums.

    A matrix without a gradient adds only its row stripe, and gets no state and no entries here. A
    redistributed matrix is treated as if its gradient were zero, because all processes must join
    in. Parameters whose sums need no exchange go to ``exchanged``.
    """
    matrices = []
    for each in parameters:
        if not each.has_gradient and not each.item.is_redistributed:
            state = states.get(each.param, {})
            step = int(state["step"].item()) + 1 if state else 1
            matrices.append(new_matrix(each, step, state))
            continue
        state, step = state_of(each)
        if each.layout.needs_exchange:
            matrices.append(new_matrix(each, step, state))
            _localize(matrices[-1], state, exchanged)
        elif each.grad is not None:
            entries, _, copies = localize(each, state, step)
            exchanged.states.append(state)
            exchanged.copies += copies
            if entries:
                exchanged.batches.append(Batch(each.backend, each.settings, entries))
    for of_batch in _batches(matrices):
        set_sums(of_batch)
    if matrices:
        set_block_sums([matrix for matrix in matrices if matrix.of.layout.row_dims])
    return matrices


def _localize(matrix: Matrix, state: State, exchanged: Exchanged) -> None:
    """Gives a matrix its entries, its state and the state's stripes."""
    matrix.state = state
    matrix.entries, matrix.local, copies = localize(matrix.of, state, matrix.step)
    matrix.row, matrix.col = local_of(state["exp_avg_sq_row"]), local_of(state["exp_avg_sq_col"])
    exchanged.copies += copies


def _return_rows(matrix: Matrix) -> None:
    """Copies a parameter that was stepped by rows back to its own placements."""
    param, layout = matrix.of.param, matrix.of.layout
    if tuple(param.placements) == layout.placements:
        return
    stepped = wrap(matrix.local, param.shape, param.device_mesh, layout.placements)
    param.to_local().copy_(stepped.redistribute(placements=param.placements).to_local())
