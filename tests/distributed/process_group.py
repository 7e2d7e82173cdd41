"""Runs a case in the processes of one process group."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

CASES = (
    "training_cases",
    "layerwise_cases",
    "checkpoint_cases",
    "convolution_cases",
    "agreement_cases",
    "fsdp2_trainer",
)
IMPORTED_BY = os.getpid()


def run(
    case: Callable[[DeviceMesh, Path], None], processes: int, folder: Path, minutes: float = 20
) -> str | None:
    """Runs a case in separate processes, on a mesh of all of them.

    Args:
        case: A function that every process calls with the mesh and ``folder``.
        processes: The number of processes.
        folder: The folder for the case's files.
        minutes: The time after which processes that wait for each other fail.

    Returns:
        The traceback of the first error; None if there was none.
    """
    shared = folder / f"processes-{time.monotonic_ns()}"
    shared.mkdir()
    start_fork_server()
    context = torch.multiprocessing.start_processes(
        work,
        (case, processes, shared, folder, minutes),
        nprocs=processes,
        join=False,
        start_method="forkserver",
    )
    deadline = time.monotonic() + 60 * minutes
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
    """Starts the process whose forks run the cases: an import takes seconds, a fork almost no time.

    It finds its imports by PYTHONPATH alone, and does not report missing ones.
    """
    torch.multiprocessing.set_forkserver_preload([__name__, *CASES])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()


def work(
    rank: int, case: Callable, processes: int, shared: Path, folder: Path, minutes: float
) -> None:
    """Runs a case as one process of the group, and writes an error's traceback to ``shared``."""
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
        timeout=timedelta(minutes=minutes),
    )
    try:
        case(init_device_mesh("cpu", (processes,)), folder)
    except BaseException:
        (shared / f"error-{rank}").write_text(traceback.format_exc())
        raise
    dist.barrier()  # gloo aborts if a process ends while another still talks to it
    dist.destroy_process_group()
