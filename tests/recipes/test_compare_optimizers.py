"""The comparison: its files, a sweep, resuming, and a recipe that fails."""

import json
import shutil
from pathlib import Path

import pytest
from tiny import QUIET, TINY

from recipes.compare_optimizers import render_table

Image = pytest.importorskip("PIL.Image")

SCRIPT = "recipes/compare_optimizers.py"
RECIPE = Path(__file__).parents[2] / "recipes" / "train_shakespeare_char.py"
FEW = ("--max_steps", 4, "--eval_steps", 2, "--save_steps", 2, "--logging_steps", 1)
pytestmark = pytest.mark.slow


def read(folder: Path) -> dict:
    return json.loads((folder / "comparison.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def compared(tmp_path_factory, run_script, docs_data):
    """A comparison's folder and its output."""
    folder = tmp_path_factory.mktemp("comparison")
    optims = ("adamw_torch_fused@2e-3", "striped_adamw_8bit", "striped_adamw:nesterov=true")
    flags = (*TINY, *QUIET, *FEW, "--data_dir", docs_data)
    done = run_script(
        *(SCRIPT, RECIPE, "--optim", *optims, "--output_dir", folder, "--", *flags), cwd=folder
    )
    return folder, done.stdout


def test_comparison_json_has_all_measurements(compared):
    folder, _ = compared
    comparison = read(folder)
    assert {"device", "threads", "torch", "transformers", "commit"} <= set(
        comparison["environment"]
    )
    names = [(run["optim"], run["optim_args"]) for run in comparison["runs"]]
    assert names == [
        ("adamw_torch_fused", None),
        ("striped_adamw_8bit", None),
        ("striped_adamw", "nesterov=true"),
    ]
    for run in comparison["runs"]:
        assert run["learning_rate"] == (2e-3 if run["optim"] == "adamw_torch_fused" else 4e-3)
        assert run["steps"] == 4
        assert run["tokens"] == 4 * 12 * 32
        assert run["seed"] == 1337
        for key in ("peak_memory_mib", "median_step_ms", "train_loss", "eval_loss"):
            assert run[key] > 0
        assert run["history"]["steps"] == [1, 2, 3, 4]
        assert run["history"]["eval_steps"] == [2, 4]
    adamw, coded, striped = (run["state_bytes_per_param"] for run in comparison["runs"])
    assert 8 <= adamw < 8.1
    assert coded < striped < adamw
    # one seed: the same weights and the same first batch, before any step
    assert len({round(run["history"]["losses"][0], 4) for run in comparison["runs"]}) == 1


def test_table_and_plot(compared):
    folder, printed = compared
    table = (folder / "comparison.md").read_text(encoding="utf-8")
    assert table.strip() in printed
    assert len(table.splitlines()) == 2 + 3 + 2
    assert table.splitlines()[-1].endswith(f"at {read(folder)['environment']['commit']}.")
    assert "`striped_adamw (nesterov=true)`" in table
    for run in read(folder)["runs"]:
        assert f"{run['eval_loss']:.4f}" in table
    with Image.open(folder / "comparison.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 400


def test_a_stopped_sweep_continues(tmp_path, run_here, docs_data):
    def sweep(*seeds):
        flags = (*TINY, *QUIET, *FEW, "--eval_strategy", "no", "--save_strategy", "no")
        flags += ("--load_best_model_at_end", "false", "--data_dir", docs_data)
        arguments = ("--optim", "striped_adamw", "--learning_rate", "1e-3", "2e-3", "--seed")
        run_here(
            *(SCRIPT, RECIPE, *arguments, *seeds),
            *("--output_dir", tmp_path, "--resume", "--", *flags),
        )

    sweep(1)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/run.json")}
    sweep(1, 2)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    runs = read(tmp_path)["runs"]
    assert [(run["learning_rate"], run["seed"]) for run in runs] == [
        (1e-3, 1),
        (1e-3, 2),
        (2e-3, 1),
        (2e-3, 2),
    ]
    assert len((tmp_path / "comparison.md").read_text(encoding="utf-8").splitlines()) == 2 + 2 + 2

    for path in tmp_path.glob("*/run.json"):
        run = json.loads(path.read_text(encoding="utf-8"))
        run["environment"]["commit"] = (
            "0a1b2c3" if path.parent.name.endswith("1e-3-2") else "4d5e6f7"
        )
        path.write_text(json.dumps(run), encoding="utf-8")
    sweep(1, 2)
    others = "striped_adamw-1e-3-1, striped_adamw-2e-3-1, striped_adamw-2e-3-2"
    commits = f"4d5e6f7 ({others}), 0a1b2c3 (striped_adamw-1e-3-2)"
    assert read(tmp_path)["environment"] == {**run["environment"], "commit": commits}
    assert f"at {commits}." in (tmp_path / "comparison.md").read_text(encoding="utf-8")


def test_a_run_with_another_launch_configuration_is_repeated(tmp_path, run_here, docs_data):
    flags = (*TINY, *QUIET, *FEW, "--eval_strategy", "no", "--save_strategy", "no")
    flags += ("--load_best_model_at_end", "false", "--data_dir", docs_data)

    def compare(*arguments):
        printed = run_here(
            *(SCRIPT, RECIPE, "--optim", "striped_adamw"),
            *("--output_dir", tmp_path, "--resume", *arguments, "--", *flags),
        )
        (written,) = tmp_path.glob("*/run.json")
        return "another --accelerate_config: it is run again" in printed, written.stat().st_mtime_ns

    first = compare()
    assert not first[0]
    config = tmp_path / "launch.yaml"
    shipped = RECIPE.parent / "accelerate" / "single.yaml"
    config.write_text(shipped.read_text(encoding="utf-8"), encoding="utf-8")
    noted, launched = compare("--accelerate_config", config)
    assert noted
    assert launched != first[1]
    assert compare("--accelerate_config", config) == (False, launched)
    # as if the file's content had changed since
    (tmp_path / "striped_adamw" / "accelerate_config.yaml").write_text("num_processes: 2\n")
    noted, again = compare("--accelerate_config", config)
    assert noted
    assert again != launched


def test_a_run_on_other_data_is_not_taken_over(tmp_path, run_here, docs_data):
    data = tmp_path / "data"
    shutil.copytree(docs_data, data)
    flags = (*TINY, *QUIET, *FEW, "--eval_strategy", "no", "--save_strategy", "no")
    flags += ("--load_best_model_at_end", "false", "--data_dir", data)

    def compare():
        printed = run_here(
            *(SCRIPT, RECIPE, "--optim", "striped_adamw"),
            *("--output_dir", tmp_path / "out", "--resume", "--", *flags),
        )
        (written,) = tmp_path.glob("out/*/run.json")
        return "was changed: it is run again" in printed, written.stat().st_mtime_ns

    first = compare()
    assert not first[0]
    assert compare() == first
    for split in ("train", "val"):  # prepared anew, in the same place and of the same size
        path = data / f"{split}.bin"
        tokens = bytearray(path.read_bytes())
        tokens[:2], tokens[2:4] = tokens[2:4], tokens[:2]
        tokens[4:8] = tokens[:4]
        path.write_bytes(tokens)
        noted, again = compare()
        assert noted
        assert again != first[1]
        assert compare() == (False, again)
        first = (noted, again)


def test_a_run_that_diverges_or_fails_does_not_lose_the_others(tmp_path, run_here, docs_data):
    """This also holds for runs of one step, which have no median time."""
    flags = (*TINY, *QUIET, "--max_steps", 1, "--eval_steps", 1, "--save_steps", 1)
    flags += ("--warmup_steps", 0, "--data_dir", docs_data)
    optims = ("adamw_torch_fused@1e30", "no_such_optimizer@1e-3", "striped_adamw@1e-3")
    fails = "error: not in the comparison, since they failed: no_such_optimizer-1e-3"
    run_here(
        *(SCRIPT, RECIPE, "--optim", *optims, "--output_dir", tmp_path, "--", *flags), fails=fails
    )
    diverged, striped = read(tmp_path)["runs"]
    assert diverged["eval_loss"] is None
    assert striped["eval_loss"] > 0
    table = (tmp_path / "comparison.md").read_text(encoding="utf-8").splitlines()
    assert table[2].endswith("| diverged | diverged |")
    assert table[3].startswith("| `striped_adamw` | 0.001 |")
    assert table[-1].startswith("Weights in float32. Measured on ")
    assert (tmp_path / "comparison.png").exists()


def test_sweep_with_a_rate_that_diverged():
    runs = [
        {"optim": "a", "optim_args": None, "learning_rate": rate, "train_loss": loss}
        | {"eval_loss": loss}
        for rate, loss in ((1.0, 2.0), (1.0, None), (2.0, 3.0), (2.0, 4.0))
    ]
    rows = render_table({"runs": runs}).splitlines()[2:]
    assert rows[0] == "| `a` | 1 | diverged | diverged | 2.0000 to diverged | 2 |"
    assert rows[1] == "| `a` | 2 | 3.5000 | 3.5000 | 3.0000 to 4.0000 | 2 |"


def test_failing_recipe_ends_the_comparison(tmp_path, run_here):
    arguments = (RECIPE, "--optim", "striped_adamw", "--output_dir", tmp_path, "--")
    fails = "striped_adamw failed; its output above says why"
    run_here(SCRIPT, *arguments, "--data_dir", "no", fails=fails)
    assert not (tmp_path / "comparison.json").exists()


def test_unknown_recipe_is_named(run_here):
    arguments = ("no.py", "--optim", "striped_adamw")
    run_here(SCRIPT, *arguments, fails="no.py does not exist")
