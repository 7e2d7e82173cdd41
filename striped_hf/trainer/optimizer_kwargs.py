"""Makes the keyword arguments of ``StripedAdamW`` from ``TrainingArguments`` and a model."""

from typing import TYPE_CHECKING, Any

from torch import nn

from striped_hf.optim import StripedAdamW
from striped_hf.optim.backends import BACKENDS
from striped_hf.optim.momentum import MOMENTUM_DTYPES
from striped_hf.trainer.param_groups import mark_matrices

if TYPE_CHECKING:
    from transformers import TrainingArguments

# the names, in the style of transformers' names, and the momentum format of each
OPTIMIZERS = {
    "striped_adamw": "float32",
    "striped_adamw_8bit": "int8",
    "striped_adamw_4bit": "int4",
}

_BOOLEANS: dict[str, bool | None] = {"true": True, "false": False}
_OPTIM_ARGS: dict[str, dict[str, Any]] = {
    "momentum_dtype": {name: name for name in MOMENTUM_DTYPES},
    "backend": {name: name for name in BACKENDS},
    "maximize": _BOOLEANS,
    "nesterov": _BOOLEANS,
    "lagged": _BOOLEANS,
    "stochastic_rounding": {**_BOOLEANS, "none": None},
}
# the keys that optim_args must not set, and where to set them
_ELSEWHERE = {
    "lr": "set TrainingArguments.learning_rate",
    "learning_rate": "set TrainingArguments.learning_rate",
    "betas": "set TrainingArguments.adam_beta1 and adam_beta2",
    "beta1": "set TrainingArguments.adam_beta1",
    "beta2": "set TrainingArguments.adam_beta2",
    "adam_beta1": "set TrainingArguments.adam_beta1",
    "adam_beta2": "set TrainingArguments.adam_beta2",
    "eps": "set TrainingArguments.adam_epsilon",
    "adam_epsilon": "set TrainingArguments.adam_epsilon",
    "weight_decay": "set TrainingArguments.weight_decay",
    "blocks": "it is a key of a param group, and striped_hf sets it for the packed projections "
    "that it knows; to set it yourself pass Trainer(optimizer_cls_and_kwargs=(StripedAdamW, "
    "{'params': groups, ...}))",
}


def optimizer_cls_and_kwargs(
    args: "TrainingArguments", model: nn.Module | None = None
) -> tuple[type[StripedAdamW], dict[str, Any]]:
    """Returns the value for ``Trainer(optimizer_cls_and_kwargs=...)``, which needs no names.

    Use it where the names cannot be used, or where ``args.optim`` must keep its value. Trainer
    or its subclass builds the param groups.

    Args:
        args: The function reads ``learning_rate``, ``adam_beta1``, ``adam_beta2``,
            ``adam_epsilon``, ``weight_decay``, ``optim`` and ``optim_args``. If ``optim`` is one of
            this package's names, it sets the momentum format; otherwise the format is float32.
            ``optim_args`` overrides the format. It has comma-separated ``key=value`` with the keys
            ``momentum_dtype``, ``backend``, ``maximize``, ``nesterov``, ``lagged`` and
            ``stochastic_rounding``.
        model: The model to train. The function marks its packed projections, and Trainer marks them
            again when it creates the optimizer, so that each projection has separate stripes.

    Returns:
        ``StripedAdamW`` and its keyword arguments.

    Raises:
        ValueError: ``optim_args`` has an unknown key, a repeated key or an invalid value.
    """
    if model is not None:
        mark_matrices(model)
    return StripedAdamW, {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
        "momentum_dtype": OPTIMIZERS.get(args.optim, "float32"),
        **_parse_optim_args(args.optim_args),
    }


def _parse_optim_args(optim_args: str | None) -> dict[str, Any]:
    """Parses ``TrainingArguments.optim_args`` strictly."""
    parsed: dict[str, Any] = {}
    if not optim_args:
        return parsed
    if not isinstance(optim_args, str):
        raise ValueError(f"optim_args={optim_args!r} is not a string: pass 'key=value,key=value'")
    for item in optim_args.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key in _ELSEWHERE:
            raise ValueError(f"optim_args={optim_args!r} must not set {key}: {_ELSEWHERE[key]}")
        if not equals:
            raise ValueError(
                f"optim_args={optim_args!r} has {item.strip()!r}, which is not key=value: pass "
                "'key=value,key=value'"
            )
        if key not in _OPTIM_ARGS:
            raise ValueError(
                f"optim_args={optim_args!r} has an unknown key {key!r}: pass some of "
                f"{', '.join(_OPTIM_ARGS)}"
            )
        if key in parsed:
            raise ValueError(f"optim_args={optim_args!r} sets {key} twice: pass it once")
        accepted = _OPTIM_ARGS[key]
        value = value.lower() if True in accepted.values() else value
        if value not in accepted:
            raise ValueError(
                f"optim_args={optim_args!r} has {key}={value!r}: pass {key}= one of "
                f"{', '.join(accepted)}"
            )
        parsed[key] = accepted[value]
    return parsed
