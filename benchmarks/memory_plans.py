"""Plan the memory of finetuning GPT-2 XL and models of 7 and 8 billion parameters.

    python -m benchmarks.memory_plans    # some minutes on one core; needs no network

recipes/plan_memory.py at batch 1 and context 1,024, with gradient checkpointing. GPT-2 XL is
trained as by finetune_shakespeare.py: 32 passes in a step, with the loss in chunks. The others are
trained as by plain Trainer, with one pass in a step. Two models with large vocabularies are also
trained with the loss in chunks.
"""

import argparse
from typing import Any

from recipes.plan_memory import WAYS, plan
from striped_hf.cli import run
from striped_hf.published_configs import load_config
from striped_hf.results import environment, markdown_table, write_json
from striped_hf.trainer.step_memory import Memory, Setting

RESULTS = "benchmarks/results/memory_plans.json"
MODELS = (
    ("llama-2-7b", Setting()),
    ("mistral-7b", Setting()),
    ("qwen2.5-7b", Setting()),
    ("qwen2.5-7b", Setting(chunked_loss=True)),
    ("llama-8b", Setting()),
    ("llama-8b", Setting(chunked_loss=True)),
    ("gpt2-xl", Setting(accumulation=32, chunked_loss=True)),
)
# the columns, by the optimizer's name in Trainer, the weights' dtype, and whether LoRA is trained
COLUMNS = {
    ("adamw_torch_fused", "float32", False): "AdamW",
    ("adamw_bnb_8bit", "float32", False): "8-bit AdamW",
    ("striped_adamw_8bit", "float32", False): "`striped_adamw_8bit`",
    ("striped_adamw_8bit", "bfloat16", False): "`striped_adamw_8bit`, bfloat16",
    ("striped_adamw_8bit_layerwise", "bfloat16", False): "`8bit_layerwise`, bfloat16",
    ("striped_adamw_4bit_layerwise", "bfloat16", False): "`4bit_layerwise`, bfloat16",
    ("adamw_torch_fused", "bfloat16", True): "LoRA",
}


def _key(way: Any) -> tuple[str, str, bool]:
    return way.optim, str(way.dtype).removeprefix("torch."), way.lora


def compute() -> list[dict[str, Any]]:
    """Returns what each way needs for each model."""
    ways = tuple(way for way in WAYS if _key(way) in COLUMNS)
    models: list[dict[str, Any]] = []
    for name, setting in MODELS:
        rows: list[dict[str, Any]] = []
        for each in plan(load_config(name), setting, ways, checkpointing=[True]):
            optim, dtype, lora = _key(each.way)
            row = {"optim": optim, "dtype": dtype, "lora": lora, "bytes": each.memory._asdict()}
            rows.append(row)
        of_model = {"batch_size": setting.batch_size, "context": setting.context}
        of_model |= {"accumulation": setting.accumulation, "chunked_loss": setting.chunked_loss}
        models.append({"name": name, **of_model, "rows": rows})
        print(f"{name}\n\n{_table([models[-1]])}\n", flush=True)
    return models


def _title(model: dict[str, Any]) -> str:
    return f"`{model['name']}`" + (", loss in chunks" if model["chunked_loss"] else "")


def _table(models: list[dict[str, Any]]) -> str:
    rows = []
    for model in models:
        peaks = {
            (row["optim"], row["dtype"], row["lora"]): Memory(**row["bytes"]).total
            for row in model["rows"]
        }
        rows.append((_title(model), *(f"{peaks[key] / 2**30:.1f}" for key in COLUMNS)))
    return markdown_table(("model", *COLUMNS.values()), rows)


def render(results: dict[str, Any]) -> str:
    """Makes the Markdown table of a results file, and the line under it."""
    return (
        f"{_table(results['models'])}\n\nGiB at the peak of a training step with gradient "
        "checkpointing, batch 1, context 1,024, computed on tensors without memory. The CUDA "
        "context of about 1 GiB and fragmentation come on top. Where no dtype is given, weights "
        "are float32 and the passes are under bfloat16 autocast. LoRA has rank 16 on bfloat16 "
        "weights. `gpt2-xl` is trained as by `finetune_shakespeare.py`, with 32 passes in a step, "
        "the others with one pass. The loss in chunks is the recipes'; plain Trainer holds all "
        "logits."
    )


def render_parts(results: dict[str, Any]) -> str:
    """Makes the Markdown table of what lives at the peak of the layer-wise steps."""
    rows = []
    for model in results["models"]:
        for row in model["rows"]:
            if not row["optim"].endswith("layerwise"):
                continue
            memory = Memory(**row["bytes"])
            sizes = (f"{size / 2**30:.2f}" for size in (*memory, memory.total))
            rows.append((_title(model), f"`{row['optim']}`", *sizes))
    header = (
        *("model", "optim", "weights", "gradients", "state", "optimizer's buffers"),
        *("activations", "peak, GiB"),
    )
    return markdown_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", default=RESULTS, help=f"default: {RESULTS}")
    args = parser.parse_args()
    results = {"environment": environment("cpu"), "models": compute()}
    write_json(args.results, results)
    print(f"{render_parts(results)}\n\nwritten to {args.results}")


if __name__ == "__main__":
    run(main)
