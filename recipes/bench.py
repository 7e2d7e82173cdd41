"""Measure where the time of one training step goes, at the sizes of the character recipe on a CPU.

    python data_scripts/shakespeare_char.py
    python recipes/bench.py

Times a bare loop over the same model, data and optimizer, part by part, and the whole step inside
Trainer; what Trainer's step costs more than the bare loop's is Trainer's own bookkeeping. The
variants take turns, round by round, and every figure is the median over all rounds. Run it on a
machine that does nothing else.
"""

import argparse
import statistics
import time
from collections import defaultdict

import torch
from train_shakespeare_char import PRESETS
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments
from transformers.utils import logging

from striped_hf.data import RandomWindows, collate, open_split
from striped_hf.results import environment, markdown_table, write_json
from striped_hf.trainer.callbacks import RunMeasurements
from striped_hf.trainer.causal_lm import CausalLMTrainer

SIZE = PRESETS["cpu"]
OPTIMIZERS = ("adamw_torch_fused", "striped_adamw", "striped_adamw_8bit")
PARTS = ("batch", "forward and backward", "clipping", "optimizer", "whole step")


def make_model(activation: str) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=65,
        n_positions=SIZE["block_size"],
        n_layer=SIZE["n_layer"],
        n_head=SIZE["n_head"],
        n_embd=SIZE["n_embd"],
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        activation_function=activation,
        loss_type="ForCausalLM",
        use_cache=False,
    )
    return GPT2LMHeadModel(config).train()


def make_trainer(model, optim: str, steps: int, train) -> tuple[CausalLMTrainer, RunMeasurements]:
    args = TrainingArguments(
        output_dir="out/bench",
        optim=optim,
        learning_rate=1e-3,
        max_steps=steps,
        per_device_train_batch_size=SIZE["per_device_train_batch_size"],
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        logging_steps=10,
        disable_tqdm=True,
    )
    measurements = RunMeasurements()
    trainer = CausalLMTrainer(
        model=model,
        args=args,
        train_dataset=train,
        data_collator=collate,
        callbacks=[measurements],
    )
    return trainer, measurements


def bare_loop(model, optimizer, train, steps: int, times: dict[str, list[float]]) -> None:
    """Trains without Trainer, and adds the milliseconds of each part of each step to ``times``."""
    size = SIZE["per_device_train_batch_size"]
    for step in range(steps):
        marks = [time.perf_counter()]
        batch = train.__getitems__(range(step * size, (step + 1) * size))
        marks.append(time.perf_counter())
        model(**batch).loss.backward()
        marks.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        marks.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        marks.append(time.perf_counter())
        for part, begin, end in zip(PARTS, marks, marks[1:], strict=False):
            times[part].append(1e3 * (end - begin))
        times["whole step"].append(1e3 * (marks[-1] - marks[0]))


def render(results: dict) -> str:
    """Makes the Markdown table of a results file."""
    header = ("", *(f"`{name}`" for name in results["optimizers"]))
    columns = results["optimizers"].values()
    rows = [(f"bare loop: {part}", *(f"{c[part]:.2f}" for c in columns)) for part in PARTS]
    slower = f"{results['gelu_new_forward_and_backward']:.2f}"
    rows.append(("forward and backward with `gelu_new`", slower, "", ""))
    rows.append(("Trainer: whole step", *(f"{c['trainer']:.2f}" for c in columns)))
    rows.append(
        (
            "Trainer's own share",
            *(f"{c['trainer'] - c['whole step']:.2f}" for c in columns),
        )
    )
    return markdown_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", default="data/shakespeare_char")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40, help="steps in each round")
    parser.add_argument("--results", default="recipes/results/step_time.json")
    args = parser.parse_args()
    logging.set_verbosity_error()
    windows = args.steps * SIZE["per_device_train_batch_size"]
    split = open_split(args.data_dir, "train")
    train = RandomWindows(split, SIZE["block_size"], windows, seed=0)

    times: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in OPTIMIZERS}
    gelu_new: dict[str, list[float]] = defaultdict(list)
    for round_ in range(args.rounds + 1):  # the first warms up
        if round_ == 1:
            times = {name: defaultdict(list) for name in OPTIMIZERS}
            gelu_new.clear()
        for name in OPTIMIZERS:
            model = make_model("gelu_pytorch_tanh")
            trainer, measurements = make_trainer(model, name, args.steps, train)
            trainer.train()
            times[name]["trainer"].append(measurements.results()["median_step_ms"])
            bare_loop(model, trainer.create_optimizer(), train, args.steps, times[name])
        model = make_model("gelu_new")
        bare_loop(model, torch.optim.AdamW(model.parameters()), train, args.steps, gelu_new)

    results = {
        "environment": environment(),
        "rounds": args.rounds,
        "steps_per_round": args.steps,
        "gelu_new_forward_and_backward": statistics.median(gelu_new["forward and backward"]),
        "optimizers": {
            name: {part: statistics.median(values) for part, values in parts.items()}
            for name, parts in times.items()
        },
    }
    write_json(args.results, results)
    print(render(results))


if __name__ == "__main__":
    main()
