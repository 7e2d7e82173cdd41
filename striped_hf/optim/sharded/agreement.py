"""Makes all processes agree on the sums that they exchange before any of them changes a tensor.

A process only knows its own param groups. If another process has other sharded matrices, or the
same ones in another order, an all-reduce adds up sums of different matrices, or waits forever.

Every all-reduce therefore begins with a header: whether the process has failed, and the bits of a
checksum of the list of parameters. Each bit is +1 or -1. So a sum over n processes is +n or -n only
if all of them agree, and every process can see it.

The length of an all-reduce follows from the list that all processes of the group agreed on last.
At first that is an empty list, and only headers are exchanged. A process whose list has changed
sends one more all-reduce of the old length, without sums. If all others do the same with the same
checksum, the new list is agreed on. If not, all of them have seen a difference.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from striped_hf.optim.sharded.layout import Placements, is_elsewhere, is_sharded
from striped_hf.optim.state import Description

MeshDimension = tuple[DeviceMesh, int]

_BITS = 32
_HEADER = 1 + _BITS
_TEXT_BYTES = 1024  # the length of a message that processes send each other after a failure


class Item(NamedTuple):
    """A parameter of which processes exchange a tensor. All of them must have equal items.

    Attributes:
        name: The parameter's name; None if its param group has no names.
        description: The parameter's description.
        placements: The parameter's placements.
        grad_placements: The gradient's placements, if they differ from the parameter's.
        has_moved: Whether the parameter was sharded anew, so that its state must follow it.
    """

    name: str | None
    description: Description
    placements: Placements
    grad_placements: Placements | None
    has_moved: bool

    @property
    def is_redistributed(self) -> bool:
        """Whether its gradient, its rows or its state are exchanged before the sums."""
        layout = self.description.layout
        assert layout is not None
        return (
            self.has_moved
            or self.grad_placements is not None
            or (layout.needs_exchange and layout.placements != self.placements)
        )

    def __str__(self) -> str:
        name = "a parameter without a name" if self.name is None else repr(self.name)
        description = self.description
        text = (
            f"{name} of shape {tuple(description.shape)}, sharded by {list(self.placements)}, with "
            f"momentum_dtype={description.momentum_dtype!r} and blocks={description.blocks}"
        )
        if self.grad_placements is not None:
            text += f" and a gradient sharded by {list(self.grad_placements)}"
        return text + ", which was sharded in another way before" if self.has_moved else text


Plan = Mapping[MeshDimension, tuple[Item, ...]]


@dataclass
class Addend:
    """A tensor that is added up over processes, along some dimensions of a mesh."""

    value: Tensor
    dims: list[MeshDimension]


class _Agreed(NamedTuple):
    """The last agreement of the processes along a mesh dimension.

    Attributes:
        items: The parameters, in their order.
        bits: The bits of their checksum.
        length: The number of elements in the next all-reduce.
    """

    items: tuple[Item, ...]
    bits: list[float]
    length: int


class Agreement:
    """The agreements of an optimizer's processes, one for each mesh dimension of an exchange.

    Call ``settle`` and ``add_up`` for one mesh dimension after the other, in the order of
    ``mesh_dims``, and ``check`` at the end. Then no two processes wait for each other.
    """

    def __init__(self) -> None:
        self._agreed: dict[MeshDimension, _Agreed] = {}
        self._headers: list[tuple[MeshDimension, Tensor, tuple[Item, ...]]] = []
        self._problem: str | None = None
        self._has_failed = False

    def mesh_dims(self, plan: Plan) -> list[MeshDimension]:
        """Returns the mesh dimensions of a plan and of the last one, in the same order everywhere.

        Args:
            plan: For each mesh dimension, the parameters of which a tensor is exchanged.
        """
        return sorted({**plan, **self._agreed}, key=_order)

    def settle(self, mesh_dim: MeshDimension, items: tuple[Item, ...]) -> bool:
        """Returns whether sums may be exchanged; agrees on ``items`` if they have changed here.

        Args:
            mesh_dim: The mesh dimension of the exchange.
            items: The items that this process would exchange.
        """
        agreed = self._agreed.get(mesh_dim)
        if not self._has_failed and agreed is not None and agreed.items == items:
            return True  # the header of the sums shows whether other processes have changed
        bits = _checksum(items)
        header = _all_reduced_header(mesh_dim, bits, agreed, failed=self._has_failed)
        if not _is_unanimous(header, mesh_dim):
            self._has_failed = True
            self._headers.append((mesh_dim, header, items))
            return False
        if items:
            self._agreed[mesh_dim] = _Agreed(items, bits, _HEADER)
        else:
            del self._agreed[mesh_dim]
        return bool(items)

    def add_up(self, mesh_dim: MeshDimension, addends: Iterable[Addend]) -> None:
        """Adds up tensors over the processes along a mesh dimension, in one all-reduce.

        Args:
            mesh_dim: A mesh dimension for which ``settle`` returned True.
            addends: float32, with the same shapes in all processes. The addends of this dimension
                get the sum as their value.
        """
        mesh, _ = mesh_dim
        added = [addend for addend in addends if mesh_dim in addend.dims]
        items, bits, _ = self._agreed[mesh_dim]
        device = added[0].value.device if added else torch.device(mesh.device_type)
        header = torch.tensor([0.0, *bits], dtype=torch.float32, device=device)
        flat = torch.cat([header, *(addend.value.flatten() for addend in added)])
        total = _all_reduce(flat, mesh_dim).to(device)
        sizes = [addend.value.numel() for addend in added]
        total_header, *sums = total.split([_HEADER, *sizes])
        for addend, summed in zip(added, sums, strict=True):
            addend.value = summed.view(addend.value.shape)
        self._headers.append((mesh_dim, total_header, items))
        if any(item.is_redistributed for item in items):
            del self._agreed[mesh_dim]  # no redistribution before the processes agree again
        else:
            self._agreed[mesh_dim] = _Agreed(items, bits, flat.numel())

    def check(self) -> None:
        """Raises RuntimeError, in all processes, unless they agreed on the whole exchange."""
        headers, self._headers = self._headers, []
        for mesh_dim, header, items in headers:
            if not _is_unanimous(header, mesh_dim):
                message = self._difference(mesh_dim, header, items)
                self._problem = self._problem or message
        problem, self._problem, self._has_failed = self._problem, None, False
        if problem is not None:
            raise RuntimeError(problem)

    def fail(self, problem: str, plan: Plan) -> None:
        """Raises RuntimeError, and makes the processes that wait for this one raise it, too.

        Args:
            problem: The reason why this process cannot step.
            plan: The plan of this process's exchange.
        """
        self._problem, self._has_failed = problem, True
        for mesh_dim in self.mesh_dims(plan):
            self.settle(mesh_dim, plan.get(mesh_dim, ()))
        self.check()

    def _difference(self, mesh_dim: MeshDimension, header: Tensor, items: tuple[Item, ...]) -> str:
        """Describes, together with the other processes, the difference between them."""
        ranks = dist.get_process_group_ranks(_group(mesh_dim))
        if header[0] > 0:
            problems = _gather_texts(mesh_dim, self._problem or "")
            failed = [(r, text) for r, text in zip(ranks, problems, strict=True) if text]
            return "; ".join(f"process {rank} cannot step: {text}" for rank, text in failed)
        hashes = _gather_hashes(mesh_dim, [_hash(str(item)) for item in items])
        differing = (
            i
            for i, column in enumerate(zip_longest(*hashes))
            if any(h != column[0] for h in column)
        )
        position = next(differing, None)
        if position is None:
            return (
                "the processes step different optimizers: call step() of the same optimizers in "
                "the same order in every process"
            )
        mine = str(items[position]) if position < len(items) else "no further one"
        texts = _gather_texts(mesh_dim, mine)
        by_text: dict[str, list[int]] = {}
        for rank, text in zip(ranks, texts, strict=True):
            by_text.setdefault(text, []).append(rank)
        what = "; ".join(f"in {_processes(of)} it is {text}" for text, of in by_text.items())
        return (
            f"the processes differ in sharded parameter {position} of those whose sums they "
            f"exchange: {what}. Give the optimizer the same parameters in the same order in every "
            "process. No parameter has changed"
        )


def count_processes(params: Iterable[Tensor], flag: bool) -> list[tuple[int, int]]:
    """Returns, for each mesh of sharded parameters, the counts of set flags and of processes.

    Every process of the meshes must call it.

    Args:
        params: Sharded or not, on meshes that this process is in or not.
        flag: This process's flag.
    """
    meshes = {
        param.device_mesh for param in params if is_sharded(param) and not is_elsewhere(param)
    }
    counts = []
    for mesh in sorted(meshes, key=lambda mesh: _order((mesh, 0))):
        count = torch.tensor([float(flag)], dtype=torch.float32)
        for dim in range(mesh.ndim):
            if mesh.size(dim) > 1:
                count = _all_reduce(count, (mesh, dim))
        counts.append((int(count.item()), mesh.size()))
    return counts


def _processes(ranks: list[int]) -> str:
    plural = "es" if len(ranks) > 1 else ""
    return f"process{plural} {', '.join(map(str, ranks))}"


@cache
def _order(mesh_dim: MeshDimension) -> tuple[list[int], tuple[int, ...], int]:
    mesh, dim = mesh_dim
    return mesh.mesh.flatten().tolist(), tuple(mesh.shape), dim


def _group(mesh_dim: MeshDimension) -> dist.ProcessGroup:
    mesh, dim = mesh_dim
    return mesh.get_group(dim)


# -------------------------------------------------------------------------------------------------
# headers
# -------------------------------------------------------------------------------------------------


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _checksum(items: tuple[Item, ...]) -> list[float]:
    """Returns the bits of a checksum of the items, each as +1 or -1."""
    digest = _hash("\n".join(map(str, items)))
    return [1.0 if digest >> i & 1 else -1.0 for i in range(_BITS)]


def _all_reduced_header(
    mesh_dim: MeshDimension, bits: list[float], agreed: _Agreed | None, failed: bool
) -> Tensor:
    """All-reduces a header without sums, in the length that the other processes expect."""
    flat = torch.zeros(agreed.length if agreed is not None else _HEADER, dtype=torch.float32)
    flat[:_HEADER] = torch.tensor([float(failed), *bits])
    return _all_reduce(flat, mesh_dim)[:_HEADER].cpu()


def _is_unanimous(header: Tensor, mesh_dim: MeshDimension) -> bool:
    mesh, dim = mesh_dim
    failed, *bits = header.tolist()
    return failed == 0 and all(abs(bit) == mesh.size(dim) for bit in bits)


def _all_reduce(flat: Tensor, mesh_dim: MeshDimension) -> Tensor:
    mesh, _ = mesh_dim
    added = flat.to(mesh.device_type)  # offloaded parameters are not on the mesh's device
    dist.all_reduce(added, group=_group(mesh_dim))
    return added


# -------------------------------------------------------------------------------------------------
# after a failure
# -------------------------------------------------------------------------------------------------


def _gather(mesh_dim: MeshDimension, values: Tensor) -> list[Tensor]:
    mesh, dim = mesh_dim
    values = values.to(mesh.device_type)
    gathered = [torch.empty_like(values) for _ in range(mesh.size(dim))]
    dist.all_gather(gathered, values, group=_group(mesh_dim))
    return [each.cpu() for each in gathered]


def _gather_hashes(mesh_dim: MeshDimension, hashes: list[int]) -> list[list[int]]:
    """Returns the hashes of all processes, which may have different numbers of them."""
    counts = [int(count) for count in _gather(mesh_dim, torch.tensor([len(hashes)]))]
    padded = hashes + [0] * (max(counts) - len(hashes))
    gathered = _gather(mesh_dim, torch.tensor(padded, dtype=torch.int64))
    return [each.tolist()[:count] for each, count in zip(gathered, counts, strict=True)]


def _gather_texts(mesh_dim: MeshDimension, text: str) -> list[str]:
    """Returns the texts of all processes; long ones are cut."""
    encoded = text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")
    gathered = _gather(mesh_dim, torch.tensor(list(encoded), dtype=torch.uint8))
    return [bytes(each.tolist()).rstrip(b"\0").decode(errors="ignore") for each in gathered]
