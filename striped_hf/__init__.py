"""AdamW at a fraction of its optimizer memory, for ``transformers.Trainer``."""

from striped_hf.optim import StripedAdamW

__all__ = ["StripedAdamW"]
