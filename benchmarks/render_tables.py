"""Render the README's tables and plots from benchmarks/results/*.json.

    python -m benchmarks.render_tables            # rewrites README.md where a table has changed

Each table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`, and says so where its
results file is not there yet. The benchmark's plots stand under their tables.
"""

import json
import re
from pathlib import Path

from benchmarks import (
    memory_budget,
    optimizer_tables,
    processes,
    sharding,
    sharding_scale,
    state_bytes,
    tokenization,
    training_memory,
    training_step,
)
from recipes import eval_baselines, eval_zero_shot
from recipes.compare_optimizers import render_plot, render_table
from striped_hf.results import measured_on, write_text

BENCHMARKS = Path(__file__).resolve().parent
README = BENCHMARKS.parent / "README.md"
TABLES = {
    "shakespeare_char_cpu": render_table,
    "shakespeare_char_cpu_sweep": render_table,
    "shakespeare_char_cpu_quality": render_table,
    "finetune_stories260k": render_table,
    "eval_baselines_openwebtext": eval_baselines.render,
    "eval_baselines_shakespeare_stories": eval_baselines.render,
    "zero_shot_stories260k": eval_zero_shot.render,
    "training_step_cpu_cpu": training_step.render,
    "training_step_gpt2_cuda": training_step.render,
    "pretrain_novels": processes.render,
    "openwebtext_novels": tokenization.render,
    "state_bytes": state_bytes.render,
    "optimizers_gpt2_cpu_float32": optimizer_tables.render,
    "optimizers_gpt2_cpu_float32_two_dies": optimizer_tables.render,
    "optimizers_gpt2_xl_cuda_float32": optimizer_tables.render,
    "optimizers_gpt2_xl_cuda_bfloat16": optimizer_tables.render,
    "finetune_gpt2_xl_cuda": training_memory.render,
    "memory_gpt2_xl_cpu": memory_budget.render_devices,
    "sharding_cpu": sharding.render,
    "sharding_scale": sharding_scale.render,
}
# what stands where there is no results file, if it is more than that
UNMEASURED = {
    "eval_baselines_openwebtext": eval_baselines.render({"data": "openwebtext", "losses": []})
}
PLOTS = {
    "shakespeare_char_cpu": render_plot,
    "shakespeare_char_cpu_sweep": render_plot,
    "shakespeare_char_cpu_quality": render_plot,
    "optimizers_gpt2_cpu_float32": optimizer_tables.draw,
    "optimizers_gpt2_cpu_float32_two_dies": optimizer_tables.draw,
    "optimizers_gpt2_xl_cuda_float32": optimizer_tables.draw,
    "optimizers_gpt2_xl_cuda_bfloat16": optimizer_tables.draw,
}


def read(name: str) -> dict | None:
    """Returns a results file; None where it is not there."""
    path = BENCHMARKS / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def has_points(name: str, results: dict) -> bool:
    """Tells whether a table is a benchmark's, with times to plot."""
    rows = results["optimizers"] if PLOTS.get(name) is optimizer_tables.draw else []
    return any(row.get("usable") for row in rows)


def render(readme: str) -> str:
    """Returns the README's text with every table as its results file has it."""
    for name, table in TABLES.items():
        results = read(name)
        text = (
            UNMEASURED.get(name, "Not measured yet.")
            if results is None
            else f"{table(results)}\n\n{measured_on(results['environment'])}"
        )
        if results is not None and has_points(name, results):
            text += f"\n\n![State and time of a step](benchmarks/results/{name}.png)"
        block = f"<!-- begin {name} -->\n{text}\n<!-- end {name} -->"
        places = re.findall(rf"<!-- begin {name} -->.*?<!-- end {name} -->", readme, flags=re.S)
        if len(places) != 1:
            raise ValueError(f"{README} has {len(places)} places for the table {name}: make it one")
        readme = readme.replace(places[0], block)
    return readme


def main() -> None:
    write_text(README, render(README.read_text(encoding="utf-8")))
    for name, draw in PLOTS.items():
        results = read(name)
        if results is not None and (draw is not optimizer_tables.draw or has_points(name, results)):
            draw(results, BENCHMARKS / "results" / f"{name}.png")


if __name__ == "__main__":
    main()
