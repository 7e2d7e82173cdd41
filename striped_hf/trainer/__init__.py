"""Everything that uses transformers: optimizer names, param groups, callbacks and run folders."""

from striped_hf.trainer.optimizer_kwargs import optimizer_cls_and_kwargs
from striped_hf.trainer.param_groups import packed_blocks, param_groups

__all__ = ["optimizer_cls_and_kwargs", "packed_blocks", "param_groups"]
