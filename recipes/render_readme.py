"""Render the README's tables and plots from recipes/results/*.json.

    python recipes/render_readme.py            # rewrites README.md where a table has changed

Each table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`.
"""

import json
import re
from pathlib import Path

import bench
import count_state_bytes

from striped_hf.comparison import render_plot, render_table
from striped_hf.results import write_text

RECIPES = Path(__file__).resolve().parent
README = RECIPES.parent / "README.md"
TABLES = {
    "shakespeare_char_cpu": render_table,
    "shakespeare_char_cpu_sweep": render_table,
    "finetune_stories260k": render_table,
    "step_time": bench.render,
    "state_bytes": count_state_bytes.render,
}
PLOTS = ("shakespeare_char_cpu", "shakespeare_char_cpu_sweep")


def read(name: str) -> dict:
    """Returns a results file."""
    return json.loads((RECIPES / "results" / f"{name}.json").read_text(encoding="utf-8"))


def where(results: dict) -> str:
    """Says where a table was measured, in the line under it."""
    environment = results["environment"]
    return (
        f"Measured on {environment['device']}, {environment['threads']} threads, "
        f"torch {environment['torch']}, transformers {environment['transformers']}, "
        f"at {environment['commit']}."
    )


def render(readme: str) -> str:
    """Returns the README's text with every table as its results file has it."""
    for name, table in TABLES.items():
        results = read(name)
        block = f"<!-- begin {name} -->\n{table(results)}\n\n{where(results)}\n<!-- end {name} -->"
        places = re.findall(rf"<!-- begin {name} -->.*?<!-- end {name} -->", readme, flags=re.S)
        if len(places) != 1:
            raise ValueError(f"{README} has {len(places)} places for the table {name}: make it one")
        readme = readme.replace(places[0], block)
    return readme


def main() -> None:
    write_text(README, render(README.read_text(encoding="utf-8")))
    for name in PLOTS:
        render_plot(read(name), RECIPES / "results" / f"{name}.png")


if __name__ == "__main__":
    main()
