"""`accelerate launch` with each of recipes/accelerate/*.yaml, in real processes on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from processes import ENVIRONMENT, RECIPE, REPOSITORY, Launch, free_port
from tiny import QUIET, STEPS, TINY, read_run
from transformers import AutoModelForCausalLM

RECIPES = REPOSITORY / "recipes"
FLAGS = (*TINY, *STEPS, "--logging_steps", 1)
# The sums over a batch are the same, in another order: a few float32 roundings in each step, which
# may change an 8-bit code to its neighbour. Measured: 2e-7. Other windows would differ by 0.01.
TOLERANCE = 1e-5
pytestmark = pytest.mark.slow


def run(launched: list[Launch], *arguments: object, **settings: object) -> tuple[str, str]:
    launched.append(Launch(*arguments, **settings))
    return launched[-1].wait()


@pytest.fixture(scope="module")
def launches():
    """Does the same as ``launched``, for the fixtures of this file."""
    launches: list[Launch] = []
    yield launches
    for launch in launches:
        launch.end()


@pytest.fixture(scope="module")
def single(launches, small_data, tmp_path_factory):
    """Runs one process on 12 windows per step; returns its folder and its output."""
    folder = tmp_path_factory.mktemp("single")
    flags = (*FLAGS, "--data_dir", small_data, "--output_dir", folder / "run")
    printed = run(launches, "single.yaml", RECIPE, *flags, cwd=folder, log="single")
    return folder / "run", *printed


@pytest.fixture(scope="module")
def ddp(launches, small_data, tmp_path_factory):
    """Runs two processes on 6 windows each; returns the same."""
    folder = tmp_path_factory.mktemp("ddp")
    flags = (*FLAGS, "--data_dir", small_data, "--output_dir", folder / "run")
    flags += ("--per_device_train_batch_size", 6)
    printed = run(launches, "ddp.yaml", RECIPE, *flags, cwd=folder, log="ddp")
    return folder / "run", *printed


def losses(folder: Path) -> dict[str, float]:
    """Returns every loss and gradient norm that a run logged, and the final ones."""
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    kinds = ("loss", "grad_norm", "eval_loss", "train_blocks_loss")
    found = {f"{kind} at {e['step']}": e[kind] for e in log for kind in kinds if kind in e}
    result = read_run(folder)
    return found | {kind: result[kind] for kind in ("train_loss", "eval_loss", "eval_tokens")}


def assert_same_losses(folder: Path, single: Path) -> None:
    expected = losses(single)
    assert len(expected) == 20 + 20 + 2 + 1 + 3
    assert losses(folder) == pytest.approx(expected, rel=TOLERANCE)
    assert read_run(folder)["tokens"] == read_run(single)["tokens"] == 20 * 12 * 32


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_ddp_has_the_losses_of_one_process(ddp, single):
    assert_same_losses(ddp[0], single[0])
    # more processes write no other files than their random states
    more = {f"checkpoint-{step}/rng_state_{rank}.pth" for step in (10, 20) for rank in (0, 1)}
    less = {f"checkpoint-{step}/rng_state.pth" for step in (10, 20)}
    assert files(ddp[0]) ^ files(single[0]) == more | less


def test_ddp_prints_once(ddp, single):
    """Two processes print the lines of one process, with other figures; and one bar on stderr."""
    (_, out, err), (_, expected, _) = ddp, single

    def keys(text: str) -> list[object]:
        lines = [line for line in text.splitlines() if line.startswith(("{", "train loss"))]
        return [sorted(eval(line)) if line[0] == "{" else line[:10] for line in lines]

    assert keys(out) == keys(expected)
    assert len(keys(out)) == 20 + 2 + 1 + 1
    assert out.count("the model is in") == 1
    assert err.count("0/20 [00:00<?") == 1
    assert err.count("`loss_type=None`") <= 1  # transformers' own warnings come once, too


def test_two_nodes_have_the_losses_of_one_process(launched, single, small_data, tmp_path):
    """Two launches meet at an address, and accumulate gradients over two batches of 3 windows.

    Here each has its own folder, to show the files that node 1 writes: only its random states, for
    the checkpoints that it takes part in.
    """
    flags = (*FLAGS, "--data_dir", small_data, "--load_best_model_at_end", "false")
    flags += ("--per_device_train_batch_size", 3, "--gradient_accumulation_steps", 2)
    rendezvous = ("--main_process_ip", "127.0.0.1", "--main_process_port", free_port())
    for rank in (1, 0):
        (tmp_path / f"node{rank}").mkdir()
        launched.append(
            Launch(
                *("multi_node.yaml", RECIPE, *flags),
                *("--output_dir", tmp_path / f"node{rank}" / "run"),
                cwd=tmp_path / f"node{rank}",
                log=f"node{rank}",
                flags=("--machine_rank", rank, *rendezvous),
            )
        )
    (out, err), (main_out, _) = (launch.wait() for launch in launched)
    assert_same_losses(tmp_path / "node0" / "run", single[0])
    assert "the model is in" in main_out
    assert out == ""
    assert "it/s" not in err
    partial = {f"run/_partial/checkpoint-{step}/rng_state_1.pth" for step in (10, 20)}
    assert files(tmp_path / "node1") == {"node1.out", "node1.err"} | partial


def test_others_wait_for_the_main_process_to_load(launched, tiny_run, docs_data, tmp_path):
    """The other process begins to load after the first has loaded model and tokenizer."""
    spy = Path(__file__).parent / "spy_on_loading.py"
    flags = ("--model_name_or_path", tiny_run, "--data_dir", docs_data, "--block_size", 32)
    flags += ("--max_steps", 1, "--gradient_accumulation_steps", 1, "--eval_strategy", "no")
    flags += ("--save_strategy", "no", "--load_best_model_at_end", "false", "--eval_on_start", 0)
    finetune = (RECIPES / "finetune_shakespeare.py", *flags, *QUIET)
    run(launched, "ddp.yaml", spy, *finetune, cwd=tmp_path, log="spy")
    lines = [line.split() for line in (tmp_path / "loading.txt").read_text().splitlines()]
    assert [(rank, what) for rank, what, _ in lines] == [
        (rank, f"{auto}-{when}")
        for rank in ("0", "1")
        for auto in ("AutoModelForCausalLM", "AutoTokenizer", "AutoTokenizer")  # and the data's
        for when in ("begins", "ends")
    ]
    times = [float(when) for *_, when in lines]
    assert times == sorted(times)


def test_sampling_prints_once(launched, tiny_run, tmp_path):
    arguments = (tiny_run, "--start", "The ", "--num_samples", 1, "--max_new_tokens", 8)
    sample = RECIPES / "sample.py"
    out, _ = run(launched, "ddp.yaml", sample, *arguments, cwd=tmp_path, log="sample")
    assert out.startswith("The ")
    assert out.endswith("\n---------------\n")
    assert len(out) == 4 + 8 + 17


def test_comparison_launches_its_runs(run_script, small_data, tmp_path):
    flags = ("--optim", "striped_adamw", "--output_dir", tmp_path)
    flags += ("--accelerate_config", RECIPES / "accelerate" / "ddp.yaml", "--")
    flags += (*TINY, *QUIET, "--max_steps", 2, "--save_steps", 2, "--eval_steps", 2)
    run_script(
        *("recipes/compare_optimizers.py", RECIPE, *flags, "--data_dir", small_data),
        cwd=tmp_path,
        **ENVIRONMENT,
    )
    result = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))["runs"][0]
    assert result["tokens"] == 2 * 2 * 12 * 32  # two processes
    refused = run_script(
        *("recipes/compare_optimizers.py", RECIPE, "--optim", "striped_adamw"),
        cwd=tmp_path,
        status=2,
        WORLD_SIZE="2",
        RANK="1",
    )
    assert "--accelerate_config" in refused.stderr


def test_the_fsdp2_file_gives_accelerate_the_intended_settings(launched, tmp_path):
    """The file gives accelerate the intended settings; a run with them needs GPUs."""
    (tmp_path / "show.py").write_text(
        "from accelerate.utils import FullyShardedDataParallelPlugin\n"
        "from transformers import AutoModelForCausalLM, GPT2Config\n"
        "plugin = FullyShardedDataParallelPlugin()\n"
        "config = GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=9, n_positions=8)\n"
        "plugin.set_auto_wrap_policy(AutoModelForCausalLM.from_config(config))\n"
        "blocks = plugin.auto_wrap_policy.keywords['transformer_layer_cls']\n"
        "print(plugin.fsdp_version, plugin.reshard_after_forward, plugin.state_dict_type.name,\n"
        "      type(plugin.cpu_offload).__name__, plugin.cpu_ram_efficient_loading,\n"
        "      *(block.__name__ for block in blocks))\n"
    )
    show = ("fsdp2.yaml", tmp_path / "show.py")
    out, _ = run(launched, *show, cwd=tmp_path, log="fsdp2", flags=("--num_processes", 1))
    assert out.split() == [
        "2",
        "True",
        "SHARDED_STATE_DICT",
        "OffloadPolicy",
        "True",
        "GPT2Block",
    ]


def test_fsdp2_is_refused_without_a_gpu(run_script, tmp_path):
    """Otherwise accelerate would run DDP on CPUs in its place, without a warning."""
    recipe = "recipes/train_shakespeare_char.py"
    environment = ENVIRONMENT | {"ACCELERATE_USE_FSDP": "true"}  # as the launcher sets it
    error = run_script(recipe, cwd=tmp_path, status=2, **environment).stderr
    assert "FSDP needs GPUs" in error
    assert "ddp.yaml" in error


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_fsdp2_trains_and_resumes_on_gpus(small_data, tmp_path):
    """A run on at most two GPUs trains and resumes, and leaves a model folder."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes"]
    launch += [str(min(2, torch.cuda.device_count())), "--config_file"]
    launch += [str(RECIPES / "accelerate" / "fsdp2.yaml"), str(RECIPE)]
    flags = (*TINY, *STEPS, *QUIET, "--data_dir", small_data, "--output_dir", tmp_path / "run")
    for more in ((), ("--max_steps", 40, "--resume_from_checkpoint", "last")):
        command = [*launch, *map(str, (*flags, *more))]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        finished = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
    result = read_run(tmp_path / "run")
    assert result["steps"] == 40
    assert result["eval_loss"] < 3.5  # a uniform guess has log(50) = 3.9
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert model.num_parameters() == result["parameters"]
    assert type(model).__name__ in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


def test_every_configuration_is_tested():
    """Every file has a test here, and none sets a value that depends on the machine."""
    tested = {"single.yaml", "ddp.yaml", "fsdp2.yaml", "multi_node.yaml"}
    folder = RECIPES / "accelerate"
    assert {path.name for path in folder.iterdir()} == tested
    for path in folder.iterdir():
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert "main_process_ip" not in settings
        assert "mixed_precision" not in settings  # --bf16 sets it
