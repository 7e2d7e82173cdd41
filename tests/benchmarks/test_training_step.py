"""The benchmark of a training step: turns, variants, memory, a profile, and nanoGPT's script."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks import training_step, turns

# A stand-in for nanoGPT's train.py, with the same flags, data and output.
STAND_IN = """\
import os, pickle, sys, time
import numpy as np
flags = dict(flag.removeprefix("--").split("=", 1) for flag in sys.argv[1:])
known = "dataset out_dir device compile dtype batch_size n_layer n_head n_embd block_size dropout"
known += " gradient_accumulation_steps max_iters eval_interval eval_iters log_interval"
assert set(flags) == set(known.split()), flags
assert os.path.isfile("train.py")  # it reads its configuration from the working directory
folder = os.path.join("data", flags["dataset"])
train = np.memmap(os.path.join(folder, "train.bin"), dtype=np.uint16, mode="r")
vocabulary = pickle.load(open(os.path.join(folder, "meta.pkl"), "rb"))["vocab_size"]
assert train.max() < vocabulary == 65
print("tokens per iteration will be: 768")
for i in range(int(flags["max_iters"]) + 1):
    time.sleep(float(os.environ["STAND_IN_S"]))
    if i % int(flags["log_interval"]) == 0:
        print(f"iter {i}: loss 4.1742, time 50.00ms, mfu -100.00%")
"""


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "nanoGPT"
    folder.mkdir()
    (folder / "train.py").write_text(STAND_IN, encoding="utf-8")
    return folder


def script(name: str, step_s: float, count: Path) -> turns.Variant:
    code = (
        f"import time\nfor i in range(9999):\n  time.sleep({step_s})\n  print('iter 1: loss')\n"
        f"  open({str(count)!r}, 'a').write('.')"
    )
    return turns.Variant(name, [sys.executable, "-u", "-c", code], r"iter \d+: loss")


TURNS = {"rounds": 3, "steps": 4, "steps_per_line": 1}


def arguments(**changes):
    return type("Arguments", (), {**TURNS, **changes})()


def test_a_turns_time_excludes_the_turns_of_others(tmp_path):
    # a little longer than the assertion: the step after a late line seems shorter
    fast, slow = script("fast", 0.023, tmp_path / "fast"), script("slow", 0.085, tmp_path / "slow")
    begin = time.perf_counter()
    turns.time_in_turns([fast, slow], **TURNS)
    took = time.perf_counter() - begin
    assert len(fast.ms) == len(slow.ms) == 3
    # some are longer on a busy machine; with the slow variant's time they would be 100
    assert 20 <= min(fast.ms) < 90
    assert 80 <= min(slow.ms) < 160
    assert took > 1.3  # in turns, 3 x 5 x (0.02 + 0.08) s; the slow one alone takes 1.2 s
    # two warm-up lines and five per turn: it was paused in the slow variant's turns of 1.2 s
    assert len((tmp_path / "fast").read_text()) < 17 + 15


def test_a_terminated_benchmark_leaves_no_process(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    alive = tmp_path / "alive"
    threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    try:
        with pytest.raises(SystemExit):
            turns.time_in_turns([script("endless", 0.02, alive)], **TURNS | {"rounds": 9999})
    finally:
        signal.signal(signal.SIGTERM, before)
    size = alive.stat().st_size
    time.sleep(0.5)
    assert alive.stat().st_size == size > 0


def test_a_failing_process_gives_its_error():
    broken = turns.Variant("broken", [sys.executable, "-c", "raise SystemExit('no such flag')"])
    with pytest.raises(training_step.UserError, match="broken ended: no such flag"):
        turns.time_in_turns([broken], **TURNS)


def test_each_variant_removes_one_feature():
    every = training_step.variants(
        arguments(preset="gpt2", device="cuda", variants=None, steps_per_line=10)
    )
    features = [set(v.settings["features"]) for v in every]
    whole = {"gelu", "sdpa", "chunked_loss", "watching", "bf16", "compile"}
    assert features[0] == whole
    taken = [whole - each for each in features if each != whole]
    assert sorted(map(sorted, taken)) == sorted([[name] for name in whole])
    cpu = training_step.variants(arguments(preset="cpu", device="cpu", variants=["recipe", "SDPA"]))
    assert [v.name for v in cpu] == ["recipe", "without SDPA (with eager attention)"]


def test_optimizers_are_compared_on_one_step():
    args = arguments(preset="layerwise", device="cpu", variants=None, steps_per_line=1)
    listed = training_step.variants(args)
    assert [variant.settings["optim"] for variant in listed] == list(training_step.LAYERWISE)
    first, *others = [variant.settings | {"optim": None} for variant in listed]
    assert all(other == first for other in others)
    assert first["features"] == ["gelu", "sdpa"]
    assert first["dtype"] == "bfloat16"


@pytest.mark.slow
def test_a_worker_trains_bfloat16_weights():
    names = ["8bit_layerwise"]
    args = arguments(preset="layerwise", device="cpu", variants=names, steps_per_line=1)
    (variant,) = training_step.variants(args)
    sizes = variant.settings["sizes"] | {"n_layer": 1, "n_embd": 96, "vocab_size": 1024}
    command = training_step.worker(variant.settings | {"sizes": sizes, "memory": True})
    printed = subprocess.run(command, cwd=turns.REPOSITORY, capture_output=True, text=True)
    assert '"done": true' in printed.stdout, printed.stderr


def test_an_unsteady_baseline_is_not_quoted():
    assert training_step.is_steady([10.0, 10.5, 11.0, 10.2])
    assert not training_step.is_steady([10.0, 14.0, 10.0, 15.0])
    row = {
        "variant": "recipe", "step_ms": 10.0, "ratio": 1.0, "ratio_quartiles": [0.98, 1.02],
        "tokens_per_s": 76800.0, "mfu": 0.5, "peak_mib": 60.0, "parts_ms": {"batch": 1.0},
    }  # fmt: skip
    results = {
        "sizes": training_step.SIZES["cpu"],
        "rounds": 4,
        "steps_per_turn": 40,
        "variants": [row],
    }
    steady, unsteady = (
        training_step.render({**results, "usable": usable}) for usable in (True, False)
    )
    assert "| recipe | 10.00 | 1.00 (0.98 to 1.02) | 76,800 | 50.0% | 60 |" in steady
    assert "| batch | 1.00 |" in steady
    assert "| recipe | unusable | 1.00 (0.98 to 1.02) | unusable | unusable | 60 |" in unsteady
    assert "batch" not in unsteady


@pytest.mark.slow
def test_the_recipe_is_timed_beside_nanogpt(run_script, checkout, tmp_path):
    results = tmp_path / "results.json"
    printed = run_script(
        "benchmarks.training_step",
        *("--device", "cpu", "--rounds", 2, "--steps", 4, "--peak_tflops", 0.1),
        *("--variants", "recipe", "timed", "--against", checkout, "--results", results),
        cwd=tmp_path,
        STAND_IN_S="0.0125",  # longer than the assertion, as above
        OMP_NUM_THREADS="1",
    ).stdout
    measured = json.loads(results.read_text(encoding="utf-8"))
    recipe, timed, nanogpt = measured["variants"]
    assert nanogpt["variant"] == "nanoGPT's `train.py`"
    assert [len(row["rounds_ms"]) for row in measured["variants"]] == [2, 2, 2]
    assert 10 <= nanogpt["step_ms"] < 100
    assert recipe["tokens_per_s"] == pytest.approx(1e3 * 12 * 64 / recipe["step_ms"])
    assert 0 < recipe["mfu"] < 1
    # the weights, gradients and state of 0.8 million parameters, and activations
    assert 8 < recipe["peak_mib"] < 300
    parts = timed["parts_ms"]
    assert parts["forward and backward"] > 10 * parts["Trainer: floating_point_ops"]
    assert sum(parts.values()) == pytest.approx(timed["step_ms"], rel=0.8)
    assert "nanoGPT's `train.py`" in printed
    assert not list(checkout.glob("data*"))  # the checkout is unchanged


@pytest.mark.slow
def test_a_profile_is_written(run_script, tmp_path):
    folder = tmp_path / "profile"
    run_script("benchmarks.training_step", "--device", "cpu", "--profile", folder, cwd=tmp_path)
    assert "aten::addmm" in (folder / "profile.txt").read_text(encoding="utf-8")
    assert (folder / "trace.json").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--against", "nowhere"], "has no train.py; pass a checkout of nanoGPT"),
        (["--variants", "faster"], "no variant has one of these texts in its name"),
        (["--rounds", "0"], "each must be at least 1"),
    ],
)
def test_wrong_flags_end_with_one_line(monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["training_step.py", "--device", "cpu", *flags])
    with pytest.raises(training_step.UserError, match=message):
        training_step.main()
