from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trainer_runs import arguments, tiny_model
from transformers import AutoConfig, AutoModel, Trainer

from striped_hf import StripedAdamW
from striped_hf.trainer import packed_blocks, param_groups

peft = pytest.importorskip("peft")

BERT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "pad_token_id": 0,
    "max_position_embeddings": 16,
}


def other_model(model_type: str, **config: Any) -> nn.Module:
    return AutoModel.from_config(AutoConfig.for_model(model_type, **config))


MODELS = {
    "gpt2": lambda: tiny_model("gpt2"),
    "llama": lambda: tiny_model("llama"),
    "bert": lambda: other_model("bert", **BERT),
    "modernbert": lambda: other_model("modernbert", **BERT, global_attn_every_n_layers=2),
    "t5": lambda: other_model(
        "t5", vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    ),
}


def blocks_by_name(groups: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    return {
        name: blocks
        for group in groups
        for (name, _), blocks in zip(group["params"], group["blocks"], strict=True)
    }


@pytest.mark.parametrize("kind", MODELS)
def test_the_same_parameters_decay_as_in_trainer(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    trainer = Trainer(model, arguments(tmp_path, optim="adamw_torch", weight_decay=0.1))
    theirs = trainer.create_optimizer().param_groups
    expected = {param: group["weight_decay"] for group in theirs for param in group["params"]}
    ours = param_groups(model, 0.1)
    assert {p: group["weight_decay"] for group in ours for _, p in group["params"]} == expected
    assert set(expected.values()) == {0.1, 0.0}


@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_is_in_one_group_under_its_name(kind: str) -> None:
    model = MODELS[kind]()
    groups = param_groups(model, 0.1)
    named = [pair for group in groups for pair in group["params"]]
    assert len(named) == len(dict(named))
    assert dict(named) == dict(model.named_parameters())


def test_only_gpt2s_packed_projections_have_blocks() -> None:
    blocks = blocks_by_name(param_groups(tiny_model("gpt2"), 0.1))
    for name, pair in blocks.items():
        assert pair == ((1, 3) if name.endswith("c_attn.weight") else (1, 1))
    assert list(blocks.values()).count((1, 3)) == 2


@pytest.mark.parametrize("kind", MODELS)
def test_the_groups_have_trainers_order(kind: str, tmp_path: Path) -> None:
    """The states of a scheduler and of AdamW are stored by position, and so fit these groups."""
    model = MODELS[kind]()
    theirs = Trainer(model, arguments(tmp_path, optim="adamw_torch")).create_optimizer()
    ours = StripedAdamW(param_groups(model, 0.1))
    for group, expected in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert all(p is q for p, q in zip(group["params"], expected["params"], strict=True))
        assert group["weight_decay"] == expected["weight_decay"]


def test_the_optimizer_accepts_the_groups_and_its_errors_name_parameters() -> None:
    model = tiny_model("gpt2")
    optimizer = StripedAdamW(param_groups(model, 0.1), lr=1e-3)
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    row = optimizer.state[model.transformer.h[0].attn.c_attn.weight]["exp_avg_sq_row"]
    assert row.shape == (32, 3)

    packed = model.transformer.h[1].attn.c_attn.weight
    packed.grad = packed.grad.to_sparse()
    with pytest.raises(RuntimeError, match=r"transformer\.h\.1\.attn\.c_attn\.weight"):
        optimizer.step()


def test_frozen_parameters_are_left_out() -> None:
    model = tiny_model("gpt2")
    model.transformer.wte.requires_grad_(False)
    for block in model.transformer.h:
        block.attn.requires_grad_(False)
    names = set(blocks_by_name(param_groups(model, 0.1)))
    assert names == {name for name, param in model.named_parameters() if param.requires_grad}
    assert not any("attn" in name or "wte" in name for name in names)


def test_there_are_two_groups_as_in_trainer_even_if_one_is_empty(tmp_path: Path) -> None:
    model = tiny_model("llama")
    for name, param in model.named_parameters():
        param.requires_grad_("norm" in name)
    groups = param_groups(model, 0.1)
    assert [len(group["params"]) for group in groups] == [0, 5]
    optimizer = StripedAdamW(groups)
    theirs = Trainer(model, arguments(tmp_path, optim="adamw_torch")).create_optimizer()
    optimizer.load_state_dict(theirs.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())


def test_lora_adapters_have_one_block() -> None:
    model = peft.get_peft_model(
        tiny_model("gpt2"), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    blocks = blocks_by_name(param_groups(model, 0.1))
    assert blocks
    assert all(".lora_" in name for name in blocks)
    assert set(blocks.values()) == {(1, 1)}


def test_modules_that_peft_saves_keep_their_blocks() -> None:
    model = peft.get_peft_model(
        tiny_model("gpt2"),
        peft.LoraConfig(
            r=2, target_modules=["c_fc"], modules_to_save=["c_attn"], fan_in_fan_out=True
        ),
    )
    blocks = blocks_by_name(param_groups(model, 0.1))
    packed = {name for name, pair in blocks.items() if pair == (1, 3)}
    assert packed == {name for name in blocks if "c_attn" in name and name.endswith("weight")}
    assert len(packed) == 2


def test_packed_projections_are_found_in_wrapped_models() -> None:
    model = tiny_model("gpt2")
    assert packed_blocks(torch.compile(model)) == packed_blocks(model)
    groups = param_groups(torch.compile(model), 0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_a_matrix_that_blocks_do_not_divide_has_one_block() -> None:
    model = tiny_model("gpt2")
    attention = model.transformer.h[0].attn
    attention.c_attn.weight = nn.Parameter(torch.zeros(32, 97))  # as after pruning
    assert attention.c_attn.weight not in packed_blocks(model)
    assert len(packed_blocks(model)) == 1
