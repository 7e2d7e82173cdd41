"""The output of each module shows that its entry in the table of packed projections is right.

Half the keys undo twice the queries. A projection that multiplies the others makes the output zero
when it is zero. So the effect of scaling one projection of a packed matrix is known in advance. If
the scaled rows belong to several projections, the effect is different.
"""

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from striped_hf.trainer import packed_blocks
from striped_hf.trainer.param_groups import _PACKED

MODELS = Path(transformers.__file__).parent / "models"
WIDTH, HEADS, HEAD_DIM, LENGTH, EXPERTS = 12, 2, 6, 4, 4

# the configuration entries that the tested classes read
CONFIG: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "hidden_dim"), WIDTH),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads", "n_head"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "dim_head"), HEAD_DIM),
    **dict.fromkeys(("qkv_bias", "attention_bias", "bias", "use_bias", "mlp_bias"), True),
    **dict.fromkeys(("mamba_conv_bias", "use_conv_bias", "conv_bias", "add_bias_linear"), True),
    **dict.fromkeys(("mamba_proj_bias", "fast_qkv", "use_mambapy", "scale_attn_weights"), True),
    **dict.fromkeys(("use_rel_pos", "use_relative_position_embeddings"), False),
    **dict.fromkeys(("has_relative_attention_bias", "has_spatial_attention_bias"), False),
    **dict.fromkeys(("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"), False),
    **dict.fromkeys(
        ("deterministic_flash_attn", "use_associative_scan", "use_mamba_kernels"), False
    ),
    **dict.fromkeys(("use_clipped_linears", "use_mambapy"), False),
    **dict.fromkeys(
        ("attn_pdrop", "resid_pdrop", "attention_dropout", "dropout", "drop_rate"), 0.0
    ),
    **dict.fromkeys(("attn_drop_rate", "attention_probs_dropout_prob", "mlp_dropout"), 0.0),
    "dropout_rate": 0.0,
    **dict.fromkeys(
        ("hidden_act", "activation", "activation_function", "hidden_activation"), "silu"
    ),
    **dict.fromkeys(("rms_norm_eps", "mixer_rms_eps", "layer_norm_eps", "post_norm_eps"), 1e-12),
    "adapter_layer_norm_eps": 1e-12,
    **dict.fromkeys(("intermediate_size", "ffn_dim", "shared_intermediate_size"), 12),
    **dict.fromkeys(("alignment_intermediate_size", "dense_intermediate_size"), 12),
    **dict.fromkeys(("moe_intermediate_size", "ffn_hidden_size", "expert_ffn_hidden_size"), 12),
    **dict.fromkeys(("max_position_embeddings", "block_size", "max_seq_len", "max_pos_emb"), 16),
    **dict.fromkeys(("swiglu_limit", "swiglu_alpha", "mlp_gate_softcap", "mlp_up_softcap"), 7.0),
    **dict.fromkeys(("conv_kernel", "mamba_d_conv", "conv_L_cache", "conv_kernel_size"), 3),
    **dict.fromkeys(("linear_conv_kernel_dim", "conf_conv_kernel_size", "window_size"), 3),
    **dict.fromkeys(("state_size", "mamba_d_state", "mamba_dt_rank", "time_step_rank"), 2),
    **dict.fromkeys(("mamba_expand", "conv_expansion_factor", "downsample_factor"), 2),
    **dict.fromkeys(
        ("patch_size", "spatial_merge_size", "num_codebooks", "num_experts_per_tok"), 2
    ),
    **dict.fromkeys(("num_mem_blocks", "layer_idx"), 1),
    **dict.fromkeys(("time_step_scale", "time_step_max", "time_step_min"), 1.0),
    "time_step_floor": 1e-4,
    "time_step_init_scheme": "random",
    "zero_expert_num": 0,
    "moe_hidden_size": WIDTH,
    "adapter_rank": 2,
    "hybrid_layer_ids": [0],
    "context_size": LENGTH,
    "kv_channels": HEAD_DIM,
    "image_size": 4,
    "gradient_clipping": 1e10,
    "layer_types": ["full_attention"],
    "output_gate_type": "swish",
    "clip_qkv": 100.0,
    "rope_theta": 1e4,
    "attn_config": SimpleNamespace(
        softmax_scale=None, attn_pdrop=0.0, clip_qkv=100.0, kv_n_heads=HEADS, rope_theta=1e4
    ),
    "ffn_act_fn": {"name": "silu"},
    "vision_config": SimpleNamespace(hidden_size=WIDTH),
    "text_config": SimpleNamespace(hidden_size=WIDTH),
    "_attn_implementation": "eager",
    "_experts_implementation": "eager",
}


class Config(SimpleNamespace):
    def __getattr__(self, name: str) -> Any:
        if re.fullmatch(r"(n|num|moe_num)_?\w*experts", name):
            return EXPERTS
        raise AttributeError(name)


def tokens() -> Tensor:
    return torch.randn(2, LENGTH, WIDTH)


def rotary() -> tuple[Tensor, Tensor]:
    angle = torch.rand(LENGTH, HEAD_DIM // 2).repeat(1, 2)
    return angle.cos(), angle.sin()


def image() -> Tensor:
    return torch.randn(2, 6, 6, WIDTH)


def route() -> tuple[Tensor, Tensor]:
    return torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [0, 2]]), torch.rand(5, 2)


@dataclass(frozen=True)
class Case:
    """How to build and call the classes that the table lists for ``path``."""

    path: str
    inputs: Callable[[], tuple[Any, ...]] = lambda: (tokens(),)
    build: Callable[[type, Config], nn.Module] = lambda cls, config: cls(config)
    blocks: tuple[int, int] = (2, 1)
    # the factor of the output if projections are scaled
    effects: tuple[tuple[dict[int, float], float], ...] = (({0: 0.0}, 0.0),)
    classes: str = r".*"
    residual: bool = False
    config: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return self.path


QKV: dict[str, Any] = {"blocks": (3, 1), "effects": (({0: 2.0, 1: 0.5}, 1.0), ({2: 0.0}, 0.0))}
PRODUCT_OF_3: dict[str, Any] = {
    "blocks": (3, 1),
    "effects": (({0: 0.0}, 0.0), ({1: 0.0}, 0.0), ({2: 0.0}, 0.0)),
}


def with_layer(cls: type, config: Config) -> nn.Module:
    return cls(config, layer_idx=0)


CASES = [
    Case(
        "c_attn.weight",
        build=with_layer,
        classes="GPT2Attention|DecisionTransformerGPT2Attention|ImageGPTAttention",
        blocks=(1, 3),
        effects=QKV["effects"],
    ),
    Case(
        "c_attn.weight",
        inputs=lambda: (tokens(), None, None, tokens()),
        build=lambda cls, config: cls(config, is_cross_attention=True, layer_idx=0),
        classes="GPT2Attention|DecisionTransformerGPT2Attention|ImageGPTAttention",
        blocks=(1, 2),
        effects=(({1: 0.0}, 0.0),),
    ),
    Case(
        "c_attn.weight",
        build=lambda cls, config: cls(WIDTH, LENGTH, config),
        classes="Attention",
        blocks=(1, 3),
        effects=QKV["effects"],
    ),
    Case(
        "in_proj_weight",
        inputs=lambda: (x := tokens(), x, x),
        build=lambda cls, config: cls(WIDTH, HEADS, batch_first=True),
        **QKV,
    ),
    Case(
        "Wqkv.weight",
        inputs=lambda: (tokens(), torch.zeros(HEADS, 1, LENGTH)),
        classes="MptAttention",
        build=with_layer,
        **QKV,
    ),
    Case(
        "Wqkv.weight",
        inputs=lambda: (tokens(), tuple(part[None] for part in rotary())),
        classes="ModernBertAttention",
        build=with_layer,
        **QKV,
    ),
    Case(
        "Wqkv.weight",
        inputs=lambda: (tokens(), None, tuple(part[None] for part in rotary())),
        classes="DbrxAttention",
        build=with_layer,
        **QKV,
    ),
    Case("att_proj.weight", **QKV),
    Case("qkv_linear.weight", inputs=lambda: (tokens(), torch.zeros(1, 1, 1, LENGTH)), **QKV),
    *(
        Case(
            "qkv_proj.weight",
            inputs=lambda: (tokens(), tuple(part[None] for part in rotary()), None),
            build=with_layer,
            config=(("num_key_value_heads", kv_heads),),
            blocks=blocks,
            effects=effects,
        )
        for kv_heads, blocks, effects in ((HEADS, (3, 1), QKV["effects"]), (1, (1, 1), ()))
    ),
    Case(
        "qkv.weight",
        classes="Blip2?Attention|InstructBlip(Video)?Attention|MgpstrAttention|PPOCR.*|Timesformer.*",
        **QKV,
    ),
    Case(
        "qkv.weight",
        inputs=lambda: (tokens()[0], torch.tensor([0, LENGTH], dtype=torch.int32)),
        classes="GlmImageVisionAttention",
        **QKV,
    ),
    Case(
        "qkv.weight",
        inputs=lambda: (tokens()[0], torch.tensor([0, LENGTH], dtype=torch.int32), rotary()),
        classes=r"(?!GlmImage|.*Sam|Got|PPF|SLANeXt|Florence).*Vision.*Attention",
        **QKV,
    ),
    Case(
        "qkv.weight",
        inputs=lambda: (tokens()[0], torch.tensor([0, LENGTH], dtype=torch.int32), rotary()),
        classes=r"Exaone4_5_VisionAttention",
        config=(("num_key_value_heads", 1),),
        blocks=(1, 1),
        effects=(),
    ),
    Case(
        "qkv.weight",
        inputs=lambda: (image(),),
        build=lambda cls, config: cls(config, 0),
        classes=r"(.*Sam|SamHQ|GotOcr2|PPFormulaNet|SLANeXt)VisionAttention",
        **QKV,
    ),
    Case(
        "qkv.weight",
        build=lambda cls, config: cls(config, 0),
        classes="Florence2VisionChannelAttention",
        config=(("embed_dim", [WIDTH]), ("num_groups", [HEADS])),
        **QKV,
    ),
    Case(
        "qkv.weight",
        inputs=lambda: (image(),),
        build=lambda cls, config: cls(config, 0),
        classes="Florence2VisionWindowAttention",
        config=(("embed_dim", [WIDTH]), ("num_heads", [HEADS])),
        **QKV,
    ),
    Case(
        "qkv.weight",
        inputs=lambda: (image(),),
        classes="SegGptAttention",
        config=(("image_size", (4, 4)),),
        **QKV,
    ),
    Case(
        "qkv.weight",
        inputs=lambda: (image(),),
        classes="VitDetAttention",
        **QKV,
    ),
    Case(
        "qkv.weight",
        build=lambda cls, config: cls(WIDTH, WIDTH, HEADS),
        classes="HieraMaskUnitAttention",
        **QKV,
    ),
    Case(
        "qkv.weight",
        inputs=lambda: (image(),),
        build=lambda cls, config: cls(config, WIDTH, WIDTH, HEADS),
        classes="Sam2MultiScaleAttention",
        **QKV,
    ),
    # the delta rule multiplies queries, values and keys
    Case(
        "in_proj_qkv.weight",
        build=lambda cls, config: cls(config, 0),
        **PRODUCT_OF_3,
    ),
    Case(
        "in_proj_qkv.weight",
        build=lambda cls, config: cls(config, 0),
        config=(("linear_value_head_dim", 2 * HEAD_DIM),),
        blocks=(1, 1),
        effects=(),
    ),
    Case(
        "kv_proj.weight",
        inputs=lambda: (tokens(), None, tuple(part[None] for part in rotary())),
        build=with_layer,
        effects=(({1: 0.0}, 0.0),),
    ),
    Case(
        "to_kv.weight",
        inputs=lambda: (tokens(), tokens(), torch.ones(2, 2 * LENGTH)),
        build=lambda cls, config: cls(WIDTH, HEAD_DIM, HEADS),
        classes="Evolla.*",
        effects=(({1: 0.0}, 0.0),),
    ),
    Case(
        "to_kv.weight",
        inputs=lambda: (tokens(), torch.zeros(LENGTH, LENGTH, dtype=torch.long)),
        classes="Granite.*",
        effects=(({1: 0.0}, 0.0),),
    ),
    Case("gate_up_proj.weight", classes=r"(?!EsmFold2|Zamba2).*"),
    Case(
        "gate_up_proj.weight",
        build=lambda cls, config: cls(WIDTH, 12),
        classes="EsmFold2SwiGLU",
    ),
    Case(
        "gate_up_proj.weight",
        inputs=lambda: (tokens(), 0),
        build=lambda cls, config: cls(config, num_fwd_mem_blocks=1, block_id=0),
        classes="Zamba2MLP",
    ),
    Case("input_linear.weight", classes=".*MLP"),
    Case("input_linear.weight", classes="JetMoeMoE"),
    Case("Wi.weight"),
    Case("fc1.weight", classes=".*GatingMLP"),
    Case("fc1.weight", build=lambda cls, config: cls(config, "silu"), classes="Moonshine.*"),
    Case("proj.weight"),
    Case("linear_1.weight"),
    Case("linear_start.weight", residual=True),
    Case("linear_start.linear.weight", residual=True),
    Case("pointwise_lin1.weight"),
    Case(
        "gate_up_proj",
        inputs=lambda: (tokens()[0, [0, 1, 2, 3, 0]], *route()),
        classes="(?!Aria|Llama4|OpenAI).*",
    ),
    Case(
        "gate_up_proj",
        inputs=lambda: (tokens()[0, [0, 1, 2, 3, 0]], *route()),
        classes="Aria.*|OpenAI.*",
        blocks=(1, 2),
    ),
    Case(
        "gate_up_proj",
        inputs=lambda: (torch.randn(EXPERTS * LENGTH, WIDTH),),
        classes="Llama4.*",
        blocks=(1, 2),
    ),
    Case("in_proj.weight", build=lambda cls, config: cls(config, 0), classes="JambaMambaMixer"),
    Case(
        "in_proj.weight",
        build=lambda cls, config: cls(config, 0, initialize_mixer_weights=False),
        classes="(Falcon)?MambaMixer",
    ),
    Case(
        "in_proj.weight",
        build=lambda cls, config: cls(config, 0),
        classes="Lfm[23](Moe)?ShortConv",
        **PRODUCT_OF_3,
    ),
    Case(
        "in_proj.weight",
        inputs=lambda: (tokens()[0], [[1, 2, 2]]),
        build=lambda cls, config: cls(config, 0),
        classes="Lfm3VlVisionShortConv",
        **PRODUCT_OF_3,
    ),
]


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
