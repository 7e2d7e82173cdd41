"""Evaluate causal language models on a data set: the loss over its train and val splits.

nanoGPT's table of the four GPT-2 sizes on OpenWebText, on one GPU:

    python recipes/eval_baselines.py --bf16 --max_blocks 4000

Any models, by name or folder, on any data set in their own tokens:

    python recipes/eval_baselines.py MODEL --data_dir data/shakespeare_model --block_size 512

A split is divided into contiguous blocks. Every token but the first is a target once, and all
targets have the same weight. The standard error comes from the scatter between blocks.
--max_blocks N evaluates at most N blocks, evenly spaced: OpenWebText's train split has 8.8 million,
and nanoGPT's own figures come from about 4,000 random ones. Batches are as large as the device can
hold.

The results file is written after each split. --resume continues a stopped evaluation. The tables in
docs/ come from files in benchmarks/results/; pass such a file to --results to update it.
The weights are float32, whatever the dtype of the saved model.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import Subset
from transformers import PreTrainedModel

from striped_hf.cli import model_names, run
from striped_hf.data import ContiguousBlocks, TokenSplit, open_split
from striped_hf.evaluation import evaluate_data_set
from striped_hf.pretrained import (
    check_length,
    check_tokens,
    load_config,
    load_model,
    weights_fingerprint,
)
from striped_hf.results import begin_results, is_measured, markdown_table, write_json

# train and val loss on OpenWebText in nanoGPT's README
NANOGPT = {
    "gpt2": (3.11, 3.12),
    "gpt2-medium": (2.85, 2.84),
    "gpt2-large": (2.66, 2.67),
    "gpt2-xl": (2.56, 2.54),
}
SPLITS = ("train", "val")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=list(NANOGPT), help="hub names or folders")
    parser.add_argument("--data_dir", type=Path, default=Path("data/openwebtext"))
    parser.add_argument("--block_size", type=int, default=1024, help="context, in tokens")
    parser.add_argument("--max_blocks", type=int, help="blocks of each split (default: all)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast instead of float32")
    parser.add_argument("--results", type=Path, help="default: out/eval_baselines_DATA.json")
    parser.add_argument("--resume", action="store_true", help="continue a stopped evaluation")
    args = parser.parse_args()
    for name in ("block_size", "max_blocks"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: pass a number above 0")
    args.data = args.data_dir.resolve().name
    if args.results is None:
        args.results = Path(f"out/eval_baselines_{args.data}.json")
    return args


def open_splits(args: argparse.Namespace) -> dict[str, TokenSplit]:
    """Checks that the data has the tokens of all models, and returns its splits."""
    vocab_size = None
    for name in args.models:
        config = load_config(name)
        check_length("--block_size", args.block_size, name, config)
        check_tokens(args.data_dir, name)
        vocab_size = min(config.vocab_size, vocab_size or config.vocab_size)
    return {split: open_split(args.data_dir, split, vocab_size=vocab_size) for split in SPLITS}


def evaluate(
    model: PreTrainedModel, split: TokenSplit, args: argparse.Namespace, accelerator: Accelerator
) -> dict[str, Any]:
    """Returns the loss over a split, the number of evaluated blocks, and the number of all."""
    blocks = ContiguousBlocks(split, args.block_size)
    count = min(len(blocks), args.max_blocks or len(blocks))
    # the middle block of each of `count` equal parts
    chosen = [(2 * i + 1) * len(blocks) // (2 * count) for i in range(count)]
    data_set = Subset(blocks, chosen) if count < len(blocks) else blocks
    loss = evaluate_data_set(model, data_set, args.block_size, accelerator, split.path.stem)
    return {**loss, "blocks": count, "blocks_in_split": len(blocks)}


def render(results: dict[str, Any]) -> str:
    """Makes the Markdown table of a results file, and the line under it."""
    found: dict[str, dict[str, Any]] = {}
    for row in results["losses"]:
        found.setdefault(row["model"], {})[row["split"]] = row
    on_openwebtext = results["data"] == "openwebtext"
    rows = []
    for name in {**NANOGPT, **found} if on_openwebtext else found:
        splits = found.get(name, {})
        parameters = [f"{row['parameters']:,}" for row in splits.values()]
        losses = [_loss(splits[split]) if split in splits else "not run here" for split in SPLITS]
        theirs = "{:.2f} / {:.2f}".format(*NANOGPT[name]) if name in NANOGPT else ""
        rows.append((f"`{name}`", *(parameters or [""])[:1], *losses, theirs))
    header = ("model", "parameters", "train loss", "val loss", "nanoGPT's, train / val")
    table = markdown_table(header, rows)
    if not found:
        return table
    sizes = [
        f"{row['tokens']:,} tokens of {split}" for split, row in next(iter(found.values())).items()
    ]
    return (
        f"{table}\n\n`{results['data']}`, {' and '.join(sizes)} in blocks of "
        f"{results['block_size']:,}, {results['dtype']}; ± is one standard error, from the scatter "
        "between blocks."
    )


def _loss(row: dict[str, Any]) -> str:
    error = row["standard_error"]
    return f"{row['loss']:.4f}" + ("" if error is None else f" ± {error:.4f}")


def main() -> None:
    args = parse_arguments()
    names = model_names(args.models)
    accelerator = Accelerator(
        # without a GPU accelerate would treat each of several processes as a separate run
        cpu=not torch.accelerator.is_available(),
        mixed_precision="bf16" if args.bf16 else "no",
    )
    splits = open_splits(args)
    settings = {
        "data": args.data,
        "fingerprints": {split: splits[split].fingerprint() for split in SPLITS},
        "block_size": args.block_size,
        "max_blocks": args.max_blocks,
        "dtype": "bfloat16 autocast" if args.bf16 else "float32",
        "losses": [],
    }
    results = begin_results(args.results, settings, args.resume, accelerator.device.type)
    for name, path in names.items():
        weights = {"weights": weights_fingerprint(path)}
        splits_left = [
            split
            for split in SPLITS
            if not is_measured(results["losses"], {"model": name, "split": split}, weights)
        ]
        if not splits_left:
            continue  # measured before
        model = load_model(path)
        parameters = model.num_parameters()
        model = accelerator.prepare_model(model, evaluation_mode=True)
        for split in splits_left:
            accelerator.print(f"== {name} on {args.data}, {split} split")
            row = {"model": name, **weights, "parameters": parameters, "split": split}
            results["losses"].append(row | evaluate(model, splits[split], args, accelerator))
            if accelerator.is_main_process:
                write_json(args.results, results)
        del model
        accelerator.free_memory()  # accelerate drops its references to the model
    accelerator.print(f"\n{render(results)}\n\nwritten to {args.results}")


if __name__ == "__main__":
    run(main)
