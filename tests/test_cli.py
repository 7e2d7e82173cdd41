"""What a script leaves when its main() is over."""

import subprocess
import sys

import pytest

SCRIPT = """
import atexit
import sys
from pathlib import Path

import torch
import torch.distributed.nn  # imported later, its default arguments would keep the group
from striped_hf.cli import run


def print_gloo_threads():
    names = {file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")}
    print(sorted(name for name in names if "gloo" in name))


def main():
    store = f"file://{sys.argv[1]}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    model(torch.ones(2)).sum().backward()
    print_gloo_threads()


atexit.register(print_gloo_threads)
run(main)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_thread_of_a_process_group_outlives_main(tmp_path):
    """Such a thread may abort the process while the interpreter ends."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=True)
    during, after = ended.stdout.splitlines()
    assert "gloo" in during
    assert after == "[]"
