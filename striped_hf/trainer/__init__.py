"""What touches transformers: the names in Trainer and a model's param groups."""

from striped_hf.trainer.param_groups import packed_blocks, param_groups
from striped_hf.trainer.registration import optimizer_cls_and_kwargs

__all__ = ["optimizer_cls_and_kwargs", "packed_blocks", "param_groups"]
