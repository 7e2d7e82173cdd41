"""Makes an optimizer class and its arguments from ``TrainingArguments`` and a model."""

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from striped_hf.optim import LayerwiseStripedAdamW, StripedAdamW
from striped_hf.optim.backends import BACKENDS
from striped_hf.optim.layerwise.optimizer import check_layerwise
from striped_hf.optim.momentum import MOMENTUM_DTYPES
from striped_hf.trainer.layerwise import check_arguments
from striped_hf.trainer.param_groups import mark_matrices

if TYPE_CHECKING:
    from transformers import TrainingArguments


class Choice(NamedTuple):
    """The optimizer of a name."""

    cls: type[StripedAdamW]
    momentum_dtype: str


# the names, in the style of transformers' names
OPTIMIZERS = {
    "striped_adamw": Choice(StripedAdamW, "float32"),
    "striped_adamw_8bit": Choice(StripedAdamW, "int8"),
    "striped_adamw_4bit": Choice(StripedAdamW, "int4"),
    "striped_adamw_layerwise": Choice(LayerwiseStripedAdamW, "float32"),
    "striped_adamw_8bit_layerwise": Choice(LayerwiseStripedAdamW, "int8"),
    "striped_adamw_4bit_layerwise": Choice(LayerwiseStripedAdamW, "int4"),
}

_BOOLEANS: dict[str, bool | None] = {"true": True, "false": False}
_OPTIM_ARGS: dict[str, dict[str, Any]] = {
    "momentum_dtype": {name: name for name in MOMENTUM_DTYPES},
    "backend": {name: name for name in BACKENDS},
    "maximize": _BOOLEANS,
    "nesterov": _BOOLEANS,
    "lagged": _BOOLEANS,
    "stochastic_rounding": {**_BOOLEANS, "none": None},
    "master_bits": {"none": None, "24": 24},
}
# the keys that only layerwise optimizers have
_LAYERWISE_OPTIM_ARGS: dict[str, dict[str, Any]] = {"gradient_accumulation": _BOOLEANS}
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
            this package's names, it sets the class and the momentum format; otherwise they are
            ``StripedAdamW`` and float32. ``optim_args`` overrides the format. It has
            comma-separated ``key=value`` with the keys ``momentum_dtype``, ``backend``,
            ``maximize``, ``nesterov``, ``lagged``, ``stochastic_rounding`` and ``master_bits``. For
            layerwise optimizers the function also reads ``max_grad_norm`` and
            ``gradient_accumulation_steps``, and ``optim_args`` has one more key,
            ``gradient_accumulation``, for a Trainer with several backward passes per step.
        model: The model to train. The function marks its packed projections, and Trainer marks them
            again when it creates the optimizer, so that each projection has separate stripes.

    Returns:
        The class and its keyword arguments.

    Raises:
        ValueError: ``optim_args`` has an unknown key, a repeated key or an invalid value; or the
            optimizer is layerwise, and ``nesterov``, ``lagged``, ``fp16`` or ``deepspeed`` is set.
    """
    if model is not None:
        mark_matrices(model)
    choice = OPTIMIZERS.get(args.optim, OPTIMIZERS["striped_adamw"])
    kwargs: dict[str, Any] = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
        "momentum_dtype": choice.momentum_dtype,
    }
    if choice.cls is not LayerwiseStripedAdamW:
        return choice.cls, kwargs | _parse_optim_args(args.optim_args, _OPTIM_ARGS)
    check_arguments(args)
    # Trainer does not clip if it is 0 or None
    kwargs["max_grad_norm"] = args.max_grad_norm or None
    kwargs["gradient_accumulation"] = args.gradient_accumulation_steps > 1
    kwargs |= _parse_optim_args(args.optim_args, _OPTIM_ARGS | _LAYERWISE_OPTIM_ARGS)
    check_layerwise(kwargs)
    return choice.cls, kwargs


def _parse_optim_args(
    optim_args: str | None, accepted: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Parses ``TrainingArguments.optim_args`` strictly, by the values that each key accepts."""
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
        if key not in accepted:
            raise ValueError(
                f"optim_args={optim_args!r} has an unknown key {key!r}: pass some of "
                f"{', '.join(accepted)}"
            )
        if key in parsed:
            raise ValueError(f"optim_args={optim_args!r} sets {key} twice: pass it once")
        values = accepted[key]
        value = value.lower() if True in values.values() else value
        if value not in values:
            raise ValueError(
                f"optim_args={optim_args!r} has {key}={value!r}: pass {key}= one of "
                f"{', '.join(values)}"
            )
        parsed[key] = values[value]
    return parsed
