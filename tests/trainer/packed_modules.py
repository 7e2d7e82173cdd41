"""How to build and call the modules with packed projections that transformers has."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

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
