"""Runs of two processes that are killed at any moment resume from their last whole checkpoint.

The recipe saves every second step, so that it spends about half of its time on saving. A run that
was killed and resumed any number of times must end with the bits of an undisturbed run.
"""

import contextlib
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from fork_server import ForkServer
from processes import ENVIRONMENT, RECIPE, Launch, gone, kill, logs_of_pair, start_pair
from safetensors.torch import load_file
from tiny import QUIET, TINY, read_run

pytestmark = pytest.mark.slow

KILLS = 20
FLAGS = ("--max_steps", 120, "--save_steps", 2, "--eval_steps", 2, "--warmup_steps", 2)
FLAGS += ("--logging_steps", 1, "--per_device_train_batch_size", 6)
# with dropout, so that the state of the random numbers counts, too; and with the worst checkpoint
# as the best one, so that the last checkpoint is not kept as the best
FLAGS += ("--dropout", 0.1, "--greater_is_better", "true")


def checkpoints(folder: Path) -> set[int]:
    """Returns the steps of the checkpoints whose folders have their final names."""
    if not folder.is_dir():
        return set()
    return {int(p.name.split("-")[1]) for p in folder.iterdir() if p.name.startswith("checkpoint-")}


def saving(folder: Path) -> dict[int, int]:
    """Returns the number of files of a checkpoint that is still being saved, if there is one.

    The key distinguishes two checkpoints of one step, of which the first was cut short.
    """
    with contextlib.suppress(FileNotFoundError):
        return {f.stat().st_ino: len(list(f.iterdir())) for f in (folder / "_partial").iterdir()}
    return {}


def wait_until(happened: Callable[[], bool], processes: list[psutil.Process]) -> None:
    """Waits until a run has done something, with a check every millisecond."""
    deadline = time.monotonic() + 1200
    while not happened():
        assert time.monotonic() < deadline
        assert not gone(processes, timeout=0), "the run ended by itself"
        time.sleep(0.001)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = ForkServer(os.environ | ENVIRONMENT, tmp_path_factory.mktemp("server") / "log")
    yield server
    server.end()


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def flags(small_data):
    return (*TINY, *FLAGS, *QUIET, "--data_dir", small_data)


@pytest.fixture(scope="module")
def undisturbed(server, logs, flags, tmp_path_factory):
    """Returns the folder of a run that was not killed, and the time of its first checkpoint."""
    folder = tmp_path_factory.mktemp("undisturbed")
    begin = time.monotonic()
    processes = start_pair(server, logs, RECIPE, *flags, "--output_dir", folder)
    wait_until(lambda: bool(checkpoints(folder)), processes)
    startup = time.monotonic() - begin
    assert server.statuses() == [0, 0], logs_of_pair(logs)
    return folder, startup


def resume(folder: Path) -> tuple[str, ...]:
    return ("--resume_from_checkpoint", "last") if checkpoints(folder) else ()


def assert_same_run(folder: Path, undisturbed: Path) -> None:
    for file in ("model.safetensors", "checkpoint-120/model.safetensors"):
        weights, expected = (load_file(run / file) for run in (folder, undisturbed))
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert read_run(folder)["eval_loss"] == read_run(undisturbed)["eval_loss"]
    losses = []
    for run in (folder, undisturbed):
        state = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))
        losses.append([(e["step"], e["loss"]) for e in state["log_history"] if "loss" in e])
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, 121))


def test_twenty_kills_at_random_moments(server, logs, flags, undisturbed, tmp_path):
    whole_run, startup = undisturbed
    folder = tmp_path / "run"
    chance = random.Random(1337)
    last, while_saving, whom = 0, 0, {"both": 0, "rank 0": 0, "rank 1": 0}
    for _ in range(KILLS):
        seen, left = checkpoints(folder), saving(folder).keys()
        at_start = set(seen)
        processes = start_pair(
            server, logs, RECIPE, *flags, "--output_dir", folder, *resume(folder)
        )
        further = chance.choice((0, 1, 2))  # checkpoints to wait for

        def saved(further=further, last=last, seen=seen) -> bool:
            seen |= checkpoints(folder)
            return sum(step > last for step in seen) >= further

        wait_until(saved, processes)
        if chance.random() < 0.5:
            files = chance.randrange(10)  # of 12 or so

            def is_saving(files=files, left=left) -> bool:
                now = saving(folder)
                return any(now[key] >= files for key in now.keys() - left)

            wait_until(is_saving, processes)
        else:
            time.sleep(chance.uniform(0, 0.1 if further else startup))
        victims = chance.choice(list(whom))
        kill(processes if victims == "both" else [processes[int(victims[-1])]])
        if victims != "both":  # the other process would run until a launcher ends it
            time.sleep(chance.uniform(0, 0.2))
            kill(processes)
        assert -9 in server.statuses(), logs_of_pair(logs)

        whom[victims] += 1
        while_saving += bool(saving(folder).keys() - left)
        seen |= checkpoints(folder)
        assert all(step > last for step in seen - at_start)  # it resumed after its last step
        assert max(checkpoints(folder), default=0) >= last
        last = max(checkpoints(folder), default=0)
    assert last < 120
    assert while_saving >= KILLS // 4, while_saving
    assert min(whom.values()) >= 3, whom

    start_pair(server, logs, RECIPE, *flags, "--output_dir", folder, *resume(folder))
    assert server.statuses() == [0, 0], logs_of_pair(logs)
    assert not (folder / "_partial").exists()
    assert_same_run(folder, whole_run)


def test_kills_under_accelerate_launch(flags, undisturbed, launched, tmp_path):
    """Kills all processes of a launch at once, then one of its two processes alone."""
    folder = tmp_path / "run"
    chance = random.Random(1337)
    last = 0
    for victims in ("all", 1):
        launch = Launch(
            *("ddp.yaml", RECIPE, *flags, "--output_dir", folder, *resume(folder)),
            cwd=tmp_path,
            log=f"killed-{victims}",
        )
        launched.append(launch)
        everyone = [psutil.Process(launch.process.pid)]
        wait_until(lambda last=last: max(checkpoints(folder), default=0) > last + 2, everyone)
        wait_until(lambda: bool(saving(folder)), everyone)
        workers = launch.workers()
        assert sorted(workers) == [0, 1]
        time.sleep(chance.uniform(0, 0.05))
        if victims == "all":
            kill([*everyone, *workers.values()])
            launch.process.wait()
        else:
            kill([workers[victims]])
            launch.wait(status=1)  # it notices the end of one process, and ends the other
        assert gone(list(workers.values()))
        last = max(checkpoints(folder))

    end = Launch(
        *("ddp.yaml", RECIPE, *flags, "--output_dir", folder, *resume(folder)),
        cwd=tmp_path,
        log="end",
    )
    launched.append(end)
    end.wait()
    assert_same_run(folder, undisturbed[0])
