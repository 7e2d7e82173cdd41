"""CUDA graphs: whether one is being captured."""

import torch


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the device's current stream."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # torch asks the current device
        return torch.cuda.is_current_stream_capturing()
