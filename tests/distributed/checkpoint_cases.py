"""Checkpoints of sharded training: one function per case, which every process of a mesh calls."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded_model import WIDTH, assert_near, gathered, new_model, new_optimizer, shard, train
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh

from striped_hf.optim import StripedAdamW
from striped_hf.optim.momentum import MOMENTUM_DTYPES

# The difference of parameters after two trainings whose gradients were rounded differently, in
# relation to the largest element. If a gradient is only noise, AdamW's update has full size in
# either direction.
TRAINING = 5e-4


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
            saved_in = checkpoint_folder(folder, momentum_dtype, flat, mesh.size())
            states = get_state_dict(model, optimizer, options=options(flat))
            dcp.save(dict(zip(("model", "optimizer"), states, strict=True)), checkpoint_id=saved_in)
            train(model, optimizer.step, range(SAVED_AT, ENDED_AT))
            ended = {name: gathered(p) for name, p in model.named_parameters()}
            if mesh.get_rank() == 0:
                torch.save(ended, saved_in / "ended.pt")


def load_checkpoints(mesh: DeviceMesh, folder: Path) -> None:
    """Continues from the checkpoints of every number of processes, with another backend."""
    for momentum_dtype in MOMENTUM_DTYPES:
        for flat in (False, True):
            for saved_by in (1, 2, 3):
                saved_in = checkpoint_folder(folder, momentum_dtype, flat, saved_by)
                same = saved_by == mesh.size()
                model = shard(new_model(), mesh) if mesh.size() > 1 else new_model()
                for p in model.parameters():
                    p.data.mul_(0)
                backend = "reference" if same else "cpu"
                optimizer = new_optimizer(model, momentum_dtype, backend=backend)
                load(model, optimizer, saved_in, flat)
                train(model, optimizer.step, range(SAVED_AT, ENDED_AT))
                ended = torch.load(saved_in / "ended.pt", weights_only=True)
                for name, p in model.named_parameters():
                    what = f"{name} of {saved_in.name} on {mesh.size()}"
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
    """Gathers a full state dict on rank 0, and loads it by a broadcast; plain tensors, too."""
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


def adamw_checkpoints(mesh: DeviceMesh, folder: Path) -> None:
    """Continues from AdamW's state in every way; after a broadcast by rank 0, through an AdamW."""
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    model = shard(new_model(), mesh)
    adamw = torch.optim.AdamW(model.parameters(), lr=3e-3)
    train(model, adamw.step, range(SAVED_AT))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    sharded = get_optimizer_state_dict(model, adamw)
    dcp.save({"optimizer": sharded}, checkpoint_id=folder / "adamw")
    whole = get_optimizer_state_dict(model, adamw, options=full)

    for momentum_dtype in ("float32", "int8"):
        ended = []
        for way in ("sharded", "folder", "broadcast"):
            for name, p in model.named_parameters():
                p.data.copy_(weights[name])
            optimizer = new_optimizer(model, momentum_dtype)
            if way == "sharded":
                set_optimizer_state_dict(model, optimizer, sharded)
            if way == "broadcast":
                with pytest.raises(ValueError, match="broadcast_from_rank0"):
                    set_optimizer_state_dict(
                        model, optimizer, copy.deepcopy(whole), options=broadcast
                    )
            if way in ("folder", "broadcast"):
                other = torch.optim.AdamW(model.parameters())
                if way == "folder":
                    loaded = {"optimizer": get_optimizer_state_dict(model, other)}
                    dcp.load(loaded, checkpoint_id=folder / "adamw")
                    set_optimizer_state_dict(model, other, loaded["optimizer"])
                else:
                    set_optimizer_state_dict(model, other, copy.deepcopy(whole), options=broadcast)
                optimizer.load_state_dict(other.state_dict())
            train(model, optimizer.step, range(SAVED_AT, ENDED_AT))
            ended.append([gathered(p) for p in model.parameters()])
        for parameters in ended[1:]:
            assert all(map(torch.equal, parameters, ended[0]))


def bad_checkpoints(mesh: DeviceMesh, folder: Path) -> None:
    """Loads cut checkpoints and ones of another format or shape: an error and no change."""
    saved_in = checkpoint_folder(folder, "int8", False, mesh.size())
    short = folder / "short"
    if mesh.get_rank() == 0:
        shutil.copytree(saved_in, short)
        largest = max(short.glob("*.distcp"), key=lambda file: file.stat().st_size)
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    dist.barrier()
    wider = new_model()
    wider.sometimes = nn.Linear(WIDTH, 2 * WIDTH)
    for model, momentum_dtype, damaged, expected in (
        (new_model(), "int8", short, ""),
        (new_model(), "float32", saved_in, "momentum_dtype"),
        (new_model(), "int4", saved_in, ""),
        (wider, "int8", saved_in, ""),
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
        except BaseException as error:  # CheckpointException is not an Exception
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
