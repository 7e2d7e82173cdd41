"""AdamW at a fraction of its optimizer memory, for ``transformers.Trainer``.

Importing the package makes ``striped_adamw``, ``striped_adamw_8bit`` and ``striped_adamw_4bit``
valid for ``TrainingArguments.optim``. ``StripedAdamW`` itself needs torch only.
"""

from striped_hf.optim import StripedAdamW
from striped_hf.trainer.registration import optimizer_cls_and_kwargs, register

__all__ = ["StripedAdamW", "optimizer_cls_and_kwargs"]

register()
