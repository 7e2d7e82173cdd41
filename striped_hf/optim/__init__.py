"""The optimizer. It needs only torch: importing it does not import transformers."""

from striped_hf.optim.export import adamw_state_dict
from striped_hf.optim.layerwise.optimizer import LayerwiseStripedAdamW
from striped_hf.optim.striped_adamw import StripedAdamW

__all__ = ["LayerwiseStripedAdamW", "StripedAdamW", "adamw_state_dict"]
