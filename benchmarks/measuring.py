"""Measurements of a call: its time, its temporary memory, and the size of a saved state dict.

Memory on a CPU is the process's resident memory as Linux counts it, so it includes allocations of C
code. On a GPU it is the memory that torch's allocator has handed out.
"""

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Options of glibc's mallopt: how much free memory to keep at the end of the heap, and the smallest
# allocation with its own mapping, which returns to the system when it is freed
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_PR_SET_THP_DISABLE = 41

STEADY = 0.15  # a baseline is usable if its quartiles differ by at most this fraction of its median


def synchronize(device: torch.device) -> None:
    """Waits until a device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, call: Callable[[], Any], repeat: int = 1) -> float:
    """Returns the mean time of a call, over ``repeat`` calls one after another, in seconds."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeat):
        call()
    synchronize(device)
    return (time.perf_counter() - begin) / repeat


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Returns first quartile, median and third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def is_steady(baseline: list[float]) -> bool:
    """Tells whether a baseline's times vary little enough (``STEADY``) for its run to be quoted."""
    first, median, third = quartiles(baseline)
    return third - first <= STEADY * median


def temporary_bytes(device: torch.device, call: Callable[[], Any]) -> int | None:
    """Returns the peak rise of memory during a call, in bytes; exact to about 0.1 MiB on a CPU.

    Memory that the call allocates and keeps counts too, so measure the second call. On a CPU, call
    ``return_freed_memory`` before the process makes any large tensor: freed memory that malloc
    keeps makes the count wrong.

    Returns:
        None if the system has no such counter. On a CPU only Linux has one.
    """
    gc.collect()  # collect now: a collection during the call would change the count
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _trim()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
        before = _status("VmRSS")
    except OSError:
        return None
    call()
    return _status("VmHWM") - before


def return_freed_memory() -> None:
    """Makes malloc return freed memory to the system at once, and turns huge pages off.

    A huge page would count 2 MiB for a few bytes. Allocation is slower for the rest of the process.
    The function does nothing if the C library is not glibc.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 128 << 10)
        libc.mallopt(_M_TRIM_THRESHOLD, 0)
        libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    except (OSError, AttributeError, TypeError):
        return
    _trim()


def _trim() -> None:
    """Gives the free pages of malloc's heap back, so that new allocations in them count."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _status(key: str) -> int:
    """Returns an entry of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


class _Counter:
    """A file that keeps only the number of bytes written to it."""

    size = 0

    def write(self, data: Any) -> int:
        written = memoryview(data).nbytes
        self.size += written
        return written

    def flush(self) -> None:
        pass


def checkpoint_bytes(state_dict: Any) -> int:
    """Returns the size of the file that ``torch.save`` would make, without making it."""
    file = _Counter()
    checked = torch.serialization.get_crc32_options()
    # one second for each gigabyte, and nothing is stored
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state_dict, file)  # type: ignore[arg-type]
    finally:
        torch.serialization.set_crc32_options(checked)
    return file.size


def copy_gb_s(device: torch.device) -> float:
    """Measures the bandwidth of copying 256 MiB: bytes read and written, in 10^9 a second."""
    source = torch.ones(64 << 20, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    # several copies: the first one after a synchronisation waits for its launch
    times = [seconds(device, lambda: target.copy_(source), 20) for _ in range(9)]
    return 2 * source.nbytes / statistics.median(times) / 1e9


def available_bytes(device: torch.device) -> int:
    """Returns how many bytes could be allocated now."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    import psutil  # accelerate depends on psutil

    return psutil.virtual_memory().available
