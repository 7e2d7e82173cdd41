"""Warns if an optimizer rounds 16-bit weights to the nearest number."""

import logging
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from striped_hf.optim import StripedAdamW

logger = logging.getLogger(__name__)

# Their optimizers round new weights to nearest. Optimizers of other packages may round otherwise or
# keep the lost bits.
_ROUND_TO_NEAREST = ("torch", "transformers", "bitsandbytes")

_WARNING = """\
{name} rounds new {dtype} weights to the nearest number, which drops most updates at the learning \
rates of finetuning. At 3e-5, AdamW finetuned a small model to a validation loss of 3.29 with \
float32 weights and of 4.22 with bfloat16 weights. StripedAdamW, which rounds stochastically, \
reached 3.28 with bfloat16 weights (docs/least_memory.md). Pass --optim striped_adamw_8bit, or \
--dtype float32."""


def rounds_to_nearest(optimizer: torch.optim.Optimizer) -> bool:
    """Tells whether an optimizer rounds new 16-bit weights to the nearest number.

    True for the classes of torch, transformers and bitsandbytes, and for StripedAdamW with
    ``stochastic_rounding=False`` and without ``master_bits``. False if it is not known.
    """
    if isinstance(optimizer, StripedAdamW):
        return any(
            group["stochastic_rounding"] is False and group["master_bits"] is None
            for group in optimizer.param_groups
        )
    return type(optimizer).__module__.partition(".")[0] in _ROUND_TO_NEAREST


class WarnOfRounding(TrainerCallback):
    """Warns once, as training begins, of 16-bit weights that are rounded to nearest."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Looks at the optimizer and at the parameters that it trains."""
        wrapper = kwargs["optimizer"]
        optimizer = getattr(wrapper, "optimizer", wrapper)  # inside accelerate's wrapper
        if not state.is_world_process_zero or not rounds_to_nearest(optimizer):
            return
        dtypes = {param.dtype for group in optimizer.param_groups for param in group["params"]}
        for dtype in (torch.bfloat16, torch.float16):
            if dtype in dtypes:
                name = str(dtype).removeprefix("torch.")
                logger.warning(_WARNING.format(name=type(optimizer).__name__, dtype=name))
                return
