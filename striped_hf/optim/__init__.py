"""The optimizer. It needs torch only, so it works without transformers."""

from striped_hf.optim.striped_adamw import StripedAdamW

__all__ = ["StripedAdamW"]
