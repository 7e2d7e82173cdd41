"""The benchmark of optimizers, its tables, and the memory budget against a real finetune."""

import argparse
import importlib.util
import json

import pytest
import torch

from benchmarks import (
    memory_budget,
    model_shapes,
    optimizer_peers,
    optimizer_tables,
    optimizers,
)

SCRIPT = "benchmarks.optimizers"
CPU = torch.device("cpu")
# all peers except those that compile for a minute
QUICK = (
    *("adamw_foreach", "adafactor", "muon", "transformers_adafactor", "optimi_adamw"),
    *("bitsandbytes_adamw8bit", "flashoptim_adamw"),
    *("striped_float32", "striped_bfloat16", "striped_int8", "striped_int4"),
    *("striped_float32_lagged", "striped_int8_lagged"),
)
MEASURED = ("state_bytes_per_param", "checkpoint_bytes", "first_step_s", "step_ms", "ratio", "gb_s")


@pytest.fixture(scope="module")
def ran(tmp_path_factory, run_script, tiny_config):
    """The results and the output of a real run over few rounds."""
    folder = tmp_path_factory.mktemp("bench")
    flags = ("--shapes", tiny_config, "--rounds", 3, "--results", "results.json")
    flags += ("--backend", "auto", "reference", "triton", "--optimizers", *QUICK)
    done = run_script(SCRIPT, *flags, cwd=folder, TRITON_INTERPRET="0")  # as for users
    return json.loads((folder / "results.json").read_text(encoding="utf-8")), done.stdout


def rows(results: dict) -> dict[str, dict]:
    return {row["name"]: row for row in results["optimizers"]}


@pytest.mark.slow
def test_every_row_has_figures_or_a_reason(ran):
    results, printed = ran
    striped = [name for name in QUICK if name.startswith("striped")]
    expected = {"adamw_fused", *QUICK}
    expected |= {f"{name}:{backend}" for name in striped for backend in ("reference", "triton")}
    assert set(rows(results)) == expected
    for name, row in rows(results).items():
        if "reason" in row:
            assert "\n" not in row["reason"]
            assert row["reason"] in printed
            continue
        for key in MEASURED:
            assert row[key] is None or row[key] > 0, (name, key)
        assert (row["gb_s"] is None) == (name == "muon")
        assert 0 <= row["temporary_bytes"] < 16 << 20
        assert 1 <= len(row["turns_ms"]) <= 3
        low, high = row["ratio_quartiles"]
        assert low <= row["ratio"] <= high
    assert results["parameters"] == 512 * 64 + 64 * 64 + 3 * (12 * 64**2 + 13 * 64) + 128
    assert {"device", "threads", "torch", "commit"} <= set(results["environment"])


@pytest.mark.slow
def test_an_optimizer_that_cannot_run_has_a_reason(ran):
    results = rows(ran[0])
    for name, module in (("bitsandbytes_adamw8bit", "bitsandbytes"), ("optimi_adamw", "optimi")):
        if importlib.util.find_spec(module) is None:
            assert results[name]["reason"] == f"{module} is not installed"
    assert results["flashoptim_adamw"]["reason"]  # needs CUDA, if it is installed at all
    assert "triton" in results["striped_int8:triton"]["reason"]
    for name in ("adamw_fused", "adamw_foreach", "adafactor", "muon", "transformers_adafactor"):
        assert "reason" not in results[name]


@pytest.mark.slow
def test_state_bytes_are_correct(ran, tiny_config):
    results, _ = ran
    n, row = results["parameters"], rows(results)
    weights = model_shapes.meta_weights(model_shapes.meta_model(str(tiny_config)))
    matrices = [w.param for w in weights if w.param.dim() == 2]
    vectors = sum(w.param.numel() for w in weights if w.param.dim() != 2)
    steps = 4 * len(weights)
    in_matrices = sum(p.numel() for p in matrices)
    assert n == in_matrices + vectors
    assert row["adamw_fused"]["state_bytes_per_param"] * n == pytest.approx(8 * n + steps)
    assert round(row["adamw_fused"]["state_bytes_per_param"], 2) == 8.00
    # stripes: one row mean for each row, three for each row of c_attn (64, 192), and column means
    stripes = 4 * sum(sum(p.shape) for p in matrices) + 3 * 4 * 2 * 64
    rest = stripes + 8 * vectors + steps
    blocks = sum(p.shape[0] * -(-p.shape[1] // 128) for p in matrices)
    for dtype, coded in {
        "float32": 4 * in_matrices,
        "bfloat16": 2 * in_matrices,
        "int8": in_matrices + 4 * blocks,
        "int4": in_matrices // 2 + 4 * blocks,
    }.items():
        for name in (f"striped_{dtype}", f"striped_{dtype}:reference"):
            assert row[name]["state_bytes_per_param"] * n == pytest.approx(coded + rest), name
            assert row[name]["checkpoint_bytes"] > coded + rest
    assert row["striped_int8:reference"]["backend"] == "reference"
    # Muon keeps a momentum for hidden matrices, and AdamW steps the rest
    hidden = in_matrices - 512 * 64 - 64 * 64
    assert row["muon"]["state_bytes_per_param"] * n == pytest.approx(
        4 * hidden + 8 * (n - hidden), rel=1e-3
    )


def test_coded_states_of_other_packages_count_as_stored():
    pytest.importorskip("torchao")
    from torchao.optim import AdamW8bit

    param = torch.nn.Parameter(torch.zeros(256, 512))
    optimizer = AdamW8bit([param])
    param.grad = torch.zeros_like(param)
    state = {"exp_avg": optimizer._new_buffer(param, True)}
    # one byte per element, a float32 scale for 256 elements, and a table of 256 codes
    assert memory_budget.tensor_bytes(state) == 256 * 512 * (1 + 4 / 256) + 256 * 4


def test_a_coded_state_needs_no_more_than_its_room():
    assert tuple(optimizer_peers.STRIPED_ROOM) == ("float32", "bfloat16", "int8", "int4")


def contender(name: str, times: list[float]) -> optimizers.Contender:
    peer = next(p for p in optimizer_peers.all_peers(["auto"]) if p.name == name)
    entry = optimizers.Contender(peer, times=dict(enumerate(times, start=1)))
    entry.row |= {"state_bytes_per_param": 8.0, "checkpoint_bytes": 80, "temporary_bytes": 0}
    entry.row |= {"first_step_s": 0.5}
    return entry


def finished(*entries: optimizers.Contender) -> dict:
    optimizers.finish(list(entries), parameters=10_000_000, itemsize=4)
    return {
        "environment": {"device": "a device"},
        "shapes": "gpt2",
        "parameters": 10_000_000,
        "device": "cpu",
        "dtype": "float32",
        "copy_gb_s": 20.0,
        "optimizers": [entry.row for entry in entries],
    }


def test_ratios_compare_turns_of_the_same_round():
    """The machine becomes half as fast midway, and the ratio is still 2 in every round."""
    results = finished(
        contender("adamw_fused", [0.010] * 5 + [0.011] * 5),
        contender("adamw_foreach", [0.020] * 5 + [0.022] * 5),
    )
    baseline, foreach = results["optimizers"]
    assert baseline["ratio"] == 1
    assert foreach["ratio"] == pytest.approx(2)
    assert foreach["ratio_quartiles"] == pytest.approx([2, 2])
    assert foreach["step_ms"] == pytest.approx(21)
    # (2 + 1) x 4 bytes of parameter and gradient and 2 x 8 of state, over 21 ms
    assert foreach["gb_s"] == pytest.approx(28 * 10_000_000 / 0.021 / 1e9)
    table = optimizer_tables.render(results)
    assert "| `adamw_foreach` | 8.00 | 21.0 | 2.00 (2.00 to 2.00) |" in table
    assert "nusable" not in table


@pytest.mark.parametrize(("slow", "usable"), [(0.0114, True), (0.0117, False), (0.1, False)])
def test_an_unstable_baseline_makes_times_unusable(slow, usable, tmp_path):
    """Half of the baseline's rounds are slower: 14%, 17%, and ten times."""
    baseline = contender("adamw_fused", [0.01, slow] * 5)
    results = finished(baseline, contender("striped_int8", [0.02] * 10))
    assert [row["usable"] for row in results["optimizers"]] == [usable] * 2
    table = optimizer_tables.render(results)
    if usable:
        assert "20.0" in table
    else:
        assert "20.0 |" not in table
        assert table.count(optimizer_tables.UNUSABLE) == 6
        assert "varied by more than 15%" in table


def test_the_limit_is_relative_to_the_median():
    assert optimizers.is_steady([1.0, 1.0, 1.15, 1.15, 1.15])
    assert not optimizers.is_steady([1.0, 1.0, 1.0, 1.16, 1.16])


def test_slow_optimizers_have_fewer_turns_evenly_spread_and_the_baseline_has_all():
    class Counting:
        def __init__(self):
            self.calls = 0

        def step(self):
            self.calls += 1

    peers = {peer.name: peer for peer in optimizer_peers.all_peers(["auto"])}
    fused = optimizers.Contender(peers["adamw_fused"], Counting(), steps=2, turns=12)
    muon = optimizers.Contender(peers["muon"], Counting(), steps=1, turns=3)
    optimizers.time_in_turns([fused, muon], CPU, rounds=12)
    assert list(fused.times) == list(range(1, 13))
    assert fused.optimizer.calls == 2 * 13  # round 0 warms up
    assert list(muon.times) == [4, 8, 12]
    assert muon.optimizer.calls == 3


def test_render_reads_a_results_file(tmp_path, run_here):
    results = finished(contender("adamw_fused", [0.01] * 4), contender("striped_int8", [0.02] * 4))
    results["optimizers"].append(
        {"name": "flashoptim_adamw", "package": "flashoptim", "version": None, "reason": "no GPU"}
    )
    (tmp_path / "r.json").write_text(json.dumps(results), encoding="utf-8")
    printed = run_here(SCRIPT, "--render", "r.json")
    assert printed.strip() == optimizer_tables.render(results)
    assert "Not run: `flashoptim_adamw` (no GPU)." in printed
    assert "a plain copy moves 20.0 GB/s" in printed
    image = pytest.importorskip("PIL.Image")
    with image.open(tmp_path / "r.png") as plot:
        assert min(plot.size) > 400


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--shapes", "no/such"), "cannot load no/such"),
        (("--optimizers", "sgd"), "sgd is no optimizer here: choose among adamw_fused, "),
    ],
)
def test_mistakes_end_with_one_line(flags, message, run_script, tmp_path):
    done = run_script(SCRIPT, *flags, cwd=tmp_path, status=1, HF_HUB_OFFLINE="1")
    assert "Traceback" not in done.stderr
    assert message in done.stderr.splitlines()[-1]


def arguments(**changes) -> argparse.Namespace:
    values = {"shapes": "gpt2", "device": "cpu", "dtype": "float32", "rounds": 2}
    return argparse.Namespace(**values | {"backend": ["auto"], "optimizers": None} | changes)


def test_shapes_that_do_not_fit_end_with_one_line(monkeypatch):
    monkeypatch.setattr(optimizers, "available_bytes", lambda device: 20 << 30)
    with pytest.raises(
        optimizers.UserError, match=r"gpt2-xl .* takes 23.2 GiB .* 20.0 GiB are free"
    ):
        optimizers.benchmark(arguments(shapes="gpt2-xl"))


@pytest.mark.slow
def test_optimizers_wait_for_room_with_a_baseline_in_every_group(
    monkeypatch, tiny_config, tmp_path
):
    """With room for one beside the baseline there are three groups; one optimizer never fits."""
    groups = []
    real = optimizers.time_in_turns
    monkeypatch.setattr(optimizers, "copy_gb_s", lambda device: 1.0)
    monkeypatch.setattr(
        optimizers,
        "time_in_turns",
        lambda group, *rest: (groups.append([c.peer.name for c in group]), real(group, *rest)),
    )
    parameters = 187_840
    free = {0: 100, 1: 9, 2: 1}  # bytes per parameter, by the number of optimizers alive

    def available(device):
        alive = sum(name == "prepared" for name in events)
        return free[min(alive, 2)] * parameters

    events: list[str] = []
    prepare = optimizers.prepare
    monkeypatch.setattr(
        optimizers, "prepare", lambda *args: (events.append("prepared"), prepare(*args))[1]
    )
    monkeypatch.setattr(optimizers, "free_memory", lambda device: events.clear())
    monkeypatch.setattr(optimizers, "available_bytes", available)
    names = ["muon", "striped_int8", "adamw_foreach"]
    path = str(tmp_path / "results.json")
    results = optimizers.benchmark(
        arguments(shapes=str(tiny_config), optimizers=names, results=path)
    )
    assert groups == [["adamw_fused", "muon"], ["adamw_fused", "striped_int8"]] or groups == [
        ["adamw_fused", "muon"],
        ["adamw_fused", "striped_int8"],
        ["adamw_fused"],
    ]
    by_name = rows(results)
    assert "GiB beside AdamW" in by_name["adamw_foreach"]["reason"]
    assert by_name["striped_int8"]["ratio"] > 0


def test_llama_1b_is_the_published_model():
    model = model_shapes.meta_model("llama-1b")
    assert model.num_parameters() == 1_235_814_400
    weights = model_shapes.meta_weights(model)
    assert sum(weight.param.numel() for weight in weights) == 1_235_814_400
    assert [w.name for w in weights if w.embedding] == ["model.embed_tokens.weight"]


def test_packed_projections_keep_their_blocks(tiny_config):
    weights = model_shapes.meta_weights(model_shapes.meta_model(str(tiny_config)))
    packed = {w.name.split(".")[-2] for w in weights if w.blocks == (1, 3)}
    assert "c_attn" in packed
    optimizer = optimizer_peers.striped("int8", "auto")(
        list(model_shapes.allocate(weights, CPU, torch.float32))
    )
    assert {tuple(pair) for group in optimizer.param_groups for pair in group["blocks"]} == {
        (1, 1),
        (1, 3),
    }


@pytest.mark.slow
def test_memory_budget_of_one_layer_predicts_all_of_them(tmp_path, run_script):
    """State is exact, foreach AdamW's temporaries grow with the model and Adafactor's do not."""
    flags = ("--memory", "gpt2", "--block_size", 16, "--results", "memory.json")
    run_script(SCRIPT, *flags, "--optimizers", "adamw_foreach", "adafactor", cwd=tmp_path)
    memory = json.loads((tmp_path / "memory.json").read_text(encoding="utf-8"))
    parameters, by_name = memory["parameters"], rows(memory)
    assert by_name["adamw_fused"]["state"] == 8 * parameters + 4 * 148
    assert by_name["adamw_fused"]["step"] < 1 << 20
    assert by_name["adamw_foreach"]["step"] == pytest.approx(4 * parameters, rel=0.05)
    assert by_name["adafactor"]["step"] < 3 * 4 * 50257 * 768  # temporaries of the largest matrix


@pytest.mark.slow
def test_memory_budget_against_a_real_finetune(tmp_path, run_script):
    """With 17 million parameters the prediction is within 3% of the growth of the process, except
    for 30 MiB of code and buffers, which every model needs.
    """
    model = tmp_path / "model"
    model.mkdir()
    config = {"model_type": "gpt2", "vocab_size": 8192, "n_positions": 256, "n_embd": 512}
    config |= {"n_layer": 4, "n_head": 8, "bos_token_id": 1, "eos_token_id": 1}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    names = ("adamw_torch_fused", "striped_adamw_8bit")
    flags = ("--model", model, "--accumulation", 2, "--block_size", 256, "--steps", 2)
    script = "benchmarks.training_memory"
    run_script(script, *flags, "--optim", *names, "--results", "training.json", cwd=tmp_path)
    trained = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    flags = ("--memory", model, "--block_size", 256, "--optimizers", "striped_int8")
    table = run_script(SCRIPT, *flags, "--results", "memory.json", cwd=tmp_path).stdout
    memory = json.loads((tmp_path / "memory.json").read_text(encoding="utf-8"))

    n = memory["parameters"]
    assert memory["weights"] == memory["gradients"] == 4 * n
    for row, predicted in zip(trained["optimizers"], memory["optimizers"], strict=True):
        assert row["state_bytes"] == predicted["state"]
        assert predicted["peak"] == 8 * n + predicted["state"] + max(
            memory["activations"], predicted["step"]
        )
        assert row["predicted_mib"] == pytest.approx(predicted["peak"] / 2**20, rel=0.01)
        assert row["peak_mib"] - 30 == pytest.approx(row["predicted_mib"], rel=0.03, abs=15)
        assert row["tokens_per_s"] > 0
    adamw, striped = (row["peak_mib"] for row in trained["optimizers"])
    assert adamw - striped == pytest.approx((8 - 1.05) * n / 2**20, rel=0.15)
    assert f"| `striped_int8` | {4 * n / 2**20:,.0f} |" in table
    assert "8 GiB" in table


def test_the_smallest_card_has_room_for_the_context():
    assert memory_budget.smallest_card(int(6.9 * 2**30)) == "8 GiB"
    assert memory_budget.smallest_card(int(7.1 * 2**30)) == "12 GiB"
    assert memory_budget.smallest_card(200 << 30) == "over 141 GiB"


def test_memory_of_each_of_several_devices():
    """In MiB: 400 + 400 + 100 or a share of it, plus temporaries or gathered tensors."""
    mib = 1 << 20
    results = {
        "model": "m",
        "parameters": 100 * mib,
        "weights": 400 * mib,
        "gradients": 400 * mib,
        "gathered": 30 * mib,
        "optimizers": [
            {"name": "a", "state": 100 * mib, "step": 10 * mib},
            {"name": "b", "state": 100 * mib, "step": 400 * mib},
            {"name": "c", "reason": "no"},
        ],
    }
    table = memory_budget.render_devices(results, (2, 9))
    assert "| optimizer | one device | DDP | FSDP2 over 2 | FSDP2 over 9 |" in table
    assert "| `a` | 910 | 1,310 | 480 | 130 |" in table
    assert "| `b` | 1,300 | 1,700 | 650 | 144 |" in table
    assert "`c`" not in table


def test_gathered_bytes_are_counted_by_block(tiny_config):
    """GPT-2 has its embeddings and the last norm outside its blocks."""
    block = 12 * 64**2 + 13 * 64
    outside = 512 * 64 + 64 * 64 + 128
    model = model_shapes.meta_model(str(tiny_config))
    assert memory_budget.gathered_bytes(model) == 4 * (2 * outside + 3 * block)
