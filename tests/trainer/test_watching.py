"""Watching a run: the figures are right, appear with every loss, and cost almost no time."""

import ast
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode
from trainer_runs import LENGTH, VOCAB_SIZE, WIDE, Counting, arguments, optimizer_of, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, set_seed
from wandb.proto import wandb_internal_pb2

from striped_hf.trainer.flops import flops_per_token, peak_tflops
from striped_hf.trainer.gradient_health import layer_group
from striped_hf.trainer.watching import state_bytes_by_kind, watch

ALWAYS = {
    *("tokens_per_second", "mfu", "peak_memory_mib", "grad_norm_mean", "grad_norm_max"),
    *("clipped_share", "nonfinite_steps", "nonfinite_values", "update_ratio_wte"),
    *("update_ratio_wpe", "update_ratio_attn", "update_ratio_mlp"),
}


def watched(
    output_dir: Path, model: Any = None, callback: TrainerCallback | None = None, **changes: Any
) -> Trainer:
    trainer = Trainer(
        model or tiny_model("gpt2"),
        arguments(output_dir, **{"max_steps": 4, "logging_steps": 2, **changes}),
        train_dataset=Counting(),
        eval_dataset=Counting(),
        callbacks=[callback] if callback else None,
    )
    watch(trainer, peak_tflops=0.5)
    trainer.train()
    return trainer


def logged(trainer: Trainer) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def wandb_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Reads the logs of an offline run: a LevelDB log of messages, in blocks of 32 KiB."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, message = path.read_bytes(), 7, b""
    while at < len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            items = wandb_internal_pb2.Record.FromString(message).history.item
            message = b""
            if items:
                yield {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items}


def test_logged_figures_are_the_same_in_every_tracker(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    trainer = watched(tmp_path, optim="striped_adamw_8bit", report_to=["wandb", "tensorboard"])
    import wandb

    wandb.finish()
    trainer.save_state()
    history = logged(trainer)
    assert len(history) == 2
    assert set(history[1]) >= ALWAYS
    assert {key for key in history[0] if key.startswith("state_mib_")} == {
        f"state_mib_{kind}" for kind in state_bytes_by_kind(optimizer_of(trainer))
    }

    saved = json.loads((tmp_path / "trainer_state.json").read_text(encoding="utf-8"))
    assert [entry for entry in saved["log_history"] if "loss" in entry] == history

    printed = [ast.literal_eval(x) for x in capsys.readouterr().out.splitlines() if x[:1] == "{"]
    printed = [entry for entry in printed if "loss" in entry]
    deadline = time.monotonic() + 60  # wandb writes in a separate process
    while len(rows := [row for row in wandb_rows(tmp_path) if "train/loss" in row]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # transformers 4 writes them into a separate folder
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload()
    for i, entry in enumerate(history):
        assert set(printed[i]) == set(entry) - {"step"}
        assert rows[i].pop("train/global_step") == entry["step"]
        for key in set(entry) - {"step"}:
            assert float(printed[i][key]) == pytest.approx(entry[key], rel=1e-3)
            assert rows[i][f"train/{key}"] == entry[key]
            # Trainer's summary repeats the epoch of the last step
            value, *_ = [x.value for x in events.Scalars(f"train/{key}") if x.step == entry["step"]]
            assert value == pytest.approx(entry[key])


@pytest.mark.compat
@pytest.mark.slow
def test_figures_arrive_in_trackio(tmp_path):
    """trackio pins older versions than this environment has, so it has a separate folder."""
    packages = tmp_path / "packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(packages)]
    subprocess.run([*pip, "trackio>=0.20,<1"], check=True)
    # after this environment's packages, so that its torch and transformers are tested
    script = (
        f"import sys; sys.path += [{str(packages)!r}, {str(Path(__file__).parent)!r}]\n"
        "import json, pathlib\n"
        "import trainer_runs, test_watching as t\n"
        f"run = t.watched(pathlib.Path({str(tmp_path)!r}), report_to=['trackio'])\n"
        "from trackio.sqlite_storage import SQLiteStorage as S\n"
        "(name,) = S.get_runs('huggingface')\n"
        "print(json.dumps([S.get_logs('huggingface', name), t.logged(run)]))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-5000:]
    rows, history = json.loads(finished.stdout.splitlines()[-1])
    rows = [row for row in rows if "train/loss" in row]
    assert len(rows) == len(history) == 2
    for row, entry in zip(rows, history, strict=True):
        for key in set(entry) - {"step"}:
            assert row[f"train/{key}"] == entry[key]


def test_norms_and_clipping_cover_every_step(tmp_path):
    every = [entry["grad_norm"] for entry in logged(watched(tmp_path, logging_steps=1))]
    limit = sorted(every)[1]  # the two largest are clipped
    steps = [
        entry["grad_norm"]
        for entry in logged(watched(tmp_path, logging_steps=1, max_grad_norm=limit))
    ]
    (whole,) = logged(watched(tmp_path, logging_steps=4, max_grad_norm=limit))
    assert whole["grad_norm_mean"] == pytest.approx(sum(steps) / 4)
    assert whole["grad_norm_max"] == pytest.approx(max(steps))
    assert whole["clipped_share"] == sum(norm > limit for norm in steps) / 4
    assert 0 < whole["clipped_share"] < 1


class Snapshots(TrainerCallback):
    """Keeps all weights before and after each step."""

    def __init__(self) -> None:
        self.before: dict[str, torch.Tensor] = {}
        self.ratios: list[dict[str, float]] = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        ratios: dict[str, float] = {}
        for name, param in model.named_parameters():
            if param.ndim > 1:
                group = name.split(".")[3 if ".h." in name else 1]
                ratio = ((param - self.before[name]).norm() / param.norm()).item()
                ratios[group] = max(ratios.get(group, 0.0), ratio)
        self.ratios.append(ratios)


@pytest.mark.parametrize(("width", "tolerance"), [(32, 1e-4), (160, 0.1)])
def test_update_ratios(tmp_path, width, tolerance):
    """The figures use whole matrices of the small model, and 4,096 values of large matrices."""
    set_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=LENGTH, n_embd=width, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    snapshots = Snapshots()
    trainer = watched(tmp_path, GPT2LMHeadModel(config), snapshots, optim="adamw_torch")
    for entry in logged(trainer):
        for group, ratio in snapshots.ratios[entry["step"] - 1].items():
            assert entry[f"update_ratio_{group}"] == pytest.approx(ratio, rel=tolerance)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("transformer.h.11.attn.c_attn.weight", "attn"),
        ("transformer.wpe.weight", "wpe"),
        ("lm_head.weight", "lm_head"),
        ("base_model.model.model.layers.3.mlp.up_proj.lora_A.default.weight", "mlp"),
        ("layers.3.weight", "layers"),
        ("weight", "weight"),
    ],
)
def test_layer_groups(name, group):
    assert layer_group(name) == group


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_counted(tmp_path, bad):
    model = tiny_model("gpt2")
    calls = iter(range(1, 100))

    def poison(grad):
        grad = grad.clone()
        if next(calls) == 4:
            grad.view(-1)[:5] = bad
        return grad

    model.transformer.wpe.weight.register_hook(poison)
    first, second = logged(watched(tmp_path, model))
    assert (first["nonfinite_steps"], first["nonfinite_values"]) == (0, 0)
    assert (second["nonfinite_steps"], second["nonfinite_values"]) == (1, 5)
    assert second["grad_norm_max"] > 0  # the norm of the finite step


@pytest.mark.parametrize("passes", [1, 2])
def test_gradients_that_are_gone_have_the_figures_of_others(tmp_path, passes):
    """A layerwise optimizer frees the gradients of matrices in the backward pass."""

    def train(optim: str) -> list[dict[str, Any]]:
        model = tiny_model("llama", WIDE, WIDE)
        layer = model.model.layers[1]
        for param, count in ((layer.self_attn.q_proj.weight, 5), (layer.input_layernorm.weight, 2)):
            calls = iter(range(1, 100))

            def poison(grad, calls=calls, count=count):
                grad = grad.clone()
                if next(calls) > 3 * passes:  # in the last step
                    grad.view(-1)[:count] = float("nan")
                return grad

            param.register_hook(poison)
        changes = {"gradient_accumulation_steps": passes, "per_device_train_batch_size": 4}
        changes |= {"max_grad_norm": 100.0}  # nothing is clipped
        return logged(watched(tmp_path, model, optim=optim, **changes))

    (layerwise, after), (ordinary, expected) = map(
        train, ("striped_adamw_layerwise", "striped_adamw")
    )
    assert layerwise.keys() == ordinary.keys()
    for key in layerwise.keys() - {"tokens_per_second", "mfu", "peak_memory_mib"}:
        rel = 1e-4
        if passes > 1:  # the norm and the second moment are estimates
            # After 3 steps a row's second moment is a mean of 6 squares of random sums: 2 blocks of
            # 128 columns a step. The mean of its inverse root is 1.15 of that of the true moment.
            rel = 0.3 if key.startswith("update_ratio") else 0.1
        assert layerwise[key] == pytest.approx(ordinary[key], rel=rel), key
    for key in ("nonfinite_steps", "nonfinite_values"):
        assert after[key] == expected[key]
    assert after["nonfinite_values"] == 7


class Slow(Counting):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        time.sleep(0.01)
        return super().__getitem__(index)


def test_evaluation_is_not_counted_as_training(tmp_path):
    trainer = Trainer(
        tiny_model("gpt2"),
        # evaluates within an interval and between two
        arguments(
            tmp_path, max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=1,
            per_device_eval_batch_size=8,
        ),
        train_dataset=Counting(),
        eval_dataset=Slow(),
    )  # fmt: skip
    watch(trainer)
    trainer.train()
    tokens = 2 * 8 * LENGTH
    evaluation_s = 64 * 0.01  # the time of one evaluation
    for entry in logged(trainer):
        assert entry["tokens_per_second"] > tokens / (0.9 * evaluation_s)
        assert "mfu" not in entry  # the table has no peak of processors


def test_speed_and_mfu_agree_with_the_clock(tmp_path):
    begin = time.perf_counter()
    trainer = watched(tmp_path, max_steps=20, logging_steps=20)
    took = time.perf_counter() - begin
    (entry,) = logged(trainer)
    tokens = 20 * 8 * LENGTH
    assert tokens / took < entry["tokens_per_second"] < 20 * tokens / took
    operations = flops_per_token(trainer.model, LENGTH)
    expected = operations * entry["tokens_per_second"] / 0.5e12
    assert entry["mfu"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_operations_equal_torchs_count(kind):
    model = tiny_model(kind)
    model.set_attn_implementation("eager")
    ids = torch.zeros(2, LENGTH, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    # transformers up to 5.0 also multiplies to rotate positions: 8 operations per token
    counted = counter.get_total_flops() / ids.numel()
    assert flops_per_token(model, LENGTH) == pytest.approx(counted, rel=1e-4)


def test_operations_are_unknown_for_other_models():
    assert flops_per_token(torch.nn.Linear(2, 2), LENGTH) is None
    model = tiny_model("llama")
    model.config.num_experts = 4
    assert flops_per_token(model, LENGTH) is None


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla T4", 65.0),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A10G", None),
        ("AMD EPYC 7R13 Processor", None),
    ],
)
def test_the_table_of_peaks(name, tflops):
    assert peak_tflops(name) == tflops


def test_a_peak_must_be_positive(tmp_path):
    trainer = Trainer(tiny_model("gpt2"), arguments(tmp_path), train_dataset=Counting())
    with pytest.raises(ValueError, match=r"peak_tflops=0: must be positive"):
        watch(trainer, peak_tflops=0)


def test_the_progress_bar_shows_loss_and_speed(tmp_path, capsys):
    trainer = watched(tmp_path, disable_tqdm=False)
    last = logged(trainer)[-1]
    bar = capsys.readouterr().err
    assert f"loss={last['loss']:.4f}, tok/s={last['tokens_per_second']:,}]" in bar


def test_a_callback_can_be_removed(tmp_path):
    from striped_hf.trainer.gradient_health import GradientHealth

    trainer = Trainer(
        tiny_model("gpt2"), arguments(tmp_path, max_steps=2), train_dataset=Counting()
    )
    watch(trainer)
    trainer.remove_callback(GradientHealth)
    trainer.train()
    assert "clipped_share" not in logged(trainer)[0]
    assert "tokens_per_second" in logged(trainer)[0]


@pytest.mark.slow
def test_the_recipes_are_watched(tiny_run):
    state = json.loads((tiny_run / "trainer_state.json").read_text(encoding="utf-8"))
    entries = [entry for entry in state["log_history"] if "loss" in entry]
    assert entries
    assert all(set(entry) >= ALWAYS - {"mfu"} for entry in entries)
