"""What a training step computes, and what the device could: the two sides of MFU.

MFU, model FLOPs utilization, is what a model needs to train on the tokens that it trained on, over
what the device could have computed meanwhile (Chowdhery et al. 2022, appendix B, and nanoGPT).
"""

import re
from typing import Any

import torch
from torch import nn

# Dense bfloat16 matrix products that add up in float32, in TFLOPS (float16 where a GPU has no
# bfloat16). Data sheets that name the figure with sparsity are halved.
_PEAK_TFLOPS = {  # by the name that torch.cuda.get_device_name gives, without the maker's
    # HGX B200 data sheet: 36 PFLOPS with sparsity, 8 GPUs
    r"B200": 2250.0,
    # H200 data sheet: 1,979 (SXM) and 1,671 (NVL) with sparsity
    r"H200": 989.5,
    r"H200 NVL": 835.5,
    # GH200 data sheet: 1,979 with sparsity
    r"GH200 \d+GB": 989.5,
    # H100 data sheet: 1,979 (SXM), 1,513 (PCIe, first edition) and 1,671 (NVL) with sparsity
    r"H100 80GB HBM3": 989.5,
    r"H100 PCIe": 756.5,
    r"H100 NVL": 835.5,
    # A100 data sheet: 312, all forms
    r"A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe": 312.0,
    # A30, A40 and A10 data sheets: 165, 149.7 and 125
    r"A30": 165.0,
    r"A40": 149.7,
    r"A10": 125.0,
    # L4, L40 and L40S data sheets: 242 with sparsity, 181.05 and 362.05
    r"L4": 121.0,
    r"L40": 181.05,
    r"L40S": 362.05,
    # NVIDIA's white papers of GA102, AD102 and RTX Blackwell: RTX 3090, A6000, 4090, 5090
    r"GeForce RTX 3090": 71.0,
    r"RTX A6000": 154.8,
    r"GeForce RTX 4090": 165.2,
    r"GeForce RTX 5090": 209.5,
    # V100 and T4 data sheets, float16: 125 (SXM2), 112 (PCIe) and 65
    r"V100-SXM2-\d+GB": 125.0,
    r"V100-PCIE-\d+GB": 112.0,
    r"T4": 65.0,
    # MI300X data sheet: 1,307.4
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
