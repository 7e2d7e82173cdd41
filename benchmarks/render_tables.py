"""Render every table and plot of the pages from benchmarks/results/*.json.

    python -m benchmarks.render_tables    # rewrites the pages whose tables have changed

The pages are README.md, recipes/README.md, benchmarks/*.md and docs/*.md. A table's place is
between `<!-- begin NAME -->` and `<!-- end NAME -->`, and each table of ``TABLES`` has exactly one
place. If there is no results file yet, the place says so. The plots go into docs/plots/.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import (
    convolutions,
    finetuning_dtypes,
    gpu_parts,
    gpu_static,
    host_time,
    layerwise_losses,
    live_bytes,
    loss_tables,
    memory_budget,
    memory_plans,
    momentum_codes,
    optimizer_tables,
    processes,
    rounding_noise,
    second_moments,
    sharding,
    sharding_scale,
    short_tables,
    state_bytes,
    tokenization,
    training_step,
    weight_rounding,
)
from recipes import eval_baselines, eval_zero_shot
from recipes.compare_optimizers import render_plot, render_table
from striped_hf.results import common_environment, measured_on, write_text

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
PLOTS = REPOSITORY / "docs" / "plots"
PLACE = re.compile(r"<!-- begin (\w+) -->\n.*?<!-- end \1 -->", flags=re.S)

Results = dict[str, Any]


class PageTable(NamedTuple):
    """The content of one place in a page.

    Args:
        render: Makes the Markdown from the contents of ``files``, one argument each.
        files: The results files without ``.json``; if empty, the one file with the table's name.
        draw: Draws the plot of the first file, named like the table.
        shows_plot: Whether the place shows the plot. Otherwise the page's text embeds it.
        plot_text: The plot's alternative text there.
        unmeasured: The text of the place while a results file is missing.
        computed: Whether nothing was measured.
    """

    render: Callable[..., str]
    files: tuple[str, ...] = ()
    draw: Callable[[Results, Path], None] | None = None
    shows_plot: bool = False
    plot_text: str = "State and time of a step"
    unmeasured: str = "Not measured yet."
    computed: bool = False


COMPARISON = PageTable(render_table, draw=render_plot)
OPTIMIZERS = PageTable(optimizer_tables.render, draw=optimizer_tables.draw, shows_plot=True)
LOSSES = PageTable(
    loss_tables.render,
    draw=loss_tables.draw,
    shows_plot=True,
    plot_text="Validation loss over optimizer state",
)
ONE_DIE, TWO_DIES = "optimizers_gpt2_cpu_float32", "optimizers_gpt2_cpu_float32_two_dies"

TABLES = {
    # the README's short ones
    "short_losses": PageTable(short_tables.losses, ("losses_char", "losses_finetune")),
    "short_state_bytes": PageTable(short_tables.state_bytes, ("state_bytes",)),
    "short_step_time": PageTable(short_tables.step_time, (ONE_DIE, TWO_DIES)),
    "sample_shakespeare_char": PageTable(short_tables.sample),
    # losses
    "shakespeare_char_cpu_sweep": COMPARISON,
    "shakespeare_char_cpu_quality": COMPARISON,
    "losses_char": LOSSES,
    "losses_finetune": LOSSES,
    "losses_novels": LOSSES,
    "momentum_codes": PageTable(momentum_codes.render),
    "second_moments": PageTable(second_moments.render),
    "finetune_stories260k": PageTable(render_table),
    "pretrain_novels": PageTable(processes.render),
    "weight_rounding": PageTable(weight_rounding.render),
    "finetune_smollm2": PageTable(
        finetuning_dtypes.render, ("finetune_smollm2_float32", "finetune_smollm2_bfloat16")
    ),
    "layerwise_accumulation": PageTable(
        layerwise_losses.render_accumulation, ("layerwise_losses",)
    ),
    "layerwise_spikes": PageTable(layerwise_losses.render_spikes, ("layerwise_losses",)),
    "eval_baselines_openwebtext": PageTable(
        eval_baselines.render,
        unmeasured=eval_baselines.render({"data": "openwebtext", "losses": []}),
    ),
    "eval_baselines_shakespeare_stories": PageTable(eval_baselines.render),
    "zero_shot_stories260k": PageTable(eval_zero_shot.render),
    "rounding_noise": PageTable(rounding_noise.render),
    # memory and time
    "state_bytes": PageTable(state_bytes.render, draw=short_tables.draw_state_bytes),
    "convolution_models": PageTable(convolutions.render_models, ("state_bytes_convolutions",)),
    "parameter_shapes": PageTable(convolutions.render_shapes, ("state_bytes_convolutions",)),
    "live_bytes_gpt2": PageTable(live_bytes.render),
    "memory_plans": PageTable(memory_plans.render, computed=True),
    "memory_plans_parts": PageTable(memory_plans.render_parts, ("memory_plans",), computed=True),
    "memory_gpt2_xl_cpu": PageTable(memory_budget.render_devices),
    ONE_DIE: OPTIMIZERS,
    TWO_DIES: OPTIMIZERS,
    "host_time": PageTable(host_time.render),
    "training_step_cpu_cpu": PageTable(training_step.render),
    "training_step_layerwise_cpu": PageTable(training_step.render),
    "openwebtext_novels": PageTable(tokenization.render),
    "sharding_cpu": PageTable(sharding.render),
    "sharding_scale": PageTable(sharding_scale.render),
    # on a GPU: predicted, then measured by `make gpu`
    "gpu_static": PageTable(gpu_static.render, computed=True),
    **{
        name: OPTIMIZERS if renderer is optimizer_tables.render else PageTable(renderer)
        for name, renderer in gpu_parts.RENDER.items()
    },
}


def pages() -> list[Path]:
    """Lists the Markdown pages."""
    return [
        REPOSITORY / "README.md",
        REPOSITORY / "recipes" / "README.md",
        *sorted((REPOSITORY / "benchmarks").glob("*.md")),
        *sorted((REPOSITORY / "docs").glob("*.md")),
    ]


def read_results(name: str) -> list[Results] | None:
    """Returns the results of a table's files; None if a file is missing."""
    paths = [RESULTS / f"{file}.json" for file in TABLES[name].files or (name,)]
    if not all(path.is_file() for path in paths):
        return None
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def has_plot(name: str, results: list[Results]) -> bool:
    """Tells whether a table has a plot. A benchmark without a usable time has nothing to draw."""
    if TABLES[name].draw is optimizer_tables.draw:
        return any(row.get("usable") for row in results[0]["optimizers"])
    return TABLES[name].draw is not None


def render_place(name: str, folder: Path) -> str:
    """Returns the Markdown of a table, and where it was measured, for a page in ``folder``."""
    table, results = TABLES[name], read_results(name)
    if results is None:
        return table.unmeasured
    files = table.files or (name,)
    environment = common_environment(
        {file: each["environment"] for file, each in zip(files, results, strict=True)}
    )
    text = table.render(*results)
    if not all(each.get("complete", True) for each in results):
        text += "\n\nThe run was cut off before its end."
    origin = measured_on(environment)
    if table.computed:
        origin = (
            f"Computed with torch {environment['torch']}, transformers "
            f"{environment['transformers']}, at {environment['commit']}."
        )
    text += f"\n\n{origin}"
    if table.shows_plot and has_plot(name, results):
        path = Path(os.path.relpath(PLOTS / f"{name}.png", folder)).as_posix()
        text += f"\n\n![{table.plot_text}]({path})"
    return text


def render(texts: Mapping[Path, str]) -> dict[Path, str]:
    """Returns the texts of the pages with every table rendered from its results files.

    Args:
        texts: The text of each page.

    Raises:
        ValueError: A table has no place or several, or a place names none of ``TABLES``.
    """
    places = [match[1] for text in texts.values() for match in PLACE.finditer(text)]
    for name in {*TABLES, *places}:
        if name not in TABLES or places.count(name) != 1:
            raise ValueError(
                f"the pages have {places.count(name)} places for the table {name}, and TABLES has "
                f"{int(name in TABLES)}: there must be one each"
            )

    def rendered(text: str, folder: Path) -> str:
        return PLACE.sub(
            lambda match: (
                f"<!-- begin {match[1]} -->\n{render_place(match[1], folder)}\n"
                f"<!-- end {match[1]} -->"
            ),
            text,
        )

    return {page: rendered(text, page.parent) for page, text in texts.items()}


def main() -> None:
    texts = {page: page.read_text(encoding="utf-8") for page in pages()}
    for page, text in render(texts).items():
        if text != texts[page]:
            write_text(page, text)
            print(f"{page.relative_to(REPOSITORY)} has new tables")
    for name, table in TABLES.items():
        results = read_results(name)
        if table.draw is not None and results is not None and has_plot(name, results):
            table.draw(results[0], PLOTS / f"{name}.png")


if __name__ == "__main__":
    main()
