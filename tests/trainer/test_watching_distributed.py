"""Watching two processes: replicas of DDP under Trainer, and shards of FSDP2.

On a CPU accelerate runs DDP instead of FSDP, so the test steps the sharded model itself and sends
Trainer's events.
"""

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from trainer_runs import Counting, arguments, tiny_model
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from striped_hf.cli import destroy_process_group
from striped_hf.optim import StripedAdamW
from striped_hf.trainer.callbacks import state_bytes
from striped_hf.trainer.gradient_health import GradientHealth
from striped_hf.trainer.watching import state_bytes_by_kind, watch

WORLD = 2
# gradient values, written into one row of each process
BAD = [float("nan"), float("inf"), 1.0]


def stepped(args: TrainingArguments, sharded: bool) -> dict[str, Any]:
    """Takes two steps on one batch; returns the figures, and the optimizer's state."""
    model = tiny_model("gpt2").eval()  # eval: no dropout
    if sharded:
        for block in model.transformer.h:
            fully_shard(block)
        fully_shard(model)
        assert all(isinstance(param, DTensor) for param in model.parameters())
    optimizer = StripedAdamW(model.parameters(), lr=1e-2, momentum_dtype="int8")
    health = GradientHealth()
    clip = health.recording(torch.nn.utils.clip_grad_norm_)
    state, control = TrainerState(logging_steps=2), TrainerControl()
    events = {"model": model, "optimizer": optimizer}
    ids = torch.stack([Counting()[i]["input_ids"] for i in range(8)])
    for step in range(2):
        health.on_step_begin(args, state, control, **events)
        model(input_ids=ids, labels=ids).loss.backward()
        if step == 1:
            grad = model.transformer.wte.weight.grad
            local = grad.to_local() if sharded else grad
            first = torch.distributed.get_rank() == 0
            if first or not sharded:
                local[0, :3] = torch.tensor(BAD)
            if not first or not sharded:
                local[-1, :3] = torch.tensor(BAD)
        clip(model.parameters(), 1.0)
        health.on_pre_optimizer_step(args, state, control, **events)
        if step == 0:
            optimizer.step()
        health.on_optimizer_step(args, state, control, **events)
        optimizer.zero_grad()
        state.global_step += 1
        if step == 0:
            first_figures = health.figures(args, state, **events)
    return {
        "first": first_figures,
        "second": health.figures(args, state, **events),
        "state": state_bytes_by_kind(optimizer),
        "state_bytes": state_bytes(optimizer),
    }


def main(rank: int, port: int, folder: str) -> None:
    train(rank, port, folder)
    destroy_process_group()


def train(rank: int, port: int, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    torch.set_num_threads(1)
    args = arguments(folder, max_steps=4, logging_steps=2, ddp_backend="gloo")
    trainer = Trainer(tiny_model("gpt2"), args, train_dataset=Counting())
    watch(trainer, peak_tflops=0.5)
    trainer.train()
    assert args.world_size == WORLD
    results = {
        "ddp": [entry for entry in trainer.state.log_history if "loss" in entry],
        "whole": stepped(args, sharded=False),
        "sharded": stepped(args, sharded=True),
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(results), encoding="utf-8")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("watching")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.path.insert(0, str(Path(__file__).parent))  # the processes import this module
    torch.multiprocessing.spawn(main, (port, str(folder)), WORLD)
    return [
        json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(WORLD)
    ]


@pytest.mark.slow
def test_replicas_log_the_same_figures_and_count_all_tokens(results):
    ours, theirs = (result["ddp"] for result in results)
    assert len(ours) == 2
    for mine, other in zip(ours, theirs, strict=True):
        for key in set(mine) - {"tokens_per_second", "mfu", "peak_memory_mib"}:
            assert mine[key] == other[key]
        operations = mine["mfu"] * 0.5e12 / (mine["tokens_per_second"] / WORLD)
        assert 1e4 < operations < 1e6  # MFU uses one process's tokens and peak
        assert mine["nonfinite_values"] == 0


@pytest.mark.slow
def test_figures_of_shards_equal_those_of_the_whole_model(results):
    for result in results:
        whole, sharded = result["whole"], result["sharded"]
        assert set(whole["first"]) == set(sharded["first"])
        for key, value in whole["first"].items():
            assert sharded["first"][key] == pytest.approx(value, rel=1e-3), key
        assert sharded["second"]["nonfinite_steps"] == 1
        assert sharded["second"]["nonfinite_values"] == whole["second"]["nonfinite_values"] == 4


@pytest.mark.slow
def test_a_process_logs_the_bytes_of_its_shards(results):
    (first, second), whole = (r["sharded"]["state"] for r in results), results[0]["whole"]["state"]
    # the momentum and the row stripes are sharded; the column stripes are not
    assert first["exp_avg"] + second["exp_avg"] == whole["exp_avg"]
    assert max(first["exp_avg"], second["exp_avg"]) < 0.6 * whole["exp_avg"]
    assert first["exp_avg_sq_row"] + second["exp_avg_sq_row"] == whole["exp_avg_sq_row"]
    assert first["exp_avg_sq_col"] == whole["exp_avg_sq_col"]


@pytest.mark.slow
def test_a_runs_state_bytes_count_all_shards(results):
    """For the bytes per parameter, the parameters of all processes count, too."""
    whole = results[0]["whole"]["state_bytes"]
    assert [result["sharded"]["state_bytes"] for result in results] == [whole, whole]
