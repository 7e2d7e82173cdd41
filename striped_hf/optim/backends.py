"""The choice of a backend: a module with the two functions of ``reference.py``."""

import logging
from functools import cache
from types import ModuleType

from striped_hf.optim import reference

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "cpu", "triton")


def check(backend: str) -> None:
    """Raises ValueError unless ``backend`` is the name of one."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown: pass one of {', '.join(BACKENDS)}")


@cache  # so that it says once what it chose
def resolve(backend: str) -> ModuleType:
    """Returns the module that computes the step.

    Raises:
        RuntimeError: A backend was asked for by name and cannot run here; only "auto" falls back.
    """
    if backend in ("cpu", "triton"):
        raise RuntimeError(
            f"backend={backend!r} is not part of this version: pass 'auto' or 'reference'"
        )
    logger.info("StripedAdamW: backend=%r computes with plain PyTorch (reference)", backend)
    return reference
