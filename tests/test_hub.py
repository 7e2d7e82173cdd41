"""The hub: pushing a run, and loading it by name, against a local server of the hub's protocol."""

import pytest
from hub_endpoint import serve_hub
from huggingface_hub import ModelCard
from tiny import QUIET, STEPS, TINY, read_run
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

FEW = ("--max_steps", 2, "--eval_steps", 1, "--save_steps", 1, "--gradient_accumulation_steps", 1)


@pytest.fixture(scope="module")
def hub(tiny_run):
    with serve_hub() as hub:
        hub.add("someone/tiny", tiny_run)
        yield hub


@pytest.fixture(scope="module")
def pushed(hub, docs_data, run_script, tmp_path_factory):
    """The folder of a run that was finetuned from a model on the hub, and pushed there."""
    folder = tmp_path_factory.mktemp("pushed") / "run"
    run_script(
        *("recipes/finetune_shakespeare.py", "--model_name_or_path", "someone/tiny"),
        *("--data_dir", docs_data, "--block_size", 32, *FEW, *QUIET, "--output_dir", folder),
        *("--push_to_hub", "--hub_model_id", "someone/finetuned"),
        cwd=folder.parent,
        **hub.environment(folder.parent / "home"),
    )
    return folder


@pytest.mark.slow
def test_a_push_uploads_the_finished_run(hub, pushed):
    uploaded = hub.repositories["someone/finetuned"]
    files = {path.name: path for path in pushed.iterdir() if path.is_file()}
    assert set(uploaded) == set(files)  # no checkpoints and no temporary files
    assert {"model.safetensors", "config.json", "tokenizer.json", "run.json"} < set(files)
    assert all(uploaded[name] == path.read_bytes() for name, path in files.items())


@pytest.mark.slow
def test_the_pushed_card_is_the_recipes_card(hub, pushed):
    text = hub.repositories["someone/finetuned"]["README.md"].decode()
    assert "finetune_shakespeare.py" in text
    data = ModelCard(text).data
    run = read_run(pushed)
    assert data.base_model == "someone/tiny"
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found == {"loss": run["eval_loss"], "perplexity": run["eval_perplexity"]}
    assert {result.dataset_split for result in data.eval_results} == {"validation"}


@pytest.mark.slow
def test_sampling_by_name_survives_a_broken_connection(hub, tiny_run, run_script, tmp_path):
    """Half of 26 MB arrives. The client keeps the pieces of 10 MiB that it has written."""
    config = GPT2Config.from_pretrained(tiny_run, n_layer=2, n_embd=512)
    folder = tmp_path / "model"
    GPT2LMHeadModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_run).save_pretrained(folder)
    hub.add("someone/large", folder)
    hub.drop = "model.safetensors"

    flags = ("--start", "The ", "--num_samples", 1, "--max_new_tokens", 20)
    local = run_script("recipes/sample.py", folder, *flags, cwd=tmp_path)
    remote = run_script(
        *("recipes/sample.py", "someone/large", *flags),
        cwd=tmp_path,
        **hub.environment(tmp_path / "home"),
    )
    assert remote.stdout == local.stdout
    downloads = [
        begin
        for method, path, begin in hub.requests
        if method == "GET" and "/large/" in path and path.endswith("/model.safetensors")
    ]
    assert downloads == [0, 10 * 2**20]


@pytest.mark.slow
def test_a_refused_push_is_an_error_before_the_training(hub, docs_data, run_script, tmp_path):
    begun = len(hub.requests)
    refused = run_script(
        *("recipes/train_shakespeare_char.py", *TINY, *STEPS, *QUIET, "--data_dir", docs_data),
        *("--output_dir", tmp_path / "run", "--push_to_hub", "--hub_model_id", "someone/mine"),
        cwd=tmp_path,
        status=1,
        **hub.environment(tmp_path / "home") | {"HF_TOKEN": "hf_of_no_one"},
    )
    assert "Traceback" not in refused.stderr
    line = refused.stderr.splitlines()[-1]
    assert "cannot make someone/mine on the hub" in line
    assert "hf auth login" in line
    assert "401" in line
    assert ("POST", "/api/repos/create", 0) in hub.requests[begun:]
    assert "someone/mine" not in hub.repositories
    assert not list(tmp_path.rglob("checkpoint-*"))
