"""FLOPs of a training step and peak FLOPS of a device: the numerator and denominator of MFU.

MFU, model FLOPs utilization, is a ratio: the operations that the tokens of training need, divided
by the operations that the device could do in the same time (Chowdhery et al. 2022, appendix B).
"""

import re
from typing import Any

import torch
from torch import nn

# Peak rates of dense bfloat16 matrix products with float32 accumulation, in TFLOPS (float16 for
# GPUs without bfloat16). Each figure comes from the document named above it. If a document gives
# only the rate with sparsity, the figure is half of it.
_PEAK_TFLOPS = {  # patterns for torch.cuda.get_device_name() without the vendor's name
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
    """Returns a GPU's peak rate of dense bfloat16 matrix products, in TFLOPS.

    Args:
        device_name: The name from ``torch.cuda.get_device_name``.

    Returns:
        None if the GPU is not in the table, or is a MIG slice.
    """
    name = re.sub(r"^(NVIDIA|AMD|Tesla) ", "", device_name)
    for pattern, tflops in _PEAK_TFLOPS.items():
        if re.fullmatch(pattern, name):
            return tflops
    return None


def flops_per_token(model: nn.Module, length: float) -> float | None:
    """Counts the floating-point operations of training a transformer on one token.

    The count has two terms:

    - 6 for each weight of a matrix product: 2 in the forward pass, 4 in the backward pass. A frozen
      weight counts 4.
    - 12 for each layer, position and query channel of attention. All positions count, as in
      nanoGPT, although a causal model needs only half of them.

    The recomputation of activation checkpointing does not count.

    Args:
        model: A transformers model, with a ``config``.
        length: The mean length of the sequences, in tokens.

    Returns:
        None if the formula does not hold: for a mixture of experts, and for a configuration
        without layers, heads and hidden size.
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

    # an embedding lookup multiplies nothing, unless its weight is also the output layer's
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
    """Returns the GPU's peak in TFLOPS; None without a GPU, or if the table does not have it."""
    return peak_tflops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
