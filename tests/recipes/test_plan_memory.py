"""Planned memory against what real trainings hold, counted tensor by tensor."""

import contextlib
import json
import re

import pytest
import torch
from transformers import AutoConfig, GPT2Config, LlamaConfig, Trainer, TrainingArguments

from recipes import plan_memory
from recipes.plan_memory import WAYS, Plan, plan, recommended
from striped_hf.pretrained import new_model
from striped_hf.published_configs import load_config
from striped_hf.trainer.gpu_shapes import GpuShapes
from striped_hf.trainer.live_bytes import LiveBytes
from striped_hf.trainer.step_memory import FakeTraining, Memory, Setting

RECIPE = "recipes/plan_memory.py"
GIB = 2**30
NAMES = {
    f"{way.optim}-{'lora' if way.lora else str(way.dtype).removeprefix('torch.')}": way
    for way in WAYS
}
# without dropout, for which a CPU's attention needs the whole matrix of weights
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}


def small_config(**values):
    values = {"n_layer": 3, "n_head": 4, "n_embd": 256, "vocab_size": 4096, **values}
    ids = {"bos_token_id": 1, "eos_token_id": 1}
    return GPT2Config(**values, **ids, **NO_DROPOUT)


def planned(config, way, setting):
    (found,) = plan(config, setting, [way], [setting.gradient_checkpointing])
    return found.memory


def real_peak(config, way, setting, folder):
    """Trains for two steps with Trainer and returns the bytes of all tensors at the peak."""
    model = new_model(config, way.dtype)
    if way.lora:
        plan_memory.add_adapters(model)
    optimizer = way.build(model, setting)
    rows = 2 * setting.batch_size * setting.accumulation
    data = [
        {key: torch.randint(100, (setting.context,)) for key in ("input_ids", "labels")}
        for _ in range(rows)
    ]
    checkpointing = {"use_reentrant": False}
    # autocast as on a GPU, also where layers are computed again
    checkpointing["context_fn"] = lambda: (contextlib.nullcontext(), GpuShapes())
    args = TrainingArguments(
        output_dir=folder,
        max_steps=2,
        per_device_train_batch_size=setting.batch_size,
        gradient_accumulation_steps=setting.accumulation,
        bf16=way.autocast,
        use_cpu=True,
        gradient_checkpointing=setting.gradient_checkpointing,
        gradient_checkpointing_kwargs=checkpointing if setting.gradient_checkpointing else None,
        max_grad_norm=0.0 if way.layerwise else setting.max_grad_norm,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    trainer = Trainer(model, args, train_dataset=data, optimizers=(optimizer, constant))
    with GpuShapes(), LiveBytes() as live:
        live.label("weights", [*model.parameters(), *model.buffers()])
        trainer.train()
    return live.peak


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("adamw_torch_fused-float32", Setting(2, 256)),
        ("adamw_torch_fused-bfloat16", Setting(1, 16)),
        ("striped_adamw-float32", Setting(1, 16)),
        ("striped_adamw_8bit-float32", Setting(2, 256, gradient_checkpointing=True)),
        ("striped_adamw_4bit-bfloat16", Setting(1, 64, accumulation=3)),
        ("striped_adamw_8bit_layerwise-bfloat16", Setting(1, 16)),
        ("striped_adamw_8bit_layerwise-bfloat16", Setting(4, 256)),
        (
            "striped_adamw_4bit_layerwise-bfloat16",
            Setting(1, 64, accumulation=3, gradient_checkpointing=True),
        ),
        ("adamw_torch_fused-lora", Setting(2, 256, gradient_checkpointing=True)),
    ],
    ids=str,
)
def test_plan_is_what_a_real_training_holds(name, setting, tmp_path):
    way = NAMES[name]
    peak = real_peak(small_config(), way, setting, tmp_path)
    assert planned(small_config(), way, setting).total == pytest.approx(peak, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "checkpointing"),  # the heaviest and the lightest; every way was compared once
    [("adamw_torch_fused-float32", False), ("striped_adamw_4bit_layerwise-bfloat16", True)],
)
def test_plan_at_124m_parameters(name, checkpointing, tmp_path):
    way, config = NAMES[name], GPT2Config(**NO_DROPOUT)
    setting = Setting(1, 128, accumulation=2, gradient_checkpointing=checkpointing)
    peak = real_peak(config, way, setting, tmp_path)
    assert planned(config, way, setting).total == pytest.approx(peak, rel=0.05)


@pytest.mark.slow
def test_8_billion_parameters_fit_24_gib():
    setting = Setting(gradient_checkpointing=True)
    memory = planned(
        load_config("llama-8b"), NAMES["striped_adamw_4bit_layerwise-bfloat16"], setting
    )
    assert memory.weights == pytest.approx(2 * 8_030_261_248, rel=1e-4)
    assert memory.state == pytest.approx(0.533 * 8_030_261_248, rel=0.01)
    assert memory.total < 23 * GIB


def test_a_layerwise_step_never_holds_all_gradients():
    config, setting = small_config(n_layer=8), Setting(1, 16)
    ordinary = planned(config, NAMES["striped_adamw_8bit-bfloat16"], setting)
    layerwise = planned(config, NAMES["striped_adamw_8bit_layerwise-bfloat16"], setting)
    assert ordinary.gradients == ordinary.weights
    assert layerwise.gradients <= 2 * 4096 * 256 + 100_000  # the embedding's, and vectors'
    assert layerwise.state == ordinary.state
    assert layerwise.weights == ordinary.weights


def test_four_bits_accumulate_in_eight():
    config, way = small_config(), NAMES["striped_adamw_4bit_layerwise-bfloat16"]
    once = planned(config, way, Setting(1, 16))
    more = planned(config, way, Setting(1, 16, accumulation=4))
    parameters = once.weights / 2
    assert more.optimizer - once.optimizer == pytest.approx(1.06 * parameters, rel=0.1)
    assert once.state - more.state == pytest.approx(0.53 * parameters, rel=0.05)


def test_the_loss_in_chunks_never_holds_an_untied_heads_gradient():
    config = load_config("llama-8b")
    config.num_hidden_layers = 1
    setting = Setting(gradient_checkpointing=True, chunked_loss=True)
    of_embedding = 2 * config.vocab_size * config.hidden_size  # bytes
    beside = {}
    for optim in ("striped_adamw_8bit", "striped_adamw_8bit_layerwise"):
        memory = planned(config, NAMES[f"{optim}-bfloat16"], setting)
        beside[optim] = memory.total - memory.weights - memory.state
    assert beside["striped_adamw_8bit_layerwise"] < 1.1 * of_embedding  # the input embedding's
    assert beside["striped_adamw_8bit"] > 2 * of_embedding


def test_attention_needs_no_matrix_of_weights():
    """With dropout, and with fewer heads of keys: memory grows linearly with the context."""
    llama = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.1,
    )
    gpt2 = GPT2Config(n_layer=2, n_head=4, n_embd=64, vocab_size=128, n_positions=4096)
    for config in (llama, gpt2):
        first, second, third = (
            FakeTraining(config, torch.bfloat16, Setting(1, context), False).passes().activations
            for context in (1024, 2048, 3072)
        )
        assert third - second == pytest.approx(second - first, rel=1e-3)


@pytest.mark.parametrize(
    "name", ["falcon", "gemma2", "mixtral"]
)  # own attention, soft caps, experts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_architectures(name, dtype):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 64}
    config = AutoConfig.for_model(name, **sizes)
    training = FakeTraining(config, dtype, Setting(1, 64), dtype == torch.float32)
    memory = training.passes()
    with torch.device("meta"):
        model = new_model(config, dtype)
    tensors = [*model.parameters(), *model.buffers()]
    assert memory.weights == sum(tensor.nbytes for tensor in tensors)
    assert memory.activations > 0


def test_dropout_keeps_a_byte_per_element():
    def activations(p):
        config = GPT2Config(n_layer=2, n_head=2, n_embd=64, vocab_size=128, n_positions=256)
        config.resid_pdrop = config.embd_pdrop = p
        return FakeTraining(config, torch.bfloat16, Setting(1, 256), False).passes().activations

    masks = 1 + 2 * 2  # of the embedding, and of each layer's attention and MLP
    results = 2 * masks  # the results too are tensors of their own, in bfloat16
    grown = (activations(0.1) - activations(0.0)) / (256 * 64)
    assert masks <= grown <= masks + results


def test_state_of_8bit_adamw_by_hand():
    """Two bytes and two scales per 256 elements; float32 for embeddings and short parameters."""
    config = small_config(n_layer=1)
    memory = planned(config, NAMES["adamw_bnb_8bit-float32"], Setting(1, 16))
    embeddings, matrices, vectors = (4096 + 1024) * 256, 12 * 256**2, (13 + 2) * 256
    assert memory.state == 8 * (embeddings + vectors) + 2 * matrices * (1 + 4 / 256)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_adapters_are_those_of_peft(architecture):
    peft = pytest.importorskip("peft")
    ours, theirs = (
        new_model(
            small_config()
            if architecture == "gpt2"
            else LlamaConfig(
                vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2
            ),
            torch.bfloat16,
        )
        for _ in range(2)
    )
    plan_memory.add_adapters(ours)
    lora = peft.LoraConfig(
        r=plan_memory.LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(theirs, lora)
    adapters = [
        sorted((*p.shape, str(p.dtype)) for p in model.parameters() if p.requires_grad)
        for model in (ours, theirs)
    ]
    assert adapters[0] == adapters[1]


def test_recommendation_is_the_most_exact_that_fits():
    def of(name, checkpointing, gib):
        memory = Memory(gib * GIB, 0, 0, 0, 0)
        return Plan(NAMES[name], Setting(gradient_checkpointing=checkpointing), memory)

    adamw = of("adamw_torch_fused-float32", False, 60)
    slower = of("adamw_torch_fused-float32", True, 50)
    eight = of("striped_adamw_8bit-bfloat16", True, 20)
    nearest, lora = (
        of("adamw_torch_fused-bfloat16", True, 10),
        of("adamw_torch_fused-lora", True, 9),
    )
    plans = [adamw, slower, eight, nearest, lora]
    assert recommended(plans, 80) is adamw
    assert recommended(plans, 51) is slower
    assert recommended(plans, 50) is eight  # 1 GiB is CUDA's
    assert recommended(plans, 20) is None
    said = plan_memory.advice(plans, 20, "m")
    assert "a card of 21 GiB" in said
    assert "LoRA does" in said


def test_command_line(model, run_here, tmp_path):
    flags = ("--context", 16, "--batch", 2, "--accumulation", 2, "--card_gib", 2)
    printed = run_here(RECIPE, model, *flags)
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| `")]
    assert len(rows) == 2 * len(WAYS)
    assert {row[-1].strip() for row in rows} == {"yes"}
    assert "not measured on a GPU" in printed
    assert "Recommended: `adamw_torch_fused` on float32 weights without" in printed
    arguments = re.search(r"args = TrainingArguments\((.*)\)", printed).group(1)
    args = eval(f"dict({arguments})")
    assert args["gradient_accumulation_steps"] == 2
    TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **args)


def test_only_the_configuration_is_read(tmp_path, run_here):
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "intermediate_size": 64}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "Recommended" in run_here(RECIPE, folder, "--context", 16, "--chunked_loss")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--context", 17), "--context 17 exceeds the context"),
        (("--batch", 0), "--batch 0: pass a number above 0"),
        (("--card_gib", 0.5), "--card_gib 0.5: pass more than"),
    ],
)
def test_bad_flags_name_the_fix(model, flags, message, run_here):
    run_here(RECIPE, model, *flags, fails=message)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-8b", 8_030_261_248),
        ("mistral-7b", 7_248_023_552),
        ("qwen2.5-7b", 7_615_616_512),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_published_configurations_have_their_parameters(name, parameters):
    with torch.device("meta"):
        assert new_model(load_config(name)).num_parameters() == parameters
