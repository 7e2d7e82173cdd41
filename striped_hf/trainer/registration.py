"""The optimizers' names in transformers, and the public way, which needs no names.

This is the only file that reaches into transformers' internals. Two places know optimizers by
name, in every version from 4.57 to 5.23:

- the enum ``OptimizerNames`` in ``transformers.training_args``: ``TrainingArguments`` converts
  ``optim`` to a member, ``HfArgumentParser`` offers the values as choices when it is built, and
  ``training_args.bin`` calls the enum when it is unpickled. Only its private maps let it grow.
- ``Trainer.get_optimizer_cls_and_kwargs(args, model)``, a static method that turns the name into a
  class and its arguments. It uses an if-chain up to transformers 5.1 and a private table of
  handlers since then. Wrapping the method serves both. The wrapper also reads ``optim_args``
  before transformers splits it, which loses duplicates and fails without a message on a missing
  "=".

``striped_hf/__init__.py`` calls ``add_names`` and ``extend_trainer`` when the import of each of
the two modules has finished. This file therefore imports nothing from transformers.
"""

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from enum import EnumMeta
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn

from striped_hf.optim import StripedAdamW
from striped_hf.optim.backends import BACKENDS
from striped_hf.optim.momentum import MOMENTUM_DTYPES
from striped_hf.trainer.param_groups import param_groups

if TYPE_CHECKING:
    from transformers import TrainingArguments

# the names, after the way transformers names its own, and the momentum's format of each
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
# what does not belong into optim_args, and where it does
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
    "blocks": "it belongs to each param group, where striped_hf sets it for the packed projections "
    "that it knows; for blocks of your own pass Trainer(optimizer_cls_and_kwargs=(StripedAdamW, "
    "{'params': groups, ...}))",
}


def add_names(training_args: ModuleType) -> None:
    """Adds the names in ``OPTIMIZERS`` to ``transformers.training_args``; idempotent.

    Where transformers' internals are not as this file expects, it warns, and the names raise when
    they are used. An import must not fail for it: ``StripedAdamW`` and
    ``optimizer_cls_and_kwargs`` do not depend on the internals.
    """
    try:
        for value in OPTIMIZERS:
            _add_member(training_args.OptimizerNames, value.upper(), value)
    except Exception as error:  # whatever a change in private parts leads to
        _give_up(training_args, error)


def extend_trainer(trainer: ModuleType) -> None:
    """Makes ``transformers.trainer.Trainer`` build the optimizers in ``OPTIMIZERS``; idempotent.

    It fails as ``add_names`` does.
    """
    try:
        _wrap_trainer(trainer.Trainer)
    except Exception as error:
        _give_up(sys.modules.get("transformers.training_args"), error)


def optimizer_cls_and_kwargs(
    args: "TrainingArguments", model: nn.Module | None = None
) -> tuple[type[StripedAdamW], dict[str, Any]]:
    """Returns what ``Trainer(optimizer_cls_and_kwargs=...)`` takes; nothing is patched for it.

    Use it where the names cannot be used, and where ``args.optim`` is to stay as it is. With
    ``Trainer(model_init=...)`` use the names: this needs the very model that Trainer trains.

    Args:
        args: ``learning_rate``, ``adam_beta1``, ``adam_beta2``, ``adam_epsilon`` and
            ``weight_decay`` are used. ``optim`` decides the momentum's format where it is one of
            this package's names (another one means float32), ``optim_args`` overrides it:
            comma-separated ``key=value`` with the keys ``momentum_dtype``, ``backend``,
            ``maximize``, ``nesterov``, ``lagged`` and ``stochastic_rounding``.
        model: The model to train. Its param groups are made when the optimizer is, so it may
            still be frozen in part, resized or given adapters after this call. Without it
            there are no ``params`` in the answer, and Trainer groups by weight decay only.

    Returns:
        ``StripedAdamW`` and its keyword arguments.

    Raises:
        ValueError: ``optim_args`` has an unknown or repeated key, or a value that it cannot have.
    """
    kwargs = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
        "momentum_dtype": OPTIMIZERS.get(args.optim, "float32"),
        **_parse_optim_args(args.optim_args),
    }
    if model is not None:
        kwargs = _WithParams(kwargs, _ParamGroups(model, args.weight_decay))
    return StripedAdamW, kwargs


class _ParamGroups:
    """The param groups of a model, as it is when they are read."""

    def __init__(self, model: nn.Module, weight_decay: float) -> None:
        self._model = model
        self._weight_decay = weight_decay

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(param_groups(self._model, self._weight_decay))


class _WithParams(dict[str, Any]):
    """Keyword arguments whose ``params`` come back after Trainer has popped them.

    Trainer pops them to pass them by position. It may do so twice, as when one answer of
    ``optimizer_cls_and_kwargs`` is given to two trainers, and would then go on without the groups
    and not say so.
    """

    def __init__(self, kwargs: dict[str, Any], params: _ParamGroups) -> None:
        super().__init__(kwargs, params=params)
        self._params = params

    def __contains__(self, key: object) -> bool:
        return key == "params" or super().__contains__(key)

    def pop(self, key: str, *default: Any) -> Any:
        if key == "params":
            super().pop(key, None)
            return self._params
        return super().pop(key, *default)


def _parse_optim_args(optim_args: str | None) -> dict[str, Any]:
    """Parses ``TrainingArguments.optim_args``, accepting only what means something."""
    parsed: dict[str, Any] = {}
    if not optim_args:
        return parsed
    if not isinstance(optim_args, str):
        raise ValueError(f"optim_args={optim_args!r} is no string: pass 'key=value,key=value'")
    for item in optim_args.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key in _ELSEWHERE:
            raise ValueError(f"optim_args={optim_args!r} must not set {key}: {_ELSEWHERE[key]}")
        if not equals:
            raise ValueError(
                f"optim_args={optim_args!r} has {item.strip()!r}, which is no key=value: pass "
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


def _wrap_trainer(trainer: type) -> None:
    current = vars(trainer)["get_optimizer_cls_and_kwargs"]
    if not isinstance(current, staticmethod):
        raise TypeError("Trainer.get_optimizer_cls_and_kwargs is no static method")
    function: Callable[..., Any] = current.__func__
    # on importlib.reload, replace the wrapper of before instead of wrapping it
    original = getattr(function, "_striped_hf_wraps", function)

    @functools.wraps(original)
    def get_optimizer_cls_and_kwargs(
        args: "TrainingArguments", model: nn.Module | None = None, *rest: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        if args.optim in OPTIMIZERS:
            return optimizer_cls_and_kwargs(args, model)
        return original(args, model, *rest, **kwargs)

    get_optimizer_cls_and_kwargs._striped_hf_wraps = original  # type: ignore[attr-defined]
    trainer.get_optimizer_cls_and_kwargs = staticmethod(  # type: ignore[attr-defined]
        get_optimizer_cls_and_kwargs
    )


def _add_member(enum: EnumMeta, name: str, value: str) -> None:
    """Adds a member to an enum of strings, as its class statement would have.

    An enum cannot be subclassed once it has members. The private names below are the same in
    Python 3.10 to 3.13, but for what is marked.
    """
    if value in enum._value2member_map_:
        return
    member: Any = str.__new__(enum, value)  # type: ignore[arg-type]
    member._name_ = name
    member._value_ = value
    member.__objclass__ = enum
    member._sort_order_ = len(enum._member_names_)  # 3.11 and later
    setattr(enum, name, member)  # before the maps: the metaclass refuses to rebind a member
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[value] = member
    if hasattr(enum, "_hashable_values_"):  # 3.13.1 and later
        enum._hashable_values_.append(value)
    if enum(value) is not member or member not in list(enum):  # type: ignore[call-overload]
        raise TypeError(f"{enum.__name__} did not take the member {name}")


def _give_up(training_args: ModuleType | None, error: Exception) -> None:
    """Warns, and makes the names raise the same message."""
    from transformers import __version__

    message = (
        f"striped_hf cannot add {', '.join(OPTIMIZERS)} to transformers {__version__}, whose "
        f"internals differ from those it knows ({type(error).__name__}: {error}): pass "
        "Trainer(optimizer_cls_and_kwargs=striped_hf.optimizer_cls_and_kwargs(args, model)) "
        "instead, the public way, which needs none of them"
    )
    warnings.warn(message, stacklevel=2)
    # without the enum no name can be used by mistake
    with contextlib.suppress(AttributeError, TypeError):
        _refuse_names(training_args.OptimizerNames, message)  # type: ignore[union-attr]


def _refuse_names(enum: Any, message: str) -> None:
    """Makes our names raise ``message``, by the hook that enums have for unknown values."""
    for value in OPTIMIZERS:
        member = enum._value2member_map_.pop(value, None)
        if member is not None:
            enum._member_names_.remove(member.name)
            del enum._member_map_[member.name]
            delattr(enum, member.name)
            if hasattr(enum, "_hashable_values_"):
                enum._hashable_values_.remove(value)
    missing = enum._missing_

    def _missing_(cls: type, value: object) -> Any:
        if value in OPTIMIZERS:
            raise ValueError(message)
        return missing(value)

    enum._missing_ = classmethod(_missing_)
