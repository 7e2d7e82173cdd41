"""The choice of a backend: a module with the two functions of ``reference.py``."""

import importlib
import logging
from functools import cache
from types import ModuleType

from striped_hf.optim.backends import reference

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "cpu", "triton")

# Importing one raises ImportError where it cannot run, with the reason.
_MODULES = {
    "cpu": "striped_hf.optim.backends.cpu",
    "triton": "striped_hf.optim.backends.triton.launch",
}
_FASTEST = {"cpu": "cpu", "cuda": "triton"}


def check(backend: str) -> None:
    """Raises ValueError unless ``backend`` is the name of one."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown: pass one of {', '.join(BACKENDS)}")


@cache  # so that it says once what it chose
def resolve(backend: str, device_type: str) -> ModuleType:
    """Returns the module that computes the step of parameters on one kind of device.

    Args:
        backend: One of ``BACKENDS``.
        device_type: Of the parameters, as ``torch.device.type``.

    Raises:
        RuntimeError: A backend was asked for by name and cannot run here; only "auto" falls back.
    """
    name = _FASTEST.get(device_type, "reference") if backend == "auto" else backend
    if name != "reference":
        try:
            module = importlib.import_module(_MODULES[name])
            if device_type not in module.DEVICE_TYPES:
                raise ImportError(f"it steps parameters on {' or '.join(module.DEVICE_TYPES)} only")
        except ImportError as error:
            if backend != "auto":
                raise RuntimeError(
                    f"backend={backend!r} cannot step parameters on {device_type} here ({error}): "
                    "mend that, or pass backend='auto', which takes the fastest that can run"
                ) from error
            logger.warning(
                "StripedAdamW: the %s backend cannot run (%s); parameters on %s are stepped in "
                "plain PyTorch, several times slower",
                *(name, error, device_type),
            )
        else:
            logger.info("StripedAdamW: parameters on %s are stepped by %s", device_type, name)
            return module
    return reference
