"""Time a training step with and without each feature that makes it fast, a plain loop, and nanoGPT.

    python -m benchmarks.training_step                             # the CPU command's sizes
    python -m benchmarks.training_step --preset gpt2               # 124M, 12 x 1,024 tokens; GPU
    python -m benchmarks.training_step --preset layerwise --rounds 8 --steps 2  # 124M, optimizers
    python -m benchmarks.training_step --against ~/nanoGPT         # also nanoGPT's train.py
    python -m benchmarks.training_step --profile out/profile       # where the time goes

Each variant trains in a separate process, from random weights on random tokens. On a CPU the
processes are paused, and each runs for one turn in every round: other work on the machine then
affects all variants alike. On a GPU one variant runs after another. A variant's time is the median
of its turns. A turn is timed between logs, when the device has finished all queued work, and its
first log is left out. Turns are short: the turns of one round are comparable even if the machine's
speed changes from minute to minute. --against runs the train.py of a nanoGPT checkout at the same
sizes, in the same turns. Memory is measured in a separate run of three steps. On a GPU it is the
peak of torch's allocator. On a CPU it is the peak of the process, minus its memory before it made
the model. Run the benchmark on an idle machine.

The preset ``layerwise`` compares optimizers that free gradients in the backward pass with others:
GPT-2 124M with bfloat16 weights, 1 x 512 tokens in a step. ``benchmarks.live_bytes`` counts the
memory.
"""

import argparse
import json
import pickle
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measuring import STEADY, is_steady, quartiles
from benchmarks.optimizer_tables import ratio_cell
from benchmarks.turns import REPOSITORY, Variant, time_in_turns
from recipes.train_shakespeare_char import PRESETS
from striped_hf.cli import UserError, run
from striped_hf.losses import is_worthwhile
from striped_hf.results import environment, markdown_table, write_json

KEYS = ("n_layer", "n_head", "n_embd", "block_size", "dropout", "per_device_train_batch_size")
SIZES = {
    **{
        name: {key: PRESETS[name][key] for key in KEYS}
        | {"vocab_size": 65, "activation_function": "gelu"}
        for name in PRESETS
    },
    # GPT-2 124M, 12 windows x 1,024 tokens
    "gpt2": dict(zip(KEYS, (12, 12, 768, 1024, 0.0, 12), strict=True))
    | {"vocab_size": 50257, "activation_function": "gelu_pytorch_tanh"},
}
SIZES["layerwise"] = SIZES["gpt2"] | {"block_size": 512, KEYS[-1]: 1}
LAYERWISE = (  # the optimizers of the preset, the baseline first
    *("striped_adamw_8bit", "striped_adamw_8bit_layerwise"),
    *("striped_adamw_4bit", "striped_adamw_4bit_layerwise", "adamw_torch_fused"),
)
FEATURES = {  # the name of each feature in the table
    "gelu": "GELU in one operation (with `gelu_new`)",
    "sdpa": "SDPA (with eager attention)",
    "chunked_loss": "the loss in chunks",
    "watching": "watching",
    "bf16": "bf16",
    "compile": "`torch_compile`",
}


def variants(args: argparse.Namespace) -> list[Variant]:
    """Lists the variants: the recipe first, the baseline of the others."""
    sizes = SIZES[args.preset]
    features = ["gelu", "sdpa", "watching"]
    if is_worthwhile(sizes["block_size"] * sizes[KEYS[-1]], sizes["vocab_size"]):
        features.insert(2, "chunked_loss")
    if args.device == "cuda":
        features += ["bf16", "compile"]

    def ours(name: str, optim: str = "striped_adamw_8bit", **changes: Any) -> Variant:
        settings = {
            "sizes": sizes,
            "device": args.device,
            "features": features,
            "optim": optim,
            "optim_args": "nesterov=true" if optim == "striped_adamw_8bit" else None,
            "loop": "trainer",
            "dtype": "float32",
            "steps_per_line": args.steps_per_line,
            "memory": False,
            "profile": None,
            **changes,
        }
        return Variant(name, worker(settings), settings=settings)

    listed = [
        # without watching, which looks at every gradient of a logged step
        ours(f"`{optim}`", optim, optim_args=None, dtype="bfloat16", features=features[:2])
        for optim in (LAYERWISE if args.preset == "layerwise" else ())
    ] or [
        ours("recipe"),
        ours("bare loop", loop="bare"),
        *(
            ours(f"without {FEATURES[name]}", features=[x for x in features if x != name])
            for name in features
        ),
        ours("with `adamw_torch_fused`", "adamw_torch_fused"),
        ours("Trainer, timed part by part", loop="timed"),
    ]
    return [v for v in listed if not args.variants or any(x in v.name for x in args.variants)]


def worker(settings: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "benchmarks.training_step_worker", json.dumps(settings)]


def nanogpt(checkout: Path, args: argparse.Namespace, folder: Path) -> Variant:
    """Makes the variant of nanoGPT's train.py at the same sizes, on random tokens in ``folder``."""
    if not (checkout / "train.py").is_file():
        raise UserError(
            f"--against {checkout}: this folder has no train.py; pass a checkout of nanoGPT"
        )
    sizes = SIZES[args.preset]
    tokens = np.random.default_rng(0).integers(sizes["vocab_size"], size=1 << 20, dtype=np.uint16)
    for split in ("train", "val"):
        tokens.tofile(folder / f"{split}.bin")
    # without it, nanoGPT uses GPT-2's vocabulary
    if sizes["vocab_size"] != SIZES["gpt2"]["vocab_size"]:
        (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": sizes["vocab_size"]}))
    on_gpu = args.device == "cuda"
    settings = {
        "dataset": folder,  # an absolute path replaces nanoGPT's data/, to which it is joined
        "out_dir": folder / "out",
        "device": args.device,
        "compile": on_gpu,
        "dtype": "bfloat16" if on_gpu else "float32",
        "batch_size": sizes[KEYS[-1]],
        **{key: sizes[key] for key in KEYS[:-1]},
        "gradient_accumulation_steps": 1,
        "max_iters": 10**8,
        "eval_interval": 10**8,
        "eval_iters": 1,
        "log_interval": args.steps_per_line,
    }
    flags = [f"--{key}={value}" for key, value in settings.items()]
    # its configurator opens files in the current folder
    command = [sys.executable, "train.py", *flags]
    return Variant("nanoGPT's `train.py`", command, r"iter \d+: loss", cwd=checkout)


def memory_mib(variant: Variant) -> float | None:
    """Measures the memory of a few steps of a variant; None if that is not possible."""
    if variant.settings is None or variant.settings["loop"] != "trainer":
        return None
    if variant.settings["dtype"] != "float32":  # live_bytes.py counts it
        return None
    command = worker(variant.settings | {"memory": True})
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"{variant.name} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])["peak_mib"]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Times all variants, then measures their memory; writes the results file.

    A GPU may not have memory for two variants: there one runs after another, and the file is
    written after each. On a CPU the variants run in turns.
    """
    timed: list[Variant] = []
    with tempfile.TemporaryDirectory() as folder:
        planned = variants(args)
        if args.against:
            planned.append(nanogpt(args.against.expanduser().resolve(), args, Path(folder)))
        alone = args.device == "cuda"
        for group in [[variant] for variant in planned] if alone else [planned]:
            time_in_turns(group, args.rounds, args.steps, args.steps_per_line)
            timed += group
            results = summarize(timed, args)
            write_json(args.results, {**results, "complete": False})
    for row, variant in zip(results["variants"], timed, strict=True):
        row["peak_mib"] = memory_mib(variant)
    results["complete"] = True
    write_json(args.results, results)
    return results


def summarize(timed: list[Variant], args: argparse.Namespace) -> dict[str, Any]:
    """Returns the content of the results file for variants that were timed, the recipe first."""
    sizes, first = SIZES[args.preset], timed[0]
    constants = first.printed[0]
    tokens = sizes["block_size"] * sizes[KEYS[-1]]
    peak = args.peak_tflops or constants["peak_tflops"]
    rows = []
    for variant in timed:
        ms = statistics.median(variant.ms)
        mfu = None
        if peak:
            mfu = constants["flops_per_token"] * tokens / ms / 1e9 / peak
        row = {"variant": variant.name, "step_ms": ms, "rounds_ms": variant.ms}
        ratios = [mine / other for mine, other in zip(variant.ms, first.ms, strict=True)]
        low, ratio, high = quartiles(ratios)
        row |= {"ratio": ratio, "ratio_quartiles": [low, high]}
        row |= {"tokens_per_s": 1e3 * tokens / ms, "mfu": mfu, "peak_mib": None}
        rows.append(row | {"parts_ms": parts_ms(variant)})
    return {
        "environment": environment(args.device),
        "preset": args.preset,
        "sizes": sizes,
        "rounds": args.rounds,
        "steps_per_turn": args.steps,
        "peak_tflops": peak,
        "usable": is_steady(first.ms),
        "variants": rows,
    }


def parts_ms(variant: Variant) -> dict[str, float] | None:
    """Returns the median milliseconds of each part of a step, over all printed lines."""
    printed = [line["parts_ms"] for line in variant.printed[1:] if "parts_ms" in line]
    if not printed:
        return None
    names = dict.fromkeys(name for parts in printed for name in parts)
    return {name: statistics.median(p.get(name, 0.0) for p in printed) for name in names}


def render(results: dict[str, Any]) -> str:
    """Makes the Markdown tables of a results file, and the lines that belong under them."""
    rows, usable = results["variants"], results["usable"]

    def time_cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form) if usable else "unusable"

    first = "recipe's" if rows[0]["variant"] == "recipe" else "first row's"
    ratio = f"ratio to the {first} (quartiles)"
    header = ("", "step, ms", ratio, "tokens per second", "MFU", "memory, MiB")
    table = [
        (
            row["variant"],
            time_cell(row["step_ms"], ".2f"),
            ratio_cell(row),
            time_cell(row["tokens_per_s"], ",.0f"),
            time_cell(row["mfu"], ".1%"),
            "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}",
        )
        for row in rows
    ]
    sizes = results["sizes"]
    lines = [
        markdown_table(header, table),
        "",
        f"{sizes[KEYS[-1]]} windows x {sizes['block_size']} tokens, {sizes['n_layer']} layers of "
        f"{sizes['n_embd']}, {sizes['vocab_size']:,} tokens in the vocabulary; medians of "
        f"{results['rounds']} turns of {results['steps_per_turn']} steps.",
    ]
    if not usable:
        lines.append(
            f"Unusable: the time of the first row varied by more than {STEADY:.0%} between its "
            "quartiles. A ratio is to the turn that the first row had seconds before."
        )
    timed = [row for row in rows if row["parts_ms"] and usable]
    if timed:
        parts = list(dict.fromkeys(part for row in timed for part in row["parts_ms"]))
        parts.sort(key=lambda part: (part.startswith("Trainer"), part.startswith("the rest")))
        body = [
            (part, *(f"{row['parts_ms'].get(part, 0.0):.2f}" for row in timed)) for part in parts
        ]
        heads = ("milliseconds of a step", *(row["variant"] for row in timed))
        lines += ["", markdown_table(heads, body)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=SIZES, default="cpu", help="the sizes")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: the GPU, if there is one"
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="WORD",
        help="only the variants with one of these texts in the name",
    )
    parser.add_argument("--against", type=Path, metavar="PATH", help="a checkout of nanoGPT")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=10, help="steps in each turn")
    parser.add_argument(
        "--peak_tflops", type=float, help="the GPU's peak, if it is not in the table of GPUs"
    )
    parser.add_argument(
        "--profile", type=Path, metavar="FOLDER", help="only profile the recipe, into this folder"
    )
    parser.add_argument("--results", help="default: benchmarks/results/, named after the run")
    args = parser.parse_args()
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device: pass --device cpu")
    if args.rounds < 1 or args.steps < 1:
        raise UserError(f"--rounds {args.rounds} --steps {args.steps}: each must be at least 1")
    # the first line of a turn is left out, and a step of 124 million parameters takes seconds
    args.steps_per_line = 1 if args.preset == "layerwise" else min(10, args.steps)
    args.steps -= args.steps % args.steps_per_line
    if not variants(args):
        raise UserError(
            f"--variants {' '.join(args.variants)}: no variant has one of these texts in its name"
        )
    if args.profile:
        settings = variants(args)[0].settings
        assert settings is not None
        command = worker(settings | {"profile": str(args.profile.resolve())})
        subprocess.run(command, cwd=REPOSITORY, check=True)
        print(f"profile.txt and trace.json (for ui.perfetto.dev) are in {args.profile}")
        return
    name = f"training_step_{args.preset}_{args.device}.json"
    args.results = args.results or f"benchmarks/results/{name}"
    print(render(measure(args)))


if __name__ == "__main__":
    run(main)
