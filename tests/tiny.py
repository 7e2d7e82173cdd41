"""Flags that make a recipe small enough for a test, and the files of a run."""

import json
from pathlib import Path
from typing import Any

# a model of one narrow layer, few steps, no progress bars
TINY = ("--preset", "cpu", "--n_layer", 1, "--n_head", 2, "--n_embd", 32, "--block_size", 32)
STEPS = ("--max_steps", 20, "--eval_steps", 10, "--save_steps", 10, "--warmup_steps", 2)
QUIET = ("--disable_tqdm", "true")


def read_run(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))
