"""The comparison of losses: its grid of learning rates, its runs, and its tables."""

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import loss_peers, loss_tables, loss_tasks, losses, short_tables
from benchmarks.loss_grid import MOST_RATES, wanted
from benchmarks.loss_peers import PEERS
from benchmarks.loss_studies import PARTS, STUDIES, CodedMomentum
from benchmarks.momentum_codes import CODES
from striped_hf.cli import UserError
from striped_hf.optim import StripedAdamW

SCRIPT = "benchmarks.losses"
RATES, SEEDS = (2.0, 4.0, 8.0), (1, 2, 3)
MISSING = "came"
NAMES = ("adamw", "striped_int8", MISSING)


# -------------------------------------------------------------------------------------------------
# the grid
# -------------------------------------------------------------------------------------------------


def complete(loss) -> list[dict]:
    """The runs of a row from its first to its last, one after another."""
    runs: list[dict] = []
    while needed := wanted(runs, RATES, SEEDS):
        rate, seed = needed[0]
        value = loss(rate, seed)
        runs.append({"learning_rate": rate, "seed": seed, "val_loss": value})
        assert len(runs) < 100
    return runs


@pytest.mark.parametrize("optimum", [0.25, 2.0, 4.0, 8.0, 64.0])
def test_the_grid_brackets_the_best_rate(optimum: float):
    runs = complete(lambda rate, seed: abs(math.log2(rate / optimum)) + seed / 100)
    rates = {run["learning_rate"] for run in runs}
    assert min(rates) < optimum < max(rates)
    assert {run["seed"] for run in runs if run["learning_rate"] == optimum} == set(SEEDS)
    assert len({(run["learning_rate"], run["seed"]) for run in runs}) == len(runs)


def test_all_seeds_run_only_near_the_best_rate():
    losses = {2.0: 1.02, 4.0: 1.0, 8.0: 1.5}
    runs = complete(lambda rate, seed: losses.get(rate, 9.0))
    seeds = {rate: sum(run["learning_rate"] == rate for run in runs) for rate in losses}
    assert seeds == {2.0: 3, 4.0: 3, 8.0: 1}


def test_the_mean_over_the_seeds_decides_whether_the_grid_grows():
    # the first seed prefers 4, the others 8
    runs = complete(lambda rate, seed: {4.0: 1.0, 8.0: 1.01 if seed == 1 else 0.9}.get(rate, 1.5))
    assert max(run["learning_rate"] for run in runs) == 16.0


def test_a_rate_that_diverges_counts_as_the_worst():
    runs = complete(lambda rate, seed: None if rate > 2.0 else rate)
    rates = sorted({run["learning_rate"] for run in runs})
    assert len(rates) == MOST_RATES
    assert rates[-1] == 8.0
    assert complete(lambda rate, seed: None)  # and it ends if nothing converges


# -------------------------------------------------------------------------------------------------
# the optimizers
# -------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return loss_tasks.character_model(65, "")


def test_every_parameter_is_in_one_group(model):
    inside, others = loss_peers.split_groups(model, 0.1, rank=4)
    hidden = [p for group in inside for p in group["params"]]
    assert sorted(map(id, hidden + [p for g in others for p in g["params"]])) == sorted(
        map(id, model.parameters())
    )
    transformer = model.transformer
    embeddings = {id(transformer.wte.weight), id(transformer.wpe.weight)}
    assert len(hidden) == 16
    assert not embeddings & set(map(id, hidden))
    assert all(group["rank"] == 4 for group in inside)
    assert not any("rank" in group for group in others)


@pytest.mark.parametrize("name", PEERS | STUDIES)
def test_a_peer_trains_every_parameter(name: str, model):
    peer = pickle.loads(pickle.dumps((PEERS | STUDIES)[name]))  # it goes to another process
    if peer.version() is None:
        pytest.skip(f"{peer.package} is not installed")
    if peer.package == "torchao":
        pytest.skip("compiles for a minute")
    model.to(getattr(torch, peer.dtype))
    optimizer = peer.build(model, 1.0, (0.9, 0.99), 0.1)
    loss_peers.set_learning_rate(optimizer, 0.01)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    changes = [(p - b).abs().max() for p, b in zip(model.parameters(), before, strict=True)]
    # the rate that was set, not the rate of the constructor
    assert all(0 < change < 0.5 for change in changes)
    assert loss_peers.peer_state_bytes(optimizer) > 0


def test_state_in_objects_counts():
    class Projector:
        matrix = None

    projector = Projector()
    projector.matrix = torch.zeros(3)
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([param])
    optimizer.state[param] = {"projector": projector, "exp_avg": torch.zeros(2)}
    assert loss_peers.peer_state_bytes(optimizer) == 4 * (3 + 2)


# -------------------------------------------------------------------------------------------------
# the command
# -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory, run_script) -> Path:
    """A results file of two optimizers after three steps, and one that is not installed."""
    folder = tmp_path_factory.mktemp("losses")
    text = "".join(f"line {i}: the quick brown fox\n" for i in range(200))
    (folder / "input.txt").write_text(text, encoding="utf-8")
    run_script("data_scripts/shakespeare_char.py", "--input", "input.txt", cwd=folder)
    command(run_script, folder, "--trial")
    return folder / "results.json"


def command(run_script, folder: Path, *flags: str, status: int = 0):
    return run_script(
        SCRIPT,
        *("--data_dir", "data/shakespeare_char", "--results", "results.json"),
        *("--optimizers", *NAMES),
        *flags,
        cwd=folder,
        status=status,
    )


def by_key(results: dict) -> dict[tuple, dict]:
    return {(r["optimizer"], r["learning_rate"], r["seed"]): r for r in results["runs"]}


def test_the_command_runs_each_optimizer_that_can_run(ran: Path):
    if PEERS[MISSING].version():
        pytest.skip("the packages of the extra `bench` are installed")
    results = json.loads(ran.read_text(encoding="utf-8"))
    assert results["reasons"] == {MISSING: "came-pytorch is not installed"}
    for name, size in ((NAMES[0], 8.00), (NAMES[1], 1.13)):
        assert loss_tables.is_complete(results, name)
        runs = [run for run in results["runs"] if run["optimizer"] == name]
        assert runs[0]["state_bytes_per_param"] == pytest.approx(size, abs=0.03)
        assert all(run["version"] for run in runs)
    table = loss_tables.render(results)
    assert "| cannot run: came-pytorch is not installed |" in table
    assert "| `adam_mini` |  |  |  |  |  |  |  | not run yet |" in table


def test_a_stopped_command_continues_with_the_same_losses(ran: Path, run_script):
    whole = json.loads(ran.read_text(encoding="utf-8"))
    kept = {**whole, "runs": whole["runs"][:-2]}
    kept["runs"][0] = {**kept["runs"][0], "train_loss": -1.0}  # shows that it did not run again
    ran.write_text(json.dumps(kept), encoding="utf-8")
    command(run_script, ran.parent, "--trial")
    again = json.loads(ran.read_text(encoding="utf-8"))
    ran.write_text(json.dumps(whole), encoding="utf-8")
    assert again["runs"][0]["train_loss"] == -1.0
    again["runs"][0] = whole["runs"][0]
    assert by_key(again) == by_key(whole)


def test_finetuning_begins_with_the_pretrained_weights(tiny_run: Path, docs_data: Path):
    task = replace(loss_tasks.TASKS["finetune"], steps=1, block_size=16, evaluated=8)
    losses = [
        loss_tasks.train(
            loss_tasks.Run(task, PEERS["adamw"], rate, seed, str(docs_data), str(tiny_run), "cpu")
        )["val_loss"]
        for rate, seed in ((1e-12, 1), (1e-12, 2), (1e-2, 1))
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)  # no seed in the weights
    assert abs(losses[2] - losses[0]) > 1e-3
    run = json.loads((tiny_run / "run.json").read_text(encoding="utf-8"))
    assert losses[0] == pytest.approx(run["eval_loss"], abs=0.3)  # over few blocks


def test_a_model_with_a_short_context_is_refused(tiny_run: Path, docs_data: Path):
    run = loss_tasks.Run(
        *(loss_tasks.TASKS["finetune"], PEERS["adamw"], 1e-4, 1, str(docs_data), str(tiny_run)),
        device="cpu",
    )
    with pytest.raises(UserError, match=r"--model .* its context of 32 tokens"):
        loss_tasks.train(run)


def test_other_settings_do_not_continue_a_results_file(ran: Path, run_script):
    before = ran.read_bytes()
    done = command(run_script, ran.parent, status=1)
    assert "steps" in done.stderr
    assert "--results" in done.stderr
    assert ran.read_bytes() == before


# -------------------------------------------------------------------------------------------------
# the variants
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_a_part_has_an_exact_second_moment(part: str, model):
    optimizer = STUDIES[f"striped_float32_exact_{part}"].build(model, 0.1, (0.9, 0.99), 0.1)
    exact, striped = (
        {p for group in each.param_groups for p in group["params"]} for each in optimizer.optimizers
    )
    assert exact
    assert exact | striped == set(model.parameters())
    assert not exact & striped


def test_a_coded_momentum_is_that_of_the_format():
    """The code of int4, in a float32 momentum, trains as int4 does."""
    weights = []
    for build in (
        lambda groups: StripedAdamW(groups, momentum_dtype="int4", lr=0.01),
        lambda groups: CodedMomentum(StripedAdamW(groups, lr=0.01), CODES["int4"]),
    ):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((64, 128), (64,))]
        optimizer = build(params)
        for _ in range(5):
            for p in params:
                p.grad = torch.randn(p.shape)
            optimizer.step()
        weights.append(params)
    for first, second in zip(*weights, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


# the tables
# -------------------------------------------------------------------------------------------------


def made(name: str, rate: float, seed: int, loss: float | None) -> dict:
    return {
        "optimizer": name,
        "learning_rate": rate,
        "seed": seed,
        "package": PEERS[name].package,
        "version": "1",
        "state_bytes_per_param": 8.0,
        "train_loss": loss,
        "val_loss": loss,
    }


@pytest.fixture
def results() -> dict:
    """AdamW is complete; the striped row has one seed of 2e-3 and two of 4e-3; CAME diverged."""
    task = loss_tasks.TASKS["char"]
    adamw = complete(lambda rate, seed: abs(math.log2(rate / 4)) + 1 + seed / 100)
    runs = [made("adamw", r["learning_rate"] * 1e-3, r["seed"], r["val_loss"]) for r in adamw]
    own = "striped_int4"
    runs += [made(own, 4e-3, 1, 1.02), made(own, 4e-3, 2, 1.06), made(own, 2e-3, 1, 0.5)]
    runs += [made("came", 4e-3, 1, None)]
    return {**task.settings(), "runs": runs, "reasons": {}}


def test_the_table_has_the_best_rate_and_says_what_is_incomplete(results: dict):
    table = loss_tables.render(results)
    assert (
        "| `adamw` | 8.00 | 0.004 | 1.0200 | 1.0200 | 1.0100 to 1.0300 | 3 | 3 | complete |"
        in table
    )
    # its lowest loss has only one seed
    row = "| `striped_int4` | 8.00 | 0.004 | 1.0400 | 1.0400 | 1.0200 to 1.0600 | 2 | 2 |"
    assert f"{row} incomplete |" in table
    assert "| `came` |  |  |  |  |  |  |  | diverged |" in table


def test_the_differences_are_of_common_seeds(results: dict):
    table = loss_tables.render(results)
    differences = "+0.0250 | +0.0100 to +0.0400"
    row = f"| `striped_int4` | 0.004 | {differences} | {differences} | 2 |"
    assert row in table


def test_an_optimizer_with_few_runs_comes_first(results: dict):
    names = ("adamw", "striped_int4", "striped_int8")
    optimizers = [
        peer.name
        for peer, _ in losses.waiting(results, loss_tasks.TASKS["char"], [PEERS[n] for n in names])
    ]
    assert set(optimizers) == {"striped_int4", "striped_int8"}
    assert optimizers[:3] == ["striped_int8"] * 3
    assert optimizers[3:5] == ["striped_int4", "striped_int8"]


def test_the_short_table_shows_complete_rows_of_both_tasks(results: dict):
    finetune = {**results, "runs": [run for run in results["runs"] if run["optimizer"] != "came"]}
    table = short_tables.losses(results, finetune)
    assert "| `adamw` | 8.00 | 1.0200 | 1.0200 | 1.0200 | 1.0200 |" in table
    assert "striped_int4" not in table
    more = [made("striped_int4", 4e-3, 3, 1.0), made("striped_int4", 8e-3, 1, 1.5)]
    scratch = {**results, "runs": [*results["runs"], *more]}
    scratch["runs"] = [run for run in scratch["runs"] if run["train_loss"] != 0.5]
    scratch["runs"].append(made("striped_int4", 2e-3, 1, 1.5))
    table = short_tables.losses(scratch, finetune)
    assert "| `striped_int4` | 8.00 | +0.0067 | +0.0067 | not run | not run |" in table


def test_the_plot_is_written(results: dict, tmp_path: Path):
    loss_tables.draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
