"""The table of a finetuning with weights in float32 and in bfloat16, from two comparisons.

SmolLM2-135M-Instruct on tiny Shakespeare in its own tokens, by recipes/compare_optimizers.py:

    python data_scripts/shakespeare.py --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct \\
        --output_dir data/shakespeare_smollm2
    flags="--model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \\
        --data_dir data/shakespeare_smollm2 --max_steps 30 --gradient_accumulation_steps 1 \\
        --gradient_checkpointing true --per_device_eval_batch_size 1 \\
        --eval_strategy no --eval_on_start false \\
        --save_strategy no --load_best_model_at_end false"
    python recipes/compare_optimizers.py recipes/finetune_shakespeare.py \\
        --optim adamw_torch_fused --output_dir out/float32 -- $flags
    python recipes/compare_optimizers.py recipes/finetune_shakespeare.py \\
        --optim adamw_torch_fused striped_adamw_8bit_layerwise --output_dir out/bfloat16 \\
        -- $flags --dtype bfloat16

Copy each comparison.json to benchmarks/results/finetune_smollm2_float32.json and
finetune_smollm2_bfloat16.json, then run ``python -m benchmarks.render_tables``.
"""

from typing import Any

from recipes.compare_optimizers import label
from striped_hf.results import loss_text, markdown_table


def render(*comparisons: dict[str, Any]) -> str:
    """Makes the Markdown table of some comparisons, one row for each run."""
    header = (
        *("optimizer", "weights", "learning rate", "state, bytes per parameter"),
        *("peak memory, MiB", "median step, s", "train loss", "val loss"),
    )
    rows = [
        (
            f"`{label(run)}`",
            run["dtype"],
            f"{run['learning_rate']:g}",
            f"{run['state_bytes_per_param']:.2f}",
            f"{run['peak_memory_mib']:,.0f}",
            f"{run['median_step_ms'] / 1000:.1f}",
            loss_text(run["train_loss"]),
            loss_text(run["eval_loss"]),
        )
        for comparison in comparisons
        for run in comparison["runs"]
    ]
    return markdown_table(header, rows)
