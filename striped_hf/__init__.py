"""AdamW at a fraction of its optimizer memory, for ``transformers.Trainer``.

Importing the package makes ``striped_adamw``, ``striped_adamw_8bit``, ``striped_adamw_4bit`` and
the same with ``_layerwise`` valid for ``TrainingArguments.optim``, whether transformers is imported
before or after it. The import itself loads neither torch nor transformers: ``StripedAdamW`` loads
torch when it is first used, and the names wait for transformers.
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


def _extend(file: str, function: str, module: "ModuleType") -> None:
    """Calls a function of a file in ``trainer/``; a failure must not break the module's import."""
    try:
        extension = importlib.import_module(f"striped_hf.trainer.{file}")
    except Exception as error:
        warnings.warn(
            "striped_hf cannot add its optimizers to transformers and accelerate, because its own "
            f"import failed: {type(error).__name__}: {error}",
            stacklevel=2,
        )
        return
    getattr(extension, function)(module)


after_import("transformers.training_args", partial(_extend, "registration", "add_names"))
after_import("transformers.trainer", partial(_extend, "registration", "extend_trainer"))
after_import("accelerate.accelerator", partial(_extend, "layerwise", "extend_accelerator"))
