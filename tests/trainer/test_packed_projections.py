"""The output of each module shows that its entry in the table of packed projections is right.

Half the keys undo twice the queries. A projection that multiplies the others makes the output zero
when it is zero. So the effect of scaling one projection of a packed matrix is known in advance. If
the scaled rows belong to several projections, the effect is different.
"""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packed_modules import (
    CASES,
    CONFIG,
    EXPERTS,
    LENGTH,
    WIDTH,
    Case,
    Config,
)
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from striped_hf.trainer import packed_blocks
from striped_hf.trainer.param_groups import _PACKED

MODELS = Path(transformers.__file__).parent / "models"


def modules_by_class() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        for name in re.findall(r"^class (\w+)\(", file.read_text(), re.MULTILINE):
            found.setdefault(name, []).append(f"transformers.models.{file.parent.name}.{file.stem}")
    found["MultiheadAttention"] = ["torch.nn"]
    return found


WHERE = modules_by_class()
# two models have an ``Attention``; the other one has separate projections
WHERE["Attention"] = ["transformers.models.openai.modeling_openai"]
# classes of versions before the installed one
OLD = {
    *("Ernie4_5_VL_MoeVisionAttention", "JanusAttention", "DeepseekV3NaiveMoe", "Dots1NaiveMoe"),
    *("Ernie4_5_VL_MoeMoeExperts", "Glm4MoeLiteNaiveMoe", "Glm4MoeNaiveMoe"),
    *("Glm4vMoeTextNaiveMoe", "SolarOpenNaiveMoe"),
}
LISTED = [(path, name) for path, _, classes in _PACKED for name in classes.split()]


def covered() -> list[Any]:
    return [
        pytest.param(case, name, id=f"{name}-{case.path}-{'x'.join(map(str, case.blocks))}")
        for case in CASES
        for path, name in LISTED
        if path == case.path and re.fullmatch(case.classes, name) and name in WHERE
    ]


def build(case: Case, name: str) -> nn.Module:
    cls = getattr(importlib.import_module(WHERE[name][0]), name)
    module = case.build(cls, Config(**CONFIG | dict(case.config))).eval()
    with torch.no_grad():
        for param_name, param in module.named_parameters():
            if param_name.endswith("bias") or "adapter" in param_name:
                param.zero_()
            elif param.dim() > 1:
                param.normal_(std=0.5)
            else:
                # some modules leave the memory of their vectors as they find it
                param.fill_(1.0)
    return module


def first_tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else first_tensor(output[0])


def scaled(weight: Tensor, blocks: tuple[int, int], factors: dict[int, float], cut: str) -> Tensor:
    """Multiplies parts of a packed matrix: blocks of it, or every n-th row or column."""
    axis, count = (-2, blocks[0]) if blocks[0] > 1 else (-1, blocks[1])
    size = weight.shape[axis]
    part = torch.arange(size) // (size // count) if cut == "block" else torch.arange(size) % count
    scale = torch.tensor([factors.get(int(i), 1.0) for i in part], dtype=weight.dtype)
    return weight * (scale.unsqueeze(-1) if axis == -2 else scale)


@pytest.mark.parametrize(("case", "name"), covered())
def test_the_projections_are_where_the_table_says(case: Case, name: str) -> None:
    torch.manual_seed(0)
    module = build(case, name)
    inputs = case.inputs()
    found = {
        param_name: packed_blocks(module)[param]
        for param_name, param in module.named_parameters()
        if param in packed_blocks(module)
    }
    assert found.get(case.path, (1, 1)) == case.blocks

    def run() -> Tensor:
        with torch.no_grad():
            output = first_tensor(module(*inputs))
        return output - inputs[0] if case.residual else output

    before = run()
    assert before.abs().max() > 1e-3
    weight = module.get_parameter(case.path)
    original = weight.detach().clone()
    for factors, effect in case.effects:
        weight.data = scaled(original, case.blocks, factors, "block")
        torch.testing.assert_close(run(), effect * before, rtol=1e-3, atol=1e-5)
        weight.data = scaled(original, case.blocks, factors, "every n-th")
        assert not torch.allclose(run(), effect * before, rtol=1e-2, atol=1e-3)


def test_the_table_lists_only_what_exists() -> None:
    assert {name for _, name in LISTED if name not in WHERE} <= OLD
    assert len(LISTED) == len(set(LISTED))


def test_the_entries_that_the_check_above_leaves_out() -> None:
    shown = {(param.values[0].path, param.values[1]) for param in covered()}
    assert {entry for entry in LISTED if entry not in shown and entry[1] not in OLD} == {
        # tested below
        *((path, "DbrxExpertGLU") for path in ("w1", "v1", "w2")),
        # the bias of a matrix that is tested
        ("gate_up_proj_bias", "OpenAIPrivacyFilterExperts"),
        # the installed version has its experts elsewhere
        *(("input_linear.weight", f"GraniteMoe{kind}MoE") for kind in ("", "Hybrid", "Shared")),
    }


def test_dbrx_stacks_its_experts() -> None:
    from transformers.models.dbrx.modeling_dbrx import DbrxExperts

    torch.manual_seed(0)
    module = DbrxExperts(Config(**CONFIG))
    for param in module.parameters():
        nn.init.normal_(param)
    assert set(packed_blocks(module).values()) == {(EXPERTS, 1)}
    assert len(packed_blocks(module)) == 3
    x = torch.randn(1, LENGTH, WIDTH)
    for param in packed_blocks(module):
        original = param.detach().clone()
        for expert in range(EXPERTS):
            only = torch.full((LENGTH, 1), expert)
            param.data = scaled(original, (EXPERTS, 1), {expert: 0.0}, "block")
            with torch.no_grad():
                assert module(x, only, torch.ones(LENGTH, 1)).abs().max() == 0
                param.data = scaled(original, (EXPERTS, 1), {expert: 0.0}, "every n-th")
                assert module(x, only, torch.ones(LENGTH, 1)).abs().max() > 0
        param.data = original


def test_experts_are_told_apart_by_their_shape() -> None:
    """A class has one layout in transformers 4.57 and another one in 5.x."""
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts

    experts = Qwen3VLMoeTextExperts(Config(**CONFIG))
    assert packed_blocks(experts) == {experts.gate_up_proj: (2, 1)}
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.mT.clone())
    experts.down_proj = nn.Parameter(experts.down_proj.mT.clone())
    assert packed_blocks(experts) == {experts.gate_up_proj: (1, 2)}


def tiny_causal_lm(model_type: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **small | ids | config)
    ).eval()


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", {"intermediate_size": 32}),
        ("gpt_neox", {"intermediate_size": 32}),
        ("bloom", {}),
        ("falcon", {"multi_query": False, "new_decoder_architecture": False}),
        ("persimmon", {"intermediate_size": 32}),
        ("codegen", {"n_embd": 16, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
        ("gpt_bigcode", {"multi_query": True}),
        ("gpt_oss", {"intermediate_size": 32, "num_local_experts": 2, "num_experts_per_tok": 1}),
        ("mamba2", {"num_heads": 4, "head_dim": 8, "n_groups": 1, "state_size": 4, "expand": 2}),
    ],
)
def test_interleaved_unequal_and_separate_projections_have_one_block(
    model_type: str, config: dict[str, Any]
) -> None:
    assert packed_blocks(tiny_causal_lm(model_type, **config)) == {}


def test_the_check_above_detects_projections_interleaved_by_head() -> None:
    """With GPT-NeoX's packed matrix cut as (3, 1), the output changes."""
    model = tiny_causal_lm("gpt_neox", intermediate_size=32)
    packed = [m.query_key_value for m in model.modules() if hasattr(m, "query_key_value")]
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = model(ids).logits
        by_head = torch.tensor([2.0, 0.5, 1.0]).repeat_interleave(4).repeat(4)
        for linear in packed:
            linear.weight *= by_head[:, None]
            linear.bias *= by_head
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-6)
        for linear in packed:
            linear.weight.data = scaled(linear.weight, (3, 1), {0: 2.0, 1: 0.5}, "block")
        assert not torch.allclose(model(ids).logits, before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "config", "counts"),
    [
        ("gpt2", {"add_cross_attention": True}, {(1, 3): 2, (1, 2): 2}),
        ("phi3", {"intermediate_size": 32, "num_key_value_heads": 4}, {(3, 1): 2, (2, 1): 2}),
        ("phi3", {"intermediate_size": 32, "num_key_value_heads": 2}, {(2, 1): 2}),
        ("glm", {"intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 4}, {(2, 1): 2}),
        ("mpt", {"d_model": 16, "n_heads": 4, "n_layers": 2}, {(3, 1): 2}),
        ("mamba", {"state_size": 4}, {(2, 1): 2}),
        (
            "mixtral",
            {"intermediate_size": 32, "num_key_value_heads": 2, "num_local_experts": 2},
            {(2, 1): 2},
        ),
    ],
)
def test_whole_models(
    model_type: str, config: dict[str, Any], counts: dict[tuple[int, int], int]
) -> None:
    packed = packed_blocks(tiny_causal_lm(model_type, **config))
    assert {blocks: list(packed.values()).count(blocks) for blocks in packed.values()} == counts


def test_a_class_of_the_same_name_from_elsewhere_is_not_recognised() -> None:
    config = Config(**CONFIG)
    theirs = GPT2Attention(config, layer_idx=0)
    assert len(packed_blocks(theirs)) == 1
    # fully_shard derives such classes
    assert len(packed_blocks(type("FSDPGPT2Attention", (GPT2Attention,), {})(config))) == 1

    mine = type("GPT2Attention", (nn.Module,), {})()
    mine.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
    mine.split_size = WIDTH
    assert packed_blocks(mine) == {}
