"""Evaluate causal language models zero-shot: WikiText-2's perplexity, and LAMBADA.

    python recipes/eval_zero_shot.py gpt2 gpt2-medium gpt2-large gpt2-xl

Without a network, on local files:

    python recipes/eval_zero_shot.py MODEL --wikitext wiki.test.raw --lambada lambada_test.jsonl

WikiText: the raw test set is one text, with its lines joined as in Hugging Face's guide to
perplexity and no token added before it. The model reads it in overlapping windows. Each token but
the first is a target once; in later windows it is only context. Perplexity is per token of the
model, so models with different tokenizers cannot be compared.

LAMBADA: the task lambada_openai of lm-evaluation-harness, the last word of each of 5,153 passages.
It needs `pip install --constraint constraints.txt --editable '.[eval]'`; --tasks wikitext does not.

The results file is written after each task. --resume continues a stopped evaluation. The table in
docs/ comes from a file in benchmarks/results/; pass that file to --results to update it.
The weights are float32, whatever the dtype of the saved model.
"""

import argparse
import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

# imported before the packages of an extra, to explain a missing one
from striped_hf.cli import UserError, model_names, one_line, run

# isort: split
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size
from datasets import load_dataset

from striped_hf.data import StridedWindows
from striped_hf.evaluation import evaluate_data_set, largest_batch
from striped_hf.fingerprint import file_fingerprint
from striped_hf.pretrained import (
    check_length,
    encode,
    load_config,
    load_model,
    load_tokenizer,
    weights_fingerprint,
)
from striped_hf.results import begin_results, is_measured, markdown_table, write_json

TASKS = ("wikitext", "lambada")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="hub names or folders")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--wikitext", type=Path, metavar="FILE", help="wiki.test.raw of WikiText-2")
    parser.add_argument("--lambada", type=Path, metavar="FILE", help='lines of {"text": ...}')
    parser.add_argument("--window", type=int, default=1024, help="tokens in a window of WikiText")
    parser.add_argument(
        "--stride",
        type=int,
        help="tokens between the starts of two windows (default: half a window)",
    )
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast instead of float32")
    parser.add_argument("--results", type=Path, default="out/zero_shot.json")
    parser.add_argument("--resume", action="store_true", help="continue a stopped evaluation")
    args = parser.parse_args()
    if args.window < 2:
        parser.error(f"--window {args.window}: pass 2 or more")
    args.stride = args.window // 2 if args.stride is None else args.stride
    if not 1 <= args.stride < args.window:
        parser.error(f"--stride {args.stride}: pass a number from 1 to {args.window - 1}")
    for name in ("wikitext", "lambada"):
        path = getattr(args, name)
        if path is not None and not path.is_file():
            parser.error(f"--{name} {path}: there is no such file")
    if "lambada" in args.tasks and importlib.util.find_spec("lm_eval") is None:
        parser.error(
            "--tasks lambada needs lm-evaluation-harness: pip install --constraint "
            "constraints.txt --editable '.[eval]', or pass --tasks wikitext"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error("the evaluation runs in one process: start it with python")
    return args


def read_wikitext(file: Path | None) -> str:
    """Returns the test set as one text."""
    try:
        if file is None:
            lines = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"]
        else:
            with file.open(encoding="utf-8", newline="\n") as opened:
                lines = list(opened)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot get WikiText-2: pass its wiki.test.raw with --wikitext ({one_line(error)})"
        ) from error
    # the hub's rows are the lines of the file, except that blank lines are empty rows
    return "\n\n".join(line if line.strip() else "" for line in lines)


def check_lambada(file: Path) -> None:
    """Checks that the harness can read a local file; UserError names a wrong line."""
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                passage = json.loads(line)["text"]
                passage.rindex(" ")  # before the target word
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                raise UserError(
                    f'--lambada {file}: line {number} is no {{"text": passage}} of several words; '
                    f"pass LAMBADA's test set as OpenAI published it ({one_line(error)})"
                ) from error


def evaluate_wikitext(
    model: Any, tokenizer: Any, args: argparse.Namespace, accelerator: Accelerator
) -> dict[str, Any]:
    """Returns the results of ``evaluate_data_set`` over overlapping windows."""
    ids = encode(tokenizer, args.text, f"WikiText-2 for {args.model}", add_special_tokens=False)
    if len(ids) < 2:
        raise UserError(f"--wikitext {args.wikitext}: {len(ids)} tokens are too few to evaluate on")
    windows = StridedWindows(np.array(ids), args.window, args.stride)
    return evaluate_data_set(model, windows, args.window - 1, accelerator, "WikiText-2")


def evaluate_lambada(
    model: Any, tokenizer: Any, args: argparse.Namespace, accelerator: Accelerator
) -> dict[str, Any]:
    """Returns the harness's accuracy and perplexity."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    task: dict[str, Any] = {"task": "lambada_openai"}
    if args.lambada is not None:
        files = {"test": str(args.lambada.resolve())}
        task |= {"dataset_path": "json", "dataset_name": None}
        task["dataset_kwargs"] = {"data_files": files}
    # the harness's definition of the task, without a search through thousands of others
    tasks = TaskManager(
        include_defaults=False, include_path=str(Path(lm_eval.__file__).parent / "tasks/lambada")
    )
    context = getattr(model.config, "max_position_embeddings", args.window)
    largest = largest_batch(args.window, model.config.vocab_size, accelerator.device)

    @find_executable_batch_size(starting_batch_size=largest)
    def evaluate(batch_size: int) -> dict[str, Any]:
        harness = HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=context
        )
        return lm_eval.simple_evaluate(
            harness,
            tasks=[{"group": "zero_shot", "task": [task]}],  # a group may override its tasks
            task_manager=tasks,
            bootstrap_iters=1000,
        )

    try:
        found = evaluate()["results"]["lambada_openai"]
    except OSError as error:  # no network, and not in the cache
        raise UserError(
            f"cannot get LAMBADA: pass lambada_test.jsonl with --lambada ({one_line(error)})"
        ) from error
    return {
        "accuracy": found["acc,none"],
        "accuracy_standard_error": found["acc_stderr,none"],
        "perplexity": found["perplexity,none"],
        "perplexity_standard_error": found["perplexity_stderr,none"],
        "passages": found["sample_len"],
        "harness": lm_eval.__version__,
    }


def _perplexity(value: float) -> str:
    return f"{value:,.2f}" if value < 1e4 else f"{value:,.0f}"


def render(results: dict[str, Any]) -> str:
    """Makes the Markdown table of a results file, and the line under it."""
    found: dict[str, dict[str, Any]] = {}
    for row in results["scores"]:
        found.setdefault(row["model"], {"parameters": row["parameters"]})[row["task"]] = row
    rows = []
    for name, model in found.items():
        cells = [f"`{name}`", f"{model['parameters']:,}", *[""] * 3]
        if "wikitext" in model:
            cells[2] = _perplexity(model["wikitext"]["perplexity"])
        if "lambada" in model:
            lambada = model["lambada"]
            error = 100 * lambada["accuracy_standard_error"]
            cells[3] = f"{100 * lambada['accuracy']:.2f}% ± {error:.2f}"
            cells[4] = _perplexity(lambada["perplexity"])
        rows.append(tuple(cells))
    header = (
        *("model", "parameters", "WikiText-2 perplexity", "LAMBADA accuracy"),
        "LAMBADA perplexity",
    )
    return (
        f"{markdown_table(header, rows)}\n\nWikiText-2 in windows of {results['window']:,} tokens "
        f"and strides of {results['stride']:,}, {results['dtype']}."
    )


def main() -> None:
    args = parse_arguments()
    names = model_names(args.models)
    texts: dict[str, str | None] = dict.fromkeys(TASKS)  # their fingerprints
    if "wikitext" in args.tasks:
        args.text = read_wikitext(args.wikitext)
        texts["wikitext"] = hashlib.sha256(args.text.encode()).hexdigest()[:16]
    if "lambada" in args.tasks and args.lambada is not None:
        check_lambada(args.lambada)
        texts["lambada"] = file_fingerprint(args.lambada)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), mixed_precision="bf16" if args.bf16 else "no"
    )
    for path in args.models:
        check_length("--window", args.window, path, load_config(path))
    settings = {
        "window": args.window,
        "stride": args.stride,
        "dtype": "bfloat16 autocast" if args.bf16 else "float32",
        "scores": [],
    }
    results = begin_results(args.results, settings, args.resume, accelerator.device.type)
    evaluations = {"wikitext": evaluate_wikitext, "lambada": evaluate_lambada}
    for name, path in names.items():
        measured = {
            task: {"weights": weights_fingerprint(path), "text": texts[task]} for task in args.tasks
        }
        tasks = [
            task
            for task in args.tasks
            if not is_measured(results["scores"], {"model": name, "task": task}, measured[task])
        ]
        if not tasks:
            continue  # measured before
        model = load_model(path)
        tokenizer = load_tokenizer(path)
        model = accelerator.prepare_model(model, evaluation_mode=True)
        args.model = name
        for task in tasks:
            print(f"== {name}: {task}", flush=True)
            row = {"model": name, "parameters": model.num_parameters(), "task": task}
            row |= measured[task]
            scores = evaluations[task](model, tokenizer, args, accelerator)
            results["scores"].append(row | scores)
            write_json(args.results, results)
        del model
        accelerator.free_memory()  # accelerate drops its references to the model
    print(f"\n{render(results)}\n\nwritten to {args.results}")


if __name__ == "__main__":
    run(main)
