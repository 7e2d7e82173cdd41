"""The results of the parts that only ``make gpu`` has, as far as a CPU can test them."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import gpu_kernels, gpu_losses, gpu_parts, gpu_phases, gpu_tests, layerwise_memory
from striped_hf.published_configs import load_config

REPOSITORY = Path(__file__).resolve().parents[2]

# every kind of outcome
SUITE = """
import pytest

def test_passes():
    pass

@pytest.mark.skip(reason="not here")
def test_is_skipped():
    pass

def test_fails():
    assert 1 + 1 == 3, "sums differ"
"""


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("processes", ["0", "2"])
def test_outcomes_of_tests_are_kept(tmp_path, processes):
    (tmp_path / "test_some.py").write_text(SUITE)
    (tmp_path / "test_broken.py").write_text("import no_such_module")
    path = tmp_path / "results.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.gpu_tests", "--results", str(path), "--"),
            *("-q", "-p", "no:cacheprovider", "-n", processes, "--rootdir", str(tmp_path)),
            *("--continue-on-collection-errors", str(tmp_path)),
        ],
        cwd=REPOSITORY,
        env={**os.environ, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found = read(path)
    assert found["complete"]
    assert (found["passed"], found["skipped"]) == (1, 1)
    messages = {failure["test"]: failure["message"] for failure in found["failures"]}
    assert "sums differ" in next(text for test, text in messages.items() if "fails" in test)
    assert any("no_such_module" in text for text in messages.values())
    assert "sums differ" in gpu_tests.render(found) or "no_such_module" in gpu_tests.render(found)


def test_a_run_without_a_test_fails(tmp_path, monkeypatch):
    (tmp_path / "test_some.py").write_text("def test_passes(): pass")
    command = ["gpu_tests.py", "--results", str(tmp_path / "results.json"), "--"]
    command += ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "gpu", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        gpu_tests.main()
    assert ended.value.code != 0


def kernel_arguments(tmp_path, **changes):
    defaults = {"device": "cpu", "model": gpu_parts.tiny_model(tmp_path), "groups": 1, "rounds": 1}
    defaults |= {"seconds": 600.0, "results": str(tmp_path / "kernels.json"), **changes}
    return argparse.Namespace(**defaults)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are not interpreted here")
def test_kernel_times_have_a_row_for_every_step(tmp_path, monkeypatch):
    phases = [gpu_phases.Phase("int8", folds) for folds in (True, False)]
    steps = (gpu_kernels.Step("int8"), *phases, gpu_kernels.Step("no such format"))
    monkeypatch.setattr(gpu_kernels, "PLAN", (("gpt2", "float32", steps),))
    found = gpu_kernels.measure(kernel_arguments(tmp_path))
    assert read(tmp_path / "kernels.json") == found
    assert found["complete"]
    fused, striped, fold, folded_step, broken = found["rows"]
    assert (fused["optimizer"], fused["ratio"]) == ("adamw_fused", 1.0)
    assert fused["bytes_per_param"] == 28
    assert 18 < striped["bytes_per_param"] < 22  # 16 of p and g, 2 of codes; stripes of 16 columns
    assert striped["device_ms"] > 0
    assert 6 < fold["bytes_per_param"] < 7  # 4 of the gradient, 2 of codes, scales of 16 columns
    assert 9 < folded_step["bytes_per_param"] < 10  # the codes are only read
    assert "no such format" in broken["reason"]
    table = gpu_kernels.render(found)
    assert "`striped int8`" in table
    assert "`striped int8 fold`" in table
    assert "`striped int8 folded step`" in table
    assert "Not run: `striped no such format`" in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are not interpreted here")
def test_no_row_of_kernel_times_begins_after_the_limit(tmp_path):
    found = gpu_kernels.measure(kernel_arguments(tmp_path, seconds=0.0))
    assert [row["optimizer"] for row in found["rows"]] == ["adamw_fused"]
    assert not found["complete"]


def loss_arguments(tmp_path, **changes):
    defaults = {"data_dir": gpu_parts.tiny_data(tmp_path), "model": gpu_parts.tiny_model(tmp_path)}
    defaults |= {"device": "cpu", "optim": list(gpu_losses.MOMENTUM), "steps": 40, "turn": 20}
    defaults |= {"seconds": 600.0, "batch_size": 4, "block_size": 32, "learning_rate": 1e-2}
    defaults |= {"warmup": 2, "results": str(tmp_path / "losses.json"), **changes}
    return argparse.Namespace(**defaults)


def test_optimizers_start_from_the_same_weights(tmp_path):
    found = gpu_losses.compare(loss_arguments(tmp_path))
    assert read(tmp_path / "losses.json") == found
    assert found["steps"] == 40
    losses = {row["optim"]: row["train_losses"] for row in found["optimizers"]}
    for name, (first, second) in losses.items():
        # log 96 = 4.56 without learning; random tokens have no structure but their frequencies
        assert second < first < 4.7, name
        assert first == pytest.approx(losses["adamw_torch_fused"][0], abs=0.02)
    assert "one seed" in gpu_losses.render(found)


def test_losses_end_between_turns(tmp_path):
    found = gpu_losses.compare(loss_arguments(tmp_path, seconds=0.0))
    assert found["steps"] == 20
    assert found["complete"]


def memory_arguments(tmp_path, **changes):
    defaults = {"device": "cpu", "model": gpu_parts.folding_model(tmp_path), "steps": 2}
    defaults |= {"accumulation": 2, "block_size": 32, "seconds": 600.0}
    defaults |= {"results": str(tmp_path / "memory.json"), **changes}
    return argparse.Namespace(**defaults)


def test_memory_without_gradients_has_a_row_for_every_run(tmp_path, monkeypatch):
    gone = []
    make_optimizer = layerwise_memory.make_optimizer

    def watched(model, planned):
        optimizer = make_optimizer(model, planned)
        embedding = model.get_input_embeddings().weight
        step = optimizer.step

        def watched_step():
            gone.append(embedding.grad is None)
            step()

        optimizer.step = watched_step
        return optimizer

    monkeypatch.setattr(layerwise_memory, "make_optimizer", watched)
    found = layerwise_memory.measure(memory_arguments(tmp_path))
    assert read(tmp_path / "memory.json") == found
    assert found["complete"]
    assert [row["model"] for row in found["rows"]] == [r.model for r in layerwise_memory.RUNS]
    assert not [row["reason"] for row in found["rows"] if "reason" in row]
    assert [row["accumulation"] for row in found["rows"]] == [2, 1, 1, 2]
    assert all(row["peak_mib"] > 0 < row["step_s"] for row in found["rows"])
    layerwise = [r.optim != layerwise_memory.BASELINE for r in layerwise_memory.RUNS]
    assert gone == [is_gone for is_gone in layerwise for _ in range(2)]
    assert "`llama-2-7b`" in layerwise_memory.render(found)


def test_memory_without_gradients_ends_in_time(tmp_path):
    found = layerwise_memory.measure(memory_arguments(tmp_path, seconds=-1.0))
    assert not found["rows"]
    assert not found["complete"]


def test_the_large_model_is_llama_2_7b():
    (large,) = {run.model for run in layerwise_memory.RUNS if "llama" in run.model}
    config = load_config(large)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == 6_738_415_616  # as published
