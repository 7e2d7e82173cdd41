"""The processes of the sharded tests: one function per case, on a mesh of all processes.

Every case trains a model that ``fully_shard`` or ``parallelize_module`` has sharded, and lets a
StripedAdamW of whole parameters follow: the same gradients, gathered, on copies of the same
parameters. The two may differ by float32's rounding of sums and no more.
"""

from __future__ import annotations

import copy
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from itertools import product
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from striped_hf.optim import StripedAdamW, adamw_state_dict
from striped_hf.optim.momentum import MOMENTUM_DTYPES

# of a parameter, relative to its largest element: sums in another order, a few roundings of 6e-8
# in each of the few steps that are compared
ROUNDING = 2e-6
# of two trainings whose gradients were rounded differently: where a gradient is all noise, AdamW's
# update is of full size in either direction
TRAINING = 5e-4
LOSSES = 2e-2  # 5e-3 measured at one of 50 steps, most below 1e-3, for the same reason

VOCABULARY, WIDTH = 97, 32
IMPORTED_BY = os.getpid()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        # packed, in parts of 30 rows, which 4 processes cut; a bias of keys would have no gradient
        # but noise, which AdamW blows up
        self.qkv = nn.Linear(WIDTH, 3 * 30, bias=False)
        self.out = nn.Linear(30, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).split(30, dim=-1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    """A small language model: tied embeddings, a frozen layer, and one that is not always used."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.sometimes = nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Linear(1, 6, bias=False)  # fewer columns than processes
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, step: int) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        x = x + self.frozen(x)
        if step % 3 != 1:
            x = x + self.sometimes(x)
        return self.head(x * self.gain(x[..., :1]).mean(-1, keepdim=True).tanh())


def new_model() -> Model:
    torch.manual_seed(0)
    model = Model()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def shard(model: Model, mesh: DeviceMesh | None, **options: Any) -> Model:
    """Shards over a mesh, each block in a unit of its own, and what is not always used too."""
    for module in (*model.blocks, model.sometimes):
        fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def new_optimizer(model: nn.Module, momentum_dtype: str, **arguments: Any) -> StripedAdamW:
    packed = {id(module.qkv.weight) for module in model.modules() if hasattr(module, "qkv")}
    blocks = [(3, 1) if id(p) in packed else (1, 1) for p in model.parameters()]
    group = {"params": list(model.parameters()), "blocks": blocks}
    return StripedAdamW([group], lr=3e-3, momentum_dtype=momentum_dtype, **arguments)


def batch(step: int, rows: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, 16), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, tokens: Tensor, step: int) -> Tensor:
    logits = model(tokens[:, :-1], step).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def gathered(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def own_parts(sharded: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """This process's part of a tensor, and what it would be of another: nothing is exchanged."""
    if not isinstance(sharded, DTensor):
        return sharded, whole
    mesh, placements = sharded.device_mesh, sharded.placements
    part = distribute_tensor(whole, mesh, placements, src_data_rank=None)
    return sharded.to_local(), part.to_local()


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    off = (actual.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert off <= tolerance, f"{what}: off by {off:.2e} of the largest element"


class Follower:
    """One StripedAdamW of whole parameters, and one of sharded parameters."""

    def __init__(self, model: nn.Module, optimizer: StripedAdamW, **arguments: Any) -> None:
        self.optimizer = optimizer
        self.names = dict(model.named_parameters())
        self.whole = [nn.Parameter(gathered(p)) for p in self.names.values()]
        [group] = optimizer.param_groups
        own = {"params": self.whole, "blocks": group["blocks"]}
        arguments = {"momentum_dtype": group["momentum_dtype"], **arguments}
        self.follower = StripedAdamW([own], lr=group["lr"], **arguments)

    def step(self) -> None:
        """Steps both and compares them."""
        for p, whole in zip(self.names.values(), self.whole, strict=True):
            whole.grad = None if p.grad is None else gathered(p.grad)
        self.optimizer.step()
        self.follower.step()
        for (name, p), whole in zip(self.names.items(), self.whole, strict=True):
            is_rounded = p.dtype != torch.float32
            tolerance = 2**-7 if is_rounded else ROUNDING
            stepped = gathered(p)
            assert_near(stepped, whole.detach(), tolerance, name)
            assert self.optimizer.state[p].keys() == self.follower.state[whole].keys(), name
            for key, value in self.follower.state[whole].items():
                other = self.optimizer.state[p][key]
                assert (other.shape, other.dtype) == (value.shape, value.dtype), f"{name}: {key}"
                actual, expected = own_parts(other, value)
                if other.dtype in (torch.int8, torch.uint8):
                    assert torch.equal(actual, expected), f"{name}: {key}"
                else:
                    torch.testing.assert_close(actual, expected, rtol=3e-6, atol=1e-30)
            whole.data.copy_(stepped)  # compare only this step's rounding


def train(
    model: nn.Module,
    step: Callable[[], None],
    steps: range,
    rank: int = 0,
    rows: int = 2,
    clip: float | None = 1.0,
) -> list[float]:
    """Trains on this rank's rows of each batch; returns the losses."""
    losses = []
    for t in steps:
        tokens = batch(t, rows * (rank + 1))[rows * rank :]
        loss = loss_of(model, tokens, t)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        step()
        model.zero_grad()
        losses.append(loss.item())
    return losses


# -------------------------------------------------------------------------------------------------
# training
# -------------------------------------------------------------------------------------------------


def fsdp2(mesh: DeviceMesh, folder: Path) -> None:
    """Rows over all processes: uneven and empty shards, tied embeddings, clipping."""
    for momentum_dtype in MOMENTUM_DTYPES:
        for backend in ("reference", "cpu"):
            model = shard(new_model(), mesh)
            assert all(isinstance(p, DTensor) for p in model.parameters())
            optimizer = new_optimizer(model, momentum_dtype, backend=backend)
            train(
                model, Follower(model, optimizer, backend=backend).step, range(4), mesh.get_rank()
            )


def fifty_steps(mesh: DeviceMesh, folder: Path) -> None:
    """One process on all data has the same losses as many processes on their parts."""
    single = new_model()
    optimizer = new_optimizer(single, "int8")
    expected = []
    for t in range(50):
        parts = [batch(t, 2 * (r + 1))[2 * r :] for r in range(mesh.size())]
        losses = [loss_of(single, part, t) for part in parts]
        (sum(losses) / len(losses)).backward()
        nn.utils.clip_grad_norm_(single.parameters(), 1.0)
        optimizer.step()
        single.zero_grad()
        expected.append(losses[mesh.get_rank()].item())
    model = shard(new_model(), mesh)
    actual = train(model, new_optimizer(model, "int8").step, range(50), mesh.get_rank())
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=LOSSES, atol=0)
    assert actual[-1] < actual[0]


def accumulation(mesh: DeviceMesh, folder: Path) -> None:
    """Gradients of several backward passes, exchanged after the last."""
    model = shard(new_model(), mesh)
    follower = Follower(model, new_optimizer(model, "int8"))
    for t in range(4):
        for micro in range(3):
            model.set_requires_gradient_sync(micro == 2)
            loss_of(model, batch(10 * t + micro, 2), 0).backward()
        follower.step()
        model.zero_grad()


def mixed_precision(mesh: DeviceMesh, folder: Path) -> None:
    """bfloat16 in forward, backward and the gradients' exchange; float32 parameters."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    model = shard(new_model(), mesh, mp_policy=policy)
    train(model, Follower(model, new_optimizer(model, "int8")).step, range(4), mesh.get_rank())


def low_precision(mesh: DeviceMesh, folder: Path) -> None:
    """bfloat16 parameters, rounded stochastically by the same bits as whole ones."""
    model = shard(new_model().bfloat16(), mesh)
    train(model, Follower(model, new_optimizer(model, "int8")).step, range(4), mesh.get_rank())


def cpu_offload(mesh: DeviceMesh, folder: Path) -> None:
    """Parameters on the CPU, which therefore computes the step."""
    model = shard(new_model(), mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    train(model, Follower(model, new_optimizer(model, "int4")).step, range(4), mesh.get_rank())


def by_columns(mesh: DeviceMesh, folder: Path) -> None:
    """``fully_shard`` with a placement of its own: columns, where these are even."""

    def place(parameter: nn.Parameter) -> Shard | None:
        is_even = parameter.dim() == 2 and parameter.shape[1] % mesh.size() == 0
        return Shard(1) if is_even else None

    for momentum_dtype in ("float32", "int4"):
        model = shard(new_model(), mesh, shard_placement_fn=place)
        follower = Follower(model, new_optimizer(model, momentum_dtype))
        train(model, follower.step, range(4), mesh.get_rank())


def export_to_adamw(mesh: DeviceMesh, folder: Path) -> None:
    """What ``adamw_state_dict`` returns is sharded as the parameters, and whole it is the same."""

    def by_columns(parameter: nn.Parameter) -> Shard | None:
        is_even = parameter.dim() == 2 and parameter.shape[1] % mesh.size() == 0
        return Shard(1) if is_even else None

    for momentum_dtype, place in product(("float32", "int4"), (None, by_columns)):
        model = shard(new_model(), mesh, shard_placement_fn=place)
        optimizer = new_optimizer(model, momentum_dtype)
        train(model, optimizer.step, range(3))
        exported = adamw_state_dict(optimizer)

        everything = copy.deepcopy(optimizer.state_dict())
        for values in everything["state"].values():
            values.update({key: gathered(value) for key, value in values.items()})
        whole = new_optimizer(new_model(), momentum_dtype)
        whole.load_state_dict(everything)
        expected = adamw_state_dict(whole)
        assert exported["state"].keys() == expected["state"].keys()
        assert exported["param_groups"] == expected["param_groups"]
        for position, param in enumerate(model.parameters()):
            for key, value in exported["state"].get(position, {}).items():
                assert torch.equal(gathered(value), expected["state"][position][key]), key
                assert key == "step" or value.placements == param.placements, key

        adamw = torch.optim.AdamW(model.parameters())
        adamw.load_state_dict(exported)
        train(model, adamw.step, range(3, 6))
        again = new_optimizer(model, "int8")  # and as AdamW's into another format
        again.load_state_dict(exported)
        train(model, again.step, range(6, 8))


def lagged(mesh: DeviceMesh, folder: Path) -> None:
    """The stripes of the step before."""
    model = shard(new_model(), mesh)
    optimizer = new_optimizer(model, "int8", lagged=True)
    train(model, Follower(model, optimizer, lagged=True).step, range(4), mesh.get_rank())


def hybrid(mesh: DeviceMesh, folder: Path) -> None:
    """HSDP: shards over one dimension of the mesh, replicas over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for momentum_dtype in ("float32", "int8"):
        model = shard(new_model(), mesh)
        follower = Follower(model, new_optimizer(model, momentum_dtype))
        train(model, follower.step, range(4), mesh.get_rank())


def tensor_parallel(mesh: DeviceMesh, folder: Path) -> None:
    """``parallelize_module`` inside ``fully_shard``: rows of rows, and rows and columns."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for momentum_dtype in MOMENTUM_DTYPES:
        model = new_model()
        for block in model.blocks:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block, mesh["tensor"], plan)
        shard(model, mesh["data"])
        placements = {p.placements for p in model.blocks[0].parameters()}
        assert len(placements) == 4, placements  # with and without a tensor dimension
        follower = Follower(model, new_optimizer(model, momentum_dtype))
        train(model, follower.step, range(4), mesh["data"].get_local_rank(), clip=None)


def tensor_parallel_alone(mesh: DeviceMesh, folder: Path) -> None:
    """Only some parameters are DTensors, the others whole."""
    model = new_model()
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    assert {isinstance(p, DTensor) for p in model.parameters()} == {True, False}
    follower = Follower(model, new_optimizer(model, "int8"))
    train(model, follower.step, range(4), clip=None)


def one_exchange(mesh: DeviceMesh, folder: Path) -> None:
    """A step's sums are exchanged in one all-reduce, for all parameters and groups."""
    model = shard(new_model(), mesh)
    first, *others = model.parameters()
    optimizer = StripedAdamW([{"params": [first]}, {"params": others, "lr": 1e-4}])
    loss_of(model, batch(0, 2), 0).backward()
    optimizer.step()
    loss_of(model, batch(0, 2), 0).backward()
    with torch.profiler.profile() as profile:
        optimizer.step()
    names = [event.name for event in profile.events()]
    assert sum(name == "gloo:all_reduce" for name in names) == 1, sorted(set(names))
    assert not [name for name in names if "all_gather" in name or "all_to_all" in name]


# -------------------------------------------------------------------------------------------------
# checkpoints
# -------------------------------------------------------------------------------------------------

SAVED_AT, ENDED_AT = 4, 8


def options(flat: bool) -> StateDictOptions:
    return StateDictOptions(flatten_optimizer_state_dict=flat)


def checkpoint_folder(folder: Path, momentum_dtype: str, flat: bool, processes: int) -> Path:
    return folder / f"{momentum_dtype}-{'flat' if flat else 'nested'}-{processes}"


def save_checkpoints(mesh: DeviceMesh, folder: Path) -> None:
    """Trains, saves and continues; ``load_checkpoints`` must get the same result."""
    for momentum_dtype in MOMENTUM_DTYPES:
        for flat in (False, True):
            model = shard(new_model(), mesh) if mesh.size() > 1 else new_model()
            optimizer = new_optimizer(model, momentum_dtype, backend="reference")
            train(model, optimizer.step, range(SAVED_AT))
            own = checkpoint_folder(folder, momentum_dtype, flat, mesh.size())
            states = get_state_dict(model, optimizer, options=options(flat))
            dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=own)
            train(model, optimizer.step, range(SAVED_AT, ENDED_AT))
            ended = {name: gathered(p) for name, p in model.named_parameters()}
            if mesh.get_rank() == 0:
                torch.save(ended, own / "ended.pt")


def load_checkpoints(mesh: DeviceMesh, folder: Path) -> None:
    """Continues from the checkpoints of every number of processes, with another backend."""
    for momentum_dtype in MOMENTUM_DTYPES:
        for flat in (False, True):
            for saved_by in (1, 2, 3):
                own = checkpoint_folder(folder, momentum_dtype, flat, saved_by)
                same = saved_by == mesh.size()
                model = shard(new_model(), mesh) if mesh.size() > 1 else new_model()
                for p in model.parameters():
                    p.data.mul_(0)
                backend = "reference" if same else "cpu"
                optimizer = new_optimizer(model, momentum_dtype, backend=backend)
                load(model, optimizer, own, flat)
                train(model, optimizer.step, range(SAVED_AT, ENDED_AT))
                ended = torch.load(own / "ended.pt", weights_only=True)
                for name, p in model.named_parameters():
                    what = f"{name} of {own.name} on {mesh.size()}"
                    if same:
                        assert torch.equal(gathered(p), ended[name]), what
                    else:
                        assert_near(gathered(p), ended[name], TRAINING, what)


def load(model: nn.Module, optimizer: StripedAdamW, folder: Path, flat: bool) -> None:
    states = get_state_dict(model, optimizer, options=options(flat))
    loaded = dict(zip(("model", "optimizer"), states, strict=True))
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
        options=options(flat),
    )


def load_into(
    optimizer: StripedAdamW, model: nn.Module, loaded: dict[str, Any], folder: Path
) -> None:
    dcp.load(loaded, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizer, loaded["optimizer"])


def whole_state_dicts(mesh: DeviceMesh, folder: Path) -> None:
    """A full state dict, gathered on rank 0, comes back by a broadcast; so do plain tensors."""
    for momentum_dtype in MOMENTUM_DTYPES:
        model = shard(new_model(), mesh)
        optimizer = new_optimizer(model, momentum_dtype)
        train(model, optimizer.step, range(SAVED_AT))
        full = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = copy.deepcopy(get_model_state_dict(model, options=full))
        state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=full))
        everything = copy.deepcopy(optimizer.state_dict())
        for values in everything["state"].values():
            values.update({key: gathered(value) for key, value in values.items()})
        train(model, optimizer.step, range(SAVED_AT, ENDED_AT))
        for way in ("broadcast", "plain"):
            again = shard(new_model(), mesh)
            other = new_optimizer(again, momentum_dtype)
            broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_model_state_dict(again, dict(weights), options=broadcast)
            if way == "broadcast":
                set_optimizer_state_dict(again, other, copy.deepcopy(state), options=broadcast)
            else:
                other.load_state_dict(everything)
            train(again, other.step, range(SAVED_AT, ENDED_AT))
            for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
                assert torch.equal(gathered(p), gathered(q)), f"{name}, {way}"


def bad_checkpoints(mesh: DeviceMesh, folder: Path) -> None:
    """Cut short, of another format, of another shape: an error, and nothing has changed."""
    own = checkpoint_folder(folder, "int8", False, mesh.size())
    short = folder / "short"
    if mesh.get_rank() == 0:
        shutil.copytree(own, short)
        largest = max(short.glob("*.distcp"), key=lambda file: file.stat().st_size)
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    dist.barrier()
    wider = new_model()
    wider.sometimes = nn.Linear(WIDTH, 2 * WIDTH)
    for model, momentum_dtype, damaged, expected in (
        (new_model(), "int8", short, ""),
        (new_model(), "float32", own, "momentum_dtype"),
        (new_model(), "int4", own, ""),
        (wider, "int8", own, ""),
    ):
        shard(model, mesh)
        optimizer = new_optimizer(model, momentum_dtype)
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()
        before = copy.deepcopy(optimizer.state_dict())
        states = get_state_dict(model, optimizer)
        loaded = copy.deepcopy(dict(zip(("model", "optimizer"), states, strict=True)))
        try:
            load_into(optimizer, model, loaded, damaged)
        except BaseException as error:  # CheckpointException is no Exception
            message = str(error)
        else:
            message = "no error"
        assert message != "no error", f"{damaged.name} was loaded with {momentum_dtype}"
        assert expected in message, message
        after = optimizer.state_dict()
        for key, state in before["state"].items():
            for name, value in state.items():
                other = after["state"][key][name]
                assert torch.equal(gathered(other), gathered(value)), (momentum_dtype, name)


# -------------------------------------------------------------------------------------------------
# processes
# -------------------------------------------------------------------------------------------------


def run(case: Callable[[DeviceMesh, Path], None], processes: int, folder: Path) -> str | None:
    """Runs a case in separate processes; returns the first error's traceback."""
    shared = folder / f"processes-{time.monotonic_ns()}"
    shared.mkdir()
    start_fork_server()
    context = torch.multiprocessing.start_processes(
        work,
        (case, processes, shared, folder),
        nprocs=processes,
        join=False,
        start_method="forkserver",
    )
    deadline = time.monotonic() + 1200
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                return "the processes hang"
    except Exception as error:
        return str(error)
    finally:
        for process in context.processes:
            process.kill()
    failed = sorted(shared.glob("error-*"))
    return failed[0].read_text() if failed else None


@cache
def start_fork_server() -> None:
    """Starts the process whose forks run the cases: importing takes seconds, a fork none.

    It finds what it is to import by PYTHONPATH alone, and says nothing of what it does not find.
    """
    torch.multiprocessing.set_forkserver_preload([__name__, "fsdp2_trainer"])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()


def work(rank: int, case: Callable, processes: int, shared: Path, folder: Path) -> None:
    assert os.getpid() != IMPORTED_BY, "the fork server has not imported this module"
    torch.set_num_threads(1)
    ranks = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
    }
    os.environ |= {key: str(value) for key, value in ranks.items()}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{shared}/store",
        rank=rank,
        world_size=processes,
        timeout=timedelta(minutes=20),
    )
    try:
        case(init_device_mesh("cpu", (processes,)), folder)
    except BaseException:
        (shared / f"error-{rank}").write_text(traceback.format_exc())
        raise
    dist.barrier()  # gloo aborts if a process ends while another still talks to it
    dist.destroy_process_group()
