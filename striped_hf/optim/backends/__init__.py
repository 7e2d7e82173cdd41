"""The choice of a backend. ``interface.Backend`` describes backends."""

import logging
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

from striped_hf.optim.backends import reference
from striped_hf.optim.interface import Backend

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "cpu", "triton")

_FASTEST = {"cpu": "cpu", "cuda": "triton"}  # by device type; other types get the reference


def _import_cpu() -> ModuleType:
    import striped_hf.optim.backends.cpu as backend

    return backend


def _import_triton() -> ModuleType:
    import striped_hf.optim.backends.triton.backend as backend

    return backend


# each raises ImportError, with the reason, if its backend cannot run
_IMPORTS: dict[str, Callable[[], ModuleType]] = {"cpu": _import_cpu, "triton": _import_triton}


def check(backend: str) -> None:
    """Raises ValueError unless ``backend`` is the name of a backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown: pass one of {', '.join(BACKENDS)}")


def new(backend: str, device_type: str) -> Backend:
    """Returns a backend for one optimizer: it may keep data between the optimizer's steps.

    The arguments and errors are those of ``resolve``.
    """
    module: Any = resolve(backend, device_type)
    return module.new() if hasattr(module, "new") else module


@cache  # so that it logs its choice once
def resolve(backend: str, device_type: str) -> ModuleType:
    """Returns the module of the backend that steps parameters on one type of device.

    Args:
        backend: One of ``BACKENDS``.
        device_type: ``torch.device.type`` of the parameters.

    Raises:
        RuntimeError: The backend has a name other than "auto" and cannot run here. Only "auto"
            falls back.
    """
    name = _FASTEST.get(device_type, "reference") if backend == "auto" else backend
    if name == "reference":
        return reference
    try:
        module = _IMPORTS[name]()
        if device_type not in module.DEVICE_TYPES:
            raise ImportError(f"it steps parameters on {' or '.join(module.DEVICE_TYPES)} only")
    except ImportError as error:
        if backend != "auto":
            raise RuntimeError(
                f"backend={backend!r} cannot step parameters on {device_type} here ({error}): "
                "fix that, or pass backend='auto', which chooses the fastest backend that can run"
            ) from error
        logger.warning(
            "StripedAdamW: the %s backend cannot run (%s); parameters on %s are stepped in "
            "plain PyTorch, several times slower",
            *(name, error, device_type),
        )
        return reference
    logger.info("StripedAdamW: parameters on %s are stepped by %s", device_type, name)
    return module
