"""Param groups for StripedAdamW: the parameters that decay, and the readings of matrices.

Packed projections have blocks, and each kernel of a convolution is one matrix.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from striped_hf.optim.blocks import mark_blocks
from striped_hf.optim.interface import Blocks, BlocksOption


def _fused_experts(module: Any) -> Blocks:
    # [experts, 2 ff, d] in most models, [experts, d, 2 ff] in some. Qwen3-VL's was transposed from
    # transformers 4 to 5. The down projection, [.., d, ff] or [.., ff, d], tells them apart.
    rows, columns = module.gate_up_proj.shape[-2:]
    down_rows, down_columns = module.down_proj.shape[-2:]
    if (rows, columns) == (2 * down_columns, down_rows):
        return (2, 1)
    return (1, 2) if (rows, columns) == (down_columns, 2 * down_rows) else (1, 1)


def _one_head_count(module: Any) -> Blocks:
    # with grouped-query attention the K and V parts are smaller than the Q part
    config = module.config
    return (3, 1) if config.num_attention_heads == config.num_key_value_heads else (1, 1)


# The packed projections of the architectures in transformers (read in 4.57, 5.0 and 5.23): the
# parameter's path in its module, the blocks, and the classes of such modules. The blocks are a
# function of the module if its configuration decides. The list has only matrices whose parts have
# one size and lie one after another. It does not have these, whose blocks are therefore (1, 1):
#   - interleaved by head: GPT-NeoX, GPT-NeoX-Japanese, BLOOM, Falcon, Persimmon, CodeGen, DeBERTa,
#     MiniMax's lightning attention, GPT-BigCode without multi-query, Qwen3-Next (and the query and
#     gate of its attention), the kv_b_proj of multi-head latent attention;
#   - interleaved element by element: the experts of GPT-OSS, Zamba's Mamba in_proj;
#   - of unequal parts: GPT-BigCode with multi-query, Mamba-2 and its kin, kv_a_proj_with_mqa.
_PACKED: tuple[tuple[str, Blocks | Callable[[Any], Blocks], str], ...] = (
    # transformers' Conv1D, [in, out]: Q | K | V side by side, or K | V for cross-attention
    (
        "c_attn.weight",
        lambda module: (1, module.c_attn.weight.shape[1] // module.split_size),
        "GPT2Attention DecisionTransformerGPT2Attention ImageGPTAttention Attention",
    ),
    # torch's own packed attention, [3 d, d]: the rows of Q, then of K, then of V
    ("in_proj_weight", (3, 1), "MultiheadAttention"),
    # nn.Linear, [3 d, in]: read by chunk(3), split(d) or view(.., 3, heads, head_dim)
    ("Wqkv.weight", (3, 1), "MptAttention ModernBertAttention"),
    ("att_proj.weight", (3, 1), "BarkSelfAttention"),
    ("qkv_linear.weight", (3, 1), "LayoutLMv2SelfAttention"),
    (
        "qkv.weight",
        (3, 1),
        """
        Blip2Attention BlipAttention CohereCompassVisionAttention DeepseekOcr2SamVisionAttention
        Dots3NoteVisionAttention Ernie4_5_VLMoeVisionAttention Ernie4_5_VL_MoeVisionAttention
        Florence2VisionChannelAttention Florence2VisionWindowAttention Glm4vMoeVisionAttention
        Glm4vVisionAttention Glm5NextVisionAttention GlmImageVisionAttention GlmOcrVisionAttention
        GotOcr2VisionAttention HieraMaskUnitAttention InstructBlipAttention
        InstructBlipVideoAttention JanusAttention MgpstrAttention PPFormulaNetVisionAttention
        PPOCRV5MobileRecAttention PPOCRV5ServerRecAttention PPOCRV6SmallRecAttention
        Qwen2_5_VLVisionAttention Qwen3OmniMoeVisionAttention Qwen3VLMoeVisionAttention
        Qwen3VLVisionAttention Qwen3_5MoeVisionAttention Qwen3_5VisionAttention
        Qwen4ExpVisionAttention SLANeXtVisionAttention Sam2MultiScaleAttention SamHQVisionAttention
        SamVisionAttention SegGptAttention TimesformerSelfAttention UnlimitedOcrSamVisionAttention
        VisionAttention VitDetAttention
        """,
    ),
    # the same, [q + 2 kv, in], where K and V may be smaller than Q
    ("qkv_proj.weight", _one_head_count, "Phi3Attention Phi4MultimodalAttention"),
    (
        "Wqkv.weight",
        lambda module: (3, 1) if module.num_heads == module.num_key_value_heads else (1, 1),
        "DbrxAttention",
    ),
    (
        "qkv.weight",
        lambda module: (3, 1) if module.q_dim == module.kv_dim else (1, 1),
        "Exaone4_5_VisionAttention",
    ),
    # gated delta nets, [2 k + v, in]: Q, K and V, where V may be larger
    (
        "in_proj_qkv.weight",
        lambda module: (3, 1) if module.key_dim == module.value_dim else (1, 1),
        "Qwen3_5GatedDeltaNet Qwen3_5MoeGatedDeltaNet Qwen4ExpTextGatedDeltaNet",
    ),
    # nn.Linear, [2 d, in]: K, then V
    ("kv_proj.weight", (2, 1), "JetMoeAttention"),
    (
        "to_kv.weight",
        (2, 1),
        """
        EvollaSequenceCompressorAttention GraniteSpeechConformerAttention
        GraniteSpeechPlusConformerAttention
        """,
    ),
    # nn.Linear, [2 ff, in]: the gate and what it gates, in either order, read by chunk(2) or glu;
    # JetMoE's and Granite's older experts, [experts, 2 ff, in], too
    (
        "gate_up_proj.weight",
        (2, 1),
        """
        DiaMLP Dots3NoteAudioMLP EsmFold2SwiGLU Glm4MLP Glm4vTextMLP GlmImageTextMLP GlmMLP
        GlmOcrTextMLP MiniMaxM3VLDenseMLP Phi3MLP Phi4MultimodalAudioMLP Phi4MultimodalMLP Zamba2MLP
        """,
    ),
    (
        "input_linear.weight",
        (2, 1),
        """
        GraniteMoeHybridMLP GraniteMoeHybridMoE GraniteMoeMoE GraniteMoeSWAMLP GraniteMoeSharedMLP
        GraniteMoeSharedMoE JetMoeMoE
        """,
    ),
    ("Wi.weight", (2, 1), "ModernBertDecoderMLP ModernBertMLP"),
    (
        "fc1.weight",
        (2, 1),
        """
        KyutaiSpeechToTextGatingMLP MoonshineDecoderMLP MoonshineStreamingDecoderMLP MoshiGatingMLP
        """,
    ),
    ("proj.weight", (2, 1), "ClvpGatedLinearUnit"),
    ("linear_1.weight", (2, 1), "AyaVisionMultiModalProjector Cohere2VisionMultiModalProjector"),
    ("linear_start.weight", (2, 1), "Gemma3nAudioConformerLightConv1d"),
    ("linear_start.linear.weight", (2, 1), "Gemma4AudioLightConv1d"),
    ("pointwise_lin1.weight", (2, 1), "GraniteSpeech5EncoderConvolutionModule"),
    # fused experts: gate, then up, of every expert
    (
        "gate_up_proj",
        _fused_experts,
        """
        AXK1Experts AXK2Experts AfmoeExperts AriaExperts BailingHybridExperts BeamExperts
        Cohere2MoeExperts DeepseekOcr2TextExperts DeepseekV2Experts DeepseekV32Experts
        DeepseekV3Experts DeepseekV3NaiveMoe DeepseekV4Experts DiffusionGemmaTextExperts
        Dots1Experts Dots1NaiveMoe Dots3NoteExperts Ernie4_5_MoeExperts Ernie4_5_VLMoeMoeExperts
        Ernie4_5_VL_MoeMoeExperts ExaoneMoeExperts FlexOlmoExperts FlintExperts Gemma4TextExperts
        Glm4MoeExperts Glm4MoeLiteExperts Glm4MoeLiteNaiveMoe Glm4MoeNaiveMoe Glm4vMoeTextExperts
        Glm4vMoeTextNaiveMoe Glm5NextTextExperts GlmMoeDsaExperts GraniteMoeExperts
        GraniteMoeHybridExperts GraniteMoeSWAExperts GraniteMoeSharedExperts HYV3Experts
        HYV4Experts HunYuanMoEV1Experts Inkling2Experts InklingExperts JambaExperts
        KimiLinearExperts Kolibri1Experts LagunaExperts Lfm2MoeExperts Llama4TextExperts
        LongcatFlashExperts MellumExperts MiMoV2FlashExperts MiniMaxExperts MiniMaxM2Experts
        MiniMaxM3VLExperts Mistral4Experts MistralLarge4TextExperts MixtralExperts MuseSparkExperts
        OlmoeExperts OpenAIPrivacyFilterExperts PhimoeExperts Qwen2MoeExperts Qwen3MoeExperts
        Qwen3NextExperts Qwen3OmniMoeTalkerTextExperts Qwen3OmniMoeThinkerTextExperts
        Qwen3VLMoeTextExperts Qwen3_5MoeExperts Qwen4ExpTextExperts SolarOpenExperts
        SolarOpenNaiveMoe Step3p7Experts UnlimitedOcrTextExperts ZayaExperts
        """,
    ),
    # its bias, [experts, 2 ff]
    ("gate_up_proj_bias", (1, 2), "OpenAIPrivacyFilterExperts"),
    # all experts in one matrix, [experts ff, d]
    ("w1", lambda module: (module.moe_num_experts, 1), "DbrxExpertGLU"),
    ("v1", lambda module: (module.moe_num_experts, 1), "DbrxExpertGLU"),
    ("w2", lambda module: (module.moe_num_experts, 1), "DbrxExpertGLU"),
    # Mamba, [2 d, in]: the hidden states, then their gate
    ("in_proj.weight", (2, 1), "FalconMambaMixer JambaMambaMixer MambaMixer"),
    # LFM's short convolution, [3 d, in]: two gates and what they gate
    (
        "in_proj.weight",
        (3, 1),
        "Lfm2MoeShortConv Lfm2ShortConv Lfm3ShortConv Lfm3VlVisionShortConv",
    ),
)


# their kernels are [out, in / groups, ...], or [in, out / groups, ...] if transposed
_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def packed_blocks(model: nn.Module) -> dict[nn.Parameter, Blocks]:
    """Finds the parameters of a model that pack several projections of one size.

    The function recognises modules by their class: a class of transformers or torch, or a class
    derived from it (such as the classes that ``fully_shard`` makes). Other matrices are not in the
    result; their blocks are (1, 1).

    Args:
        model: Any module, perhaps wrapped (PEFT, ``torch.compile``, DDP).

    Returns:
        (br, bc) by parameter: the matrix, its last two dimensions, consists of br equal blocks of
        rows and bc equal blocks of columns.
    """
    by_class: dict[str, list[tuple[str, Blocks | Callable[[Any], Blocks]]]] = {}
    for path, layout, classes in _PACKED:
        for class_name in classes.split():
            by_class.setdefault(class_name, []).append((path, layout))

    found = {}
    for module in model.modules():
        for cls in type(module).__mro__:
            if cls.__module__.split(".")[0] not in ("transformers", "torch"):
                continue  # the name of a class from another package has no meaning here
            for path, layout in by_class.get(cls.__name__, ()):
                try:
                    param = attrgetter(path)(module)
                    blocks = layout(module) if callable(layout) else layout
                except AttributeError:
                    continue  # optional, or of another version of the class
                if not isinstance(param, nn.Parameter) or param.dim() < 2:
                    continue  # absent, or flattened by a wrapper
                divided = all(
                    n % count == 0 for n, count in zip(param.shape[-2:], blocks, strict=True)
                )
                if blocks != (1, 1) and divided:
                    found[param] = blocks
    return found


def mark_matrices(model: nn.Module) -> None:
    """Marks packed projections and kernels of convolutions, for a StripedAdamW built afterwards.

    Code that builds the groups then need not know of blocks. The marks are lost when parameters are
    replaced, as in a deep copy of the model: mark the copy, too.

    Args:
        model: As for ``packed_blocks``.
    """
    for param, blocks in _marks(model).items():
        mark_blocks(param, blocks)


def _marks(model: nn.Module) -> dict[nn.Parameter, BlocksOption]:
    """Finds the parameters of a model whose modules decide how they are read."""
    kernels: dict[nn.Parameter, BlocksOption] = {
        param: "kernel"
        for module in model.modules()
        if isinstance(module, _CONVOLUTIONS)
        for param in module.parameters()  # also the parameters of a parametrization
        if is_lazy(param) or param.dim() >= 3
    }
    return {**kernels, **packed_blocks(model)}


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Builds the param groups with which StripedAdamW trains a model.

    They are the groups of ``transformers.Trainer``, in its order, made by its own function: every
    parameter but biases and norms decays, and frozen parameters are left out. So the state of an
    AdamW or of a learning-rate scheduler, which is stored by group, fits these groups, too.

    Args:
        model: The model to train.
        weight_decay: The decay of the parameters that decay, a rate times the learning rate.

    Returns:
        The group of parameters that decay, then the group of the others. Either may be empty. Each
        has ``params`` as (name, parameter), ``weight_decay``, and ``blocks`` as a list with a pair
        for each parameter.
    """
    from transformers.trainer import Trainer

    # the method does not use its Trainer, and there is no Trainer yet
    decaying = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    packed, marks = packed_blocks(model), _marks(model)
    groups = []
    for decays in (True, False):
        named = [
            (name, param)
            for name, param in model.named_parameters()
            if param.requires_grad and (name in decaying) == decays
        ]
        for _, param in named:  # other code may put the parameters in another order
            mark_blocks(param, marks.get(param, (1, 1)))
        group: dict[str, Any] = {
            "params": named,
            "weight_decay": weight_decay if decays else 0.0,
            "blocks": [packed.get(param, (1, 1)) for _, param in named],
        }
        if not named:
            group["param_names"] = []  # torch wants names in all groups, and here finds none
        groups.append(group)
    return groups
