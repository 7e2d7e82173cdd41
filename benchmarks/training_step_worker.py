"""Train one variant of training_step.py: settings as one line of JSON in, one line of JSON per log
out.

python -m benchmarks.training_step_worker '{"device": "cpu", "sizes": {...}, ...}'
"""

import functools
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging

from benchmarks.measuring import return_freed_memory
from benchmarks.synthetic_run import RandomTokens, make_trainer
from striped_hf.trainer.causal_lm import CausalLMTrainer
from striped_hf.trainer.flops import device_peak_tflops, flops_per_token
from striped_hf.trainer.gradient_health import GradientHealth
from striped_hf.trainer.memory import peak_memory_mib
from striped_hf.trainer.watching import MemoryUse, Throughput

ENDLESS = 10**8  # steps
EPOCH = 4096  # steps; short, because Trainer keeps the shuffled order of an epoch in memory
PROFILED = range(10, 15)  # steps


class Parts:
    """Adds up the time that each part of a step takes by itself, without the parts inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside: list[float] = []  # for each running part, the time of the parts inside it

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def measured(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            begin = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                took = time.perf_counter() - begin
                self.seconds[name] += took - self._inside.pop()
                if self._inside:
                    self._inside[-1] += took

        return measured


class TrainerParts(TrainerCallback):
    """Times the parts of a step in Trainer, by wrapping its methods."""

    def __init__(self) -> None:
        self.parts = Parts()
        self.trainer: CausalLMTrainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        assert trainer is not None
        for owner, method, name in (
            (trainer, "get_batch_samples", "batch"),
            (trainer, "training_step", "forward and backward"),
            (trainer, "_clip_grad_norm", "clipping"),
            (trainer.optimizer, "step", "optimizer"),
            (trainer.model_wrapped, "zero_grad", "Trainer: zero_grad"),
            (trainer.callback_handler, "call_event", "Trainer: callbacks, watching among them"),
            (trainer.lr_scheduler, "step", "Trainer: learning rate"),
            (trainer, "floating_point_ops", "Trainer: floating_point_ops"),
            (trainer, "_maybe_log_save_evaluate", "Trainer: logging"),
        ):
            setattr(owner, method, self.parts.timed(name, getattr(owner, method)))


class Report(TrainerCallback):
    """Prints a line for each log, after Trainer has waited for the device to read the loss."""

    def __init__(self, constants: dict[str, Any], parts: Parts | None) -> None:
        self.constants, self.parts = constants, parts
        self.last = 0, time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.line(state.global_step)

    def line(self, step: int) -> None:
        line = {"step": step, **self.constants}
        if self.parts is not None:  # times since the last line
            steps = step - self.last[0]
            ms = {name: 1e3 * seconds / steps for name, seconds in self.parts.seconds.items()}
            whole = 1e3 * (time.perf_counter() - self.last[1]) / steps
            line["parts_ms"] = ms | {"the rest of the loop": whole - sum(ms.values())}
        print(json.dumps(line), flush=True)
        if self.parts is not None:
            self.parts.seconds.clear()
        self.last = step, time.perf_counter()


class Profile(TrainerCallback):
    """Profiles a few steps, writes the profile, and ends the run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.profiler = torch.profiler.profile()  # profiles the CPU and a GPU, if there is one

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == PROFILED.start:
            self.profiler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == PROFILED.stop:
            self.profiler.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            self.profiler.export_chrome_trace(str(self.folder / "trace.json"))
            key = f"self_{'cuda' if torch.cuda.is_available() else 'cpu'}_time_total"
            table = self.profiler.key_averages().table(sort_by=key, row_limit=40)
            (self.folder / "profile.txt").write_text(table, encoding="utf-8")
            control.should_training_stop = True


def make_model(settings: dict[str, Any]) -> GPT2LMHeadModel:
    sizes, features = settings["sizes"], settings["features"]
    config = GPT2Config(
        vocab_size=sizes["vocab_size"],
        n_positions=sizes["block_size"],
        n_layer=sizes["n_layer"],
        n_head=sizes["n_head"],
        n_embd=sizes["n_embd"],
        embd_pdrop=sizes["dropout"],
        attn_pdrop=sizes["dropout"],
        resid_pdrop=sizes["dropout"],
        activation_function=sizes["activation_function"] if "gelu" in features else "gelu_new",
        loss_type="ForCausalLM",
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa" if "sdpa" in features else "eager",
    )
    with torch.device(settings["device"]):
        return GPT2LMHeadModel(config).to(getattr(torch, settings["dtype"])).train()


def bare_loop(trainer: CausalLMTrainer, train: RandomTokens, to: Report) -> None:
    """Trains without Trainer, in a loop as written by hand, and times its parts."""
    assert to.parts is not None
    args, model = trainer.args, trainer.model
    optimizer = trainer.create_optimizer()
    size = args.per_device_train_batch_size
    device, dtype = args.device, torch.bfloat16 if args.bf16 else torch.float32
    forward = torch.compile(model) if args.torch_compile else model

    def fetch(step: int) -> dict[str, torch.Tensor]:
        batch = train.__getitems__(range(step * size, (step + 1) * size))
        return {key: value.to(device, non_blocking=True) for key, value in batch.items()}

    def passes(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=args.bf16):
            loss = trainer.compute_loss(forward, batch)
        loss.backward()
        return loss

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    fetch, passes = (
        to.parts.timed("batch", fetch),
        to.parts.timed("forward and backward", passes),
    )
    clip = to.parts.timed("clipping", torch.nn.utils.clip_grad_norm_)
    update = to.parts.timed("optimizer", update)
    for step in range(args.max_steps):
        loss = passes(fetch(step))
        clip(model.parameters(), args.max_grad_norm)
        update()
        if (step + 1) % args.logging_steps == 0:
            loss.item()
            to.line(step + 1)


def main() -> None:
    settings = json.loads(sys.argv[1])
    sizes, features, device = (settings[key] for key in ("sizes", "features", "device"))
    logging.set_verbosity_error()
    set_seed(0)
    if settings["memory"] and device == "cpu":
        return_freed_memory()
    before = peak_memory_mib() if device == "cpu" else 0.0
    model = make_model(settings)
    batch = sizes["per_device_train_batch_size"]
    train = RandomTokens(sizes["vocab_size"], sizes["block_size"], 16 * batch, EPOCH * batch)
    parts = TrainerParts()
    callbacks: list[TrainerCallback] = [parts] if settings["loop"] == "timed" else []
    if settings["profile"]:
        callbacks.append(Profile(Path(settings["profile"])))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            *(model, train, device, callbacks),
            output_dir=folder,
            max_steps=3 if settings["memory"] else ENDLESS,
            optim=settings["optim"],
            optim_args=settings["optim_args"],
            learning_rate=1e-4,
            weight_decay=0.1,
            lr_scheduler_type="constant_with_warmup",
            per_device_train_batch_size=batch,
            logging_steps=settings["steps_per_line"],
            bf16="bf16" in features,
            torch_compile="compile" in features,
        )
        parts.trainer = trainer
        trainer.chunked_loss = "chunked_loss" in features
        trainer.remove_callback(PrinterCallback)
        if "watching" not in features:
            for callback in (Throughput, MemoryUse, GradientHealth):
                trainer.remove_callback(callback)
        own = Parts() if settings["loop"] == "bare" else parts.parts if callbacks else None
        operations = flops_per_token(model, sizes["block_size"])
        constants = {"flops_per_token": operations, "peak_tflops": device_peak_tflops()}
        to = Report(constants, own if settings["loop"] != "trainer" else None)
        trainer.add_callback(to)
        if settings["loop"] == "bare" and not settings["memory"]:
            bare_loop(trainer, train, to)
        else:
            trainer.train()
    print(json.dumps({"done": True, "peak_mib": peak_memory_mib() - before}), flush=True)


if __name__ == "__main__":
    main()
