"""Times of a call on a GPU, and of its host; on a CPU they only rehearse."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measuring import seconds, synchronize

SLEEP_CYCLES = 60_000_000  # about 30 ms: longer than the host takes to queue a step
LONG_SLEEP_CYCLES = 400_000_000  # about 200 ms: to queue two launches for every matrix


def device_ms(
    device: torch.device, call: Callable[[], Any], sleep_cycles: int = SLEEP_CYCLES
) -> float:
    """Returns the device time of a call whose work is all queued, in milliseconds."""
    if device.type != "cuda":
        return 1e3 * seconds(device, call)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronize(device)
    torch.cuda._sleep(sleep_cycles)
    begin.record()
    call()
    end.record()
    synchronize(device)
    return begin.elapsed_time(end)


def host_ms(device: torch.device, call: Callable[[], Any], rounds: int) -> float:
    """Returns how long a call takes to return while the device is busy, in milliseconds."""
    times = []
    for _ in range(rounds):
        synchronize(device)
        if device.type == "cuda":
            torch.cuda._sleep(SLEEP_CYCLES)
        begin = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - begin))
    synchronize(device)
    return statistics.median(times)


def kernel_ms(device: torch.device, call: Callable[[], Any], calls: int = 3) -> dict[str, float]:
    """Returns each kernel's device time in a call, in milliseconds; empty on a CPU."""
    if device.type != "cuda":
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            call()
        synchronize(device)
    times = {event.key: event.self_device_time_total for event in profiler.key_averages()}
    return {name: us / 1e3 / calls for name, us in times.items() if us > 0}


def graph_ms(device: torch.device, step: Callable[[], Any], rounds: int) -> float | None:
    """Returns the device time of a step replayed as a CUDA graph, in milliseconds."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return statistics.median(device_ms(device, graph.replay) for _ in range(rounds))
