"""LayerwiseStripedAdamW under accelerate, and so in Trainer, in TRL and in users' own loops.

This is the only file that reaches into accelerate. Programs clip gradients by
``Accelerator.clip_grad_norm_``, between the backward pass and the step, when a layerwise optimizer
has only a few gradients left. Four methods of ``Accelerator`` are wrapped. For all other optimizers
they do what they did.

- ``prepare`` refuses setups that cannot work, and hooks the parameters of a model that it sharded.
- ``backward`` hooks parameters that were replaced since then.
- ``clip_grad_norm_`` makes the optimizer clip, and returns the norm of all gradients.
- ``clip_grad_value_`` is refused.

``striped_hf/__init__.py`` calls ``extend_accelerator`` when the import of
``accelerate.accelerator`` has finished. This file therefore imports nothing from accelerate.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from striped_hf.optim import LayerwiseStripedAdamW

if TYPE_CHECKING:
    from transformers import TrainingArguments

Method = Callable[..., Any]

_FP16 = (
    "a layerwise optimizer cannot train in float16, because loss scaling needs the gradients at "
    "the step: train in bfloat16 (bf16=True, mixed_precision='bf16'), or use StripedAdamW"
)
# by the names of accelerate's DistributedType
_DISTRIBUTED = {
    "DEEPSPEED": "DeepSpeed, which reduces and frees the gradients itself",
    "MEGATRON_LM": "Megatron-LM, which reduces and frees the gradients itself",
    "XLA": "XLA, which reduces the gradients after the backward pass",
    "FSDP": "FSDP1 (FullyShardedDataParallel), which flattens the parameters",
}


def extend_accelerator(accelerator: ModuleType) -> None:
    """Makes ``accelerate.accelerator.Accelerator`` train with layerwise optimizers; idempotent.

    If accelerate's internals are not as this file expects, the function warns. It raises nothing,
    because other optimizers do not need it.
    """
    try:
        for name, wrap in _WRAPPERS.items():
            _replace(accelerator.Accelerator, name, wrap)
    except Exception as error:  # a change of private parts may raise anything
        _give_up(f"{type(error).__name__}: {error}")


def check_arguments(args: "TrainingArguments") -> None:
    """Raises ValueError for arguments that no layerwise optimizer can train with."""
    if args.fp16:
        raise ValueError(f"fp16=True: {_FP16}")
    if args.deepspeed:
        raise ValueError(f"deepspeed={args.deepspeed!r}: {_refusal('DEEPSPEED')}")


# -------------------------------------------------------------------------------------------------
# the wrappers
# -------------------------------------------------------------------------------------------------


def _wrap_prepare(original: Method) -> Method:
    @functools.wraps(original)
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = [arg for arg in args if isinstance(arg, torch.optim.Optimizer)]
        optimizers = layerwise_among(given)
        for optimizer in optimizers:
            _check_accelerator(self)
            optimizer.zero_grad()  # a run may have failed in a backward pass, and begin again
            if self.gradient_accumulation_steps > 1:
                optimizer.gradient_accumulation = True
        prepared = original(self, *args, **kwargs)
        for optimizer in optimizers:
            optimizer.attach_hooks()
            if optimizer not in _layerwise_of(self):
                _give_up("Accelerator._optimizers does not have the optimizer after prepare()")
        return prepared

    return prepare


def _wrap_backward(original: Method) -> Method:
    @functools.wraps(original)
    def backward(self: Any, *args: Any, **kwargs: Any) -> Any:
        for optimizer in _layerwise_of(self):
            optimizer.attach_hooks()
        return original(self, *args, **kwargs)

    return backward


def _wrap_clip_grad_norm(original: Method) -> Method:
    @functools.wraps(original)
    def clip_grad_norm_(
        self: Any, parameters: Any, max_norm: Any, norm_type: Any = 2, *args: Any, **kwargs: Any
    ) -> Any:
        parameters = _listed(parameters)
        optimizer = _optimizer_of(self, parameters)
        if optimizer is None:
            return original(self, parameters, max_norm, norm_type, *args, **kwargs)
        if norm_type != 2:
            raise ValueError(
                f"norm_type={norm_type!r}: a layerwise optimizer knows only the norm of type 2 of "
                "gradients that are gone: pass norm_type=2, or use StripedAdamW"
            )
        if max_norm == math.inf:  # Trainer's way to ask for the norm
            optimizer.max_grad_norm = None
        else:
            _check_all_given(optimizer, parameters)
            optimizer.max_grad_norm = float(max_norm)
        return optimizer.grad_norm()

    return clip_grad_norm_


def _wrap_clip_grad_value(original: Method) -> Method:
    @functools.wraps(original)
    def clip_grad_value_(self: Any, parameters: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = _listed(parameters)
        if _optimizer_of(self, parameters) is None:
            return original(self, parameters, *args, **kwargs)
        raise ValueError(
            "clip_grad_value_ cannot clip the gradients of a layerwise optimizer, which are gone: "
            "call clip_grad_norm_, or use StripedAdamW"
        )

    return clip_grad_value_


_WRAPPERS = {
    "prepare": _wrap_prepare,
    "backward": _wrap_backward,
    "clip_grad_norm_": _wrap_clip_grad_norm,
    "clip_grad_value_": _wrap_clip_grad_value,
}


def _replace(accelerator: type, name: str, wrap: Callable[[Method], Method]) -> None:
    """Wraps a method. A second call replaces the first wrapper instead of wrapping it."""
    current = vars(accelerator)[name]
    original = getattr(current, "_striped_hf_wraps", current)
    wrapper = wrap(original)
    wrapper._striped_hf_wraps = original  # type: ignore[attr-defined]
    setattr(accelerator, name, wrapper)


# -------------------------------------------------------------------------------------------------
# an accelerator and its optimizers
# -------------------------------------------------------------------------------------------------


def _check_accelerator(accelerator: Any) -> None:
    """Raises ValueError if no layerwise optimizer can train under the accelerator."""
    distributed = accelerator.distributed_type.value
    if distributed in _DISTRIBUTED and not getattr(accelerator, "is_fsdp2", False):
        raise ValueError(f"distributed_type={distributed}: {_refusal(distributed)}")
    if accelerator.scaler is not None:
        raise ValueError(f"mixed_precision='fp16': {_FP16}")


def _refusal(distributed: str) -> str:
    return (
        f"a layerwise optimizer cannot train under {_DISTRIBUTED[distributed]}: use FSDP2 "
        "(fsdp_version: 2 in accelerate's config), or StripedAdamW where it can be used"
    )


def _layerwise_of(accelerator: Any) -> list[LayerwiseStripedAdamW]:
    return layerwise_among(getattr(accelerator, "_optimizers", ()))


def layerwise_among(optimizers: Iterable[Any]) -> list[LayerwiseStripedAdamW]:
    """Returns the layerwise optimizers among optimizers, without accelerate's wrappers."""
    found = []
    for optimizer in optimizers:
        # accelerate has it in an attribute of its own optimizer
        while not isinstance(optimizer, LayerwiseStripedAdamW) and hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        if isinstance(optimizer, LayerwiseStripedAdamW):
            found.append(optimizer)
    return found


def _listed(parameters: Any) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def _trained(optimizer: LayerwiseStripedAdamW) -> set[Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return {param for param in params if param.requires_grad}


def _optimizer_of(accelerator: Any, parameters: list[Tensor]) -> LayerwiseStripedAdamW | None:
    """Returns the layerwise optimizer that trains some of the parameters; None: there is none.

    Raises:
        ValueError: Parameters that the optimizer does not train have a gradient.
    """
    for optimizer in _layerwise_of(accelerator):
        trained = _trained(optimizer)
        if trained.isdisjoint(parameters):
            continue
        others = [p for p in parameters if p.grad is not None and p not in trained]
        if others:
            raise ValueError(
                f"{len(others)} of the {len(parameters)} parameters have a gradient, but are not "
                "trained by the layerwise optimizer that trains the others: freeze them "
                "(requires_grad_(False)), or clip the parameters of each optimizer on their own"
            )
        return optimizer
    return None


def _check_all_given(optimizer: LayerwiseStripedAdamW, parameters: list[Tensor]) -> None:
    trained = _trained(optimizer)
    missing = trained.difference(parameters)
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(trained)} parameters of a layerwise optimizer are not "
            "among those to clip: it clips by the norm of all its gradients, so pass all of its "
            "parameters, do not clip (max_grad_norm=0 in TrainingArguments), or use StripedAdamW"
        )


def _give_up(reason: str) -> None:
    from accelerate import __version__

    warnings.warn(
        f"striped_hf does not know the internals of accelerate {__version__} ({reason}). Of its "
        "optimizers only the layerwise ones need them: construct LayerwiseStripedAdamW with "
        "max_grad_norm, and do not call accelerator.clip_grad_norm_. In Trainer set "
        "max_grad_norm=0 in TrainingArguments, and pass optimizer_cls_and_kwargs="
        "(LayerwiseStripedAdamW, {'max_grad_norm': 1.0, ...})",
        stacklevel=2,
    )
