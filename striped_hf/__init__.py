"""AdamW at a fraction of its optimizer memory, for ``transformers.Trainer``.

Importing the package makes ``striped_adamw``, ``striped_adamw_8bit`` and ``striped_adamw_4bit``
valid for ``TrainingArguments.optim``, whether transformers is imported before or after it. The
import itself loads neither torch nor transformers: ``StripedAdamW`` loads torch when it is first
used, and the names wait for transformers.
"""

import importlib
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

from striped_hf.import_hook import after_import

if TYPE_CHECKING:
    from types import ModuleType

    from striped_hf.optim import LayerwiseStripedAdamW, StripedAdamW
    from striped_hf.trainer import optimizer_cls_and_kwargs

__all__ = ["LayerwiseStripedAdamW", "StripedAdamW", "__version__", "optimizer_cls_and_kwargs"]
__version__ = "0.1.0"

_MODULES = {
    "LayerwiseStripedAdamW": "striped_hf.optim",
    "StripedAdamW": "striped_hf.optim",
    "optimizer_cls_and_kwargs": "striped_hf.trainer",
}


def __getattr__(name: str) -> Any:
    """Imports what the package exports, and its subpackages, when they are first used."""
    if name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
        globals()[name] = value
        return value
    if name in ("optim", "trainer"):
        return importlib.import_module(f"striped_hf.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, "optim", "trainer"})


def _call_registration(function: str, module: "ModuleType") -> None:
    """Calls a function of ``trainer/registration.py``; a failure must not break transformers."""
    try:
        registration = importlib.import_module("striped_hf.trainer.registration")
    except Exception as error:
        warnings.warn(
            "striped_hf cannot add its optimizers' names to transformers, because its own import "
            f"failed: {type(error).__name__}: {error}",
            stacklevel=2,
        )
        return
    getattr(registration, function)(module)


after_import("transformers.training_args", partial(_call_registration, "add_names"))
after_import("transformers.trainer", partial(_call_registration, "extend_trainer"))
