"""What a training step computes, and what the device could: the two sides of MFU.

MFU, model FLOPs utilization, is what a model needs to train on the tokens that it trained on, over
what the device could have computed meanwhile (Chowdhery et al. 2022, appendix B, and nanoGPT).
"""

import re
from typing import Any

import torch
from torch import nn

# Dense bfloat16 matrix products that add up in float32, in TFLOPS; float16 where a GPU has no
# bfloat16. Each figure is that of the document named; where it has the rate with sparsity only,
# that is halved.
_PEAK_TFLOPS = {  # by the name that torch.cuda.get_device_name gives, without the maker's
    # NVIDIA Blackwell data sheet, HGX B200, for each GPU: FP16/BF16 4.5 PFLOPS with sparsity
    r"B200": 2250.0,
    # NVIDIA H200 data sheet, BFLOAT16: 1,979 (SXM) and 1,671 (NVL) with sparsity
    r"H200": 989.5,
    r"H200 NVL": 835.5,
    # NVIDIA GH200 Grace Hopper Superchip data sheet, BFLOAT16: 1,979 with sparsity
    r"GH200 \d+GB": 989.5,
    # NVIDIA H100 data sheet, BFLOAT16 with sparsity: 1,979 (SXM), 1,513 (PCIe), 1,671 (NVL)
    r"H100 80GB HBM3": 989.5,
    r"H100 PCIe": 756.5,
    r"H100 NVL": 835.5,
    # NVIDIA A100 data sheet, BFLOAT16: 312 dense, in all forms
    r"A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe": 312.0,
    # NVIDIA A30, A40 and A10 data sheets, BFLOAT16: 165, 149.7 and 125 dense
    r"A30": 165.0,
    r"A40": 149.7,
    r"A10": 125.0,
    # NVIDIA L4 data sheet, BFLOAT16: 242 with sparsity
    r"L4": 121.0,
    # NVIDIA L40 and L40S data sheets, BFLOAT16: 181.05 and 362.05 dense
    r"L40": 181.05,
    r"L40S": 362.05,
    # NVIDIA's architecture white papers of Ampere GA102, Ada and RTX Blackwell, peak BF16 with
    # FP32 accumulate: 154.8, 165.2 and 209.5 dense
    r"RTX A6000": 154.8,
    r"GeForce RTX 4090": 165.2,
    r"GeForce RTX 5090": 209.5,
    # NVIDIA V100 data sheet, tensor performance (float16): 125 (SXM2) and 112 (PCIe)
    r"V100-SXM2-\d+GB": 125.0,
    r"V100-PCIE-\d+GB": 112.0,
    # NVIDIA T4 data sheet, mixed precision (FP16/FP32): 65
    r"T4": 65.0,
    # AMD Instinct MI300X data sheet, peak bfloat16: 1,307.4 dense
    r"Instinct MI300X": 1307.4,
}


def peak_tflops(device_name: str) -> float | None:
    """Returns a GPU's peak in dense bfloat16 products, in TFLOPS.

    Args:
        device_name: As ``torch.cuda.get_device_name`` gives it.

    Returns:
        None for a GPU that is not in the table, and for a part of one (MIG).
    """
    name = re.sub(r"^(NVIDIA|AMD|Tesla) ", "", device_name)
    for pattern, tflops in _PEAK_TFLOPS.items():
        if re.fullmatch(pattern, name):
            return tflops
    return None


def flops_per_token(model: nn.Module, length: float) -> float | None:
    """Counts the floating-point operations of training a transformer on one token.

    6 for each weight that is multiplied (2 in the forward pass, 4 in the backward pass, 2 of which
    only a weight that is trained needs), and 12 for each layer, position and channel of the
    queries in attention. Positions count all, as nanoGPT counts them, though a causal model needs
    half. What activation checkpointing computes again does not count.

    Args:
        model: A model of transformers, which has a ``config``.
        length: The mean length of the sequences, in tokens.

    Returns:
        None where the formula does not hold: for a mixture of experts, and for a configuration
        without layers and heads.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    layers = getattr(config, "num_hidden_layers", None)
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "hidden_size", None)
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    if not (layers and heads and width) or any(getattr(config, name, None) for name in experts):
        return None

    # looking up an embedding multiplies nothing, but where it is the output layer's weight too
    head = getattr(model, "get_output_embeddings", lambda: None)()
    looked_up = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    } - {id(getattr(head, "weight", None))}
    operations = sum(
        (6 if param.requires_grad else 4) * param.numel()
        for param in model.parameters()
        if param.ndim > 1 and id(param) not in looked_up
    )
    head_dim = getattr(config, "head_dim", None) or width // heads
    return operations + 12 * layers * heads * head_dim * length


def device_peak_tflops() -> float | None:
    """Returns the peak of the GPU in use; None where there is none or it is not in the table."""
    return peak_tflops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
