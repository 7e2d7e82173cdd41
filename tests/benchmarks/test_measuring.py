"""Measurements of a call: its memory, the bytes of a state, the size of a checkpoint."""

import io
import json
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import return_and_correct_aliasing

from benchmarks.measuring import checkpoint_bytes, seconds
from striped_hf.trainer.memory import tensor_bytes

CPU = torch.device("cpu")
MIB = 2**20

# in a separate process: memory that malloc kept from other tests would count
SCRIPT = """
import ctypes, json, torch
from benchmarks.measuring import return_freed_memory, temporary_bytes

return_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
cpu = torch.device("cpu")

def c_code(size):
    block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
    ctypes.memset(block, 1, size)
    libc.free(block)

def tensors():
    for megabytes in (3, 5, 4, 5):
        torch.ones(megabytes, 512, 512)

params = [torch.nn.Parameter(torch.ones(512, 512)) for _ in range(16)]
for param in params:
    param.grad = torch.ones_like(param)
calls = {
    "nothing": lambda: None,
    "0.5 MiB of C": lambda: c_code(1 << 19),
    "3 MiB of C": lambda: c_code(3 << 20),
    "40 MiB of C": lambda: c_code(40 << 20),
    "tensors": tensors,
    "foreach": torch.optim.AdamW(params, foreach=True).step,
    "fused": torch.optim.AdamW(params, fused=True).step,
}
measured = {}
for name, call in calls.items():
    call()
    measured[name] = temporary_bytes(cpu, call)
print(json.dumps(measured))
"""


@pytest.fixture(scope="module")
def mib() -> dict[str, float]:
    """The temporary memory of each call, in MiB."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=1200
    )
    assert run.returncode == 0, run.stderr
    measured = json.loads(run.stdout)
    if None in measured.values():
        pytest.skip("this system has no counter of peak memory")
    return {name: size / MIB for name, size in measured.items()}


def test_temporary_memory_of_c_code(mib):
    assert mib["nothing"] < 0.3
    for size in (0.5, 3, 40):
        assert mib[f"{size} MiB of C"] == pytest.approx(size, abs=0.3)


def test_temporary_memory_of_tensors_is_the_peak(mib):
    assert mib["tensors"] == pytest.approx(5, abs=0.4)


def test_foreach_adamw_needs_a_copy_of_everything_and_fused_adamw_nothing(mib):
    assert mib["foreach"] == pytest.approx(16, abs=1.5)
    assert mib["fused"] < 0.3


class Halved(torch.Tensor):
    """Looks like float32 and stores one byte per element, like coded states of other packages."""

    @staticmethod
    def __new__(cls, codes):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes):
        self.codes = codes

    def __tensor_flatten__(self):
        return ["codes"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return return_and_correct_aliasing(func, args, kwargs or {}, func(*args, **(kwargs or {})))


def test_tensor_bytes_are_the_stored_bytes():
    shared = torch.zeros(256)
    state = {
        "step": 3,
        "coded": Halved(torch.zeros(1000, dtype=torch.int8)),
        "list": [shared, None, {"again": shared}],
        "half": torch.zeros(10, dtype=torch.bfloat16),
    }
    assert tensor_bytes(state) == 1000 + 1024 + 20


def test_checkpoint_is_as_large_as_the_file():
    state = {"state": {0: {"exp_avg": torch.randn(1000, 7)}}, "lr": 1e-3}
    file = io.BytesIO()
    torch.save(state, file)
    assert checkpoint_bytes(state) == file.getbuffer().nbytes
    assert torch.serialization.get_crc32_options()


def test_seconds_are_the_time_of_one_call():
    calls = []
    assert 0 <= seconds(CPU, lambda: calls.append(1), 5) < 1
    assert len(calls) == 5


def test_a_sharded_tensor_counts_with_this_processs_part(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        # the part of one of four processes
        part = DTensor.from_local(
            torch.ones(2, 8), mesh, [Shard(0)], run_check=False, shape=(8, 8), stride=(8, 1)
        )
        assert part.nbytes == 8 * 8 * 4
        assert tensor_bytes({"exp_avg": part, "again": [part]}) == 2 * 8 * 4
    finally:
        torch.distributed.destroy_process_group()
