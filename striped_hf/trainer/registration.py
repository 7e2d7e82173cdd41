"""The optimizers' names in transformers.

This is the only file that reaches into transformers' internals; ``layerwise.py`` is the one for
accelerate's. Two places know optimizers by
name, in every version from 4.57 to 5.23:

- the enum ``OptimizerNames`` in ``transformers.training_args``: ``TrainingArguments`` converts
  ``optim`` to a member, ``HfArgumentParser`` offers the values as choices when it is built, and
  ``training_args.bin`` calls the enum when it is unpickled. New members go into its private maps.
- ``Trainer.get_optimizer_cls_and_kwargs(args, model)``, a static method that turns the name into a
  class and its arguments. It uses an if-chain up to transformers 5.1 and a private table of
  handlers since then. A wrapper of the method works with both. The wrapper also parses
  ``optim_args`` itself: transformers' parser loses duplicates, and fails without a message on a
  missing "=". The wrapper marks the model's packed projections. Trainer and its subclasses build
  the param groups as for AdamW.

``Trainer.create_optimizer`` is wrapped, too. This wrapper marks the packed projections of the
trained model. It does so with ``Trainer(optimizer_cls_and_kwargs=...)``, too.

``striped_hf/__init__.py`` calls ``add_names`` and ``extend_trainer`` when the import of each of
the two modules has finished. This file therefore imports nothing from transformers.
"""

import contextlib
import functools
import sys
import warnings
from enum import EnumMeta
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn

from striped_hf.optim import StripedAdamW
from striped_hf.trainer.optimizer_kwargs import OPTIMIZERS, optimizer_cls_and_kwargs
from striped_hf.trainer.param_groups import mark_matrices

if TYPE_CHECKING:
    from transformers import TrainingArguments


def add_names(training_args: ModuleType) -> None:
    """Adds the names in ``OPTIMIZERS`` to ``transformers.training_args``; idempotent.

    If transformers' internals are not as this file expects, the function warns, and the names
    raise when they are used. It raises nothing itself, because ``StripedAdamW`` and
    ``optimizer_cls_and_kwargs`` work without the internals.
    """
    try:
        for value in OPTIMIZERS:
            _add_member(training_args.OptimizerNames, value.upper(), value)
    except Exception as error:  # a change of private parts may raise anything
        _give_up(training_args, error)


def extend_trainer(trainer: ModuleType) -> None:
    """Makes ``transformers.trainer.Trainer`` build the optimizers in ``OPTIMIZERS``; idempotent.

    It reports unexpected internals as ``add_names`` does.
    """
    try:
        _wrap_trainer(trainer.Trainer)
    except Exception as error:
        _give_up(sys.modules.get("transformers.training_args"), error)


def _wrap_trainer(trainer: Any) -> None:
    current = vars(trainer)["get_optimizer_cls_and_kwargs"]
    if not isinstance(current, staticmethod):
        raise TypeError("Trainer.get_optimizer_cls_and_kwargs is not a static method")
    # a second call replaces the first wrapper instead of wrapping it
    get_original = getattr(current.__func__, "_striped_hf_wraps", current.__func__)
    create_original = trainer.create_optimizer
    create_original = getattr(create_original, "_striped_hf_wraps", create_original)

    @functools.wraps(get_original)
    def get_optimizer_cls_and_kwargs(
        args: "TrainingArguments", model: nn.Module | None = None, *rest: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        if args.optim not in OPTIMIZERS:
            return get_original(args, model, *rest, **kwargs)
        optimizer_cls, optimizer_kwargs = optimizer_cls_and_kwargs(args, model)
        # as for AdamW: a group without a decay gets the optimizer's default
        del optimizer_kwargs["weight_decay"]
        return optimizer_cls, optimizer_kwargs

    @functools.wraps(create_original)
    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = self.optimizer_cls_and_kwargs
        if self.args.optim in OPTIMIZERS or (given is not None and _is_ours(given[0])):
            # the call of the method above may have had no model, or the model has changed since
            mark_matrices(self.model)
        return create_original(self, *args, **kwargs)

    get_optimizer_cls_and_kwargs._striped_hf_wraps = get_original  # type: ignore[attr-defined]
    create_optimizer._striped_hf_wraps = create_original  # type: ignore[attr-defined]
    trainer.get_optimizer_cls_and_kwargs = staticmethod(get_optimizer_cls_and_kwargs)
    trainer.create_optimizer = create_optimizer


def _is_ours(optimizer_cls: Any) -> bool:
    return isinstance(optimizer_cls, type) and issubclass(optimizer_cls, StripedAdamW)


def _add_member(enum: EnumMeta, name: str, value: str) -> None:
    """Adds a member to an enum of strings, as its class statement would have.

    An enum with members cannot be subclassed. The private names below are the same in Python 3.10
    to 3.13, except the two that are marked.
    """
    if value in enum._value2member_map_:
        return
    member: Any = str.__new__(enum, value)  # type: ignore[arg-type]
    member._name_ = name
    member._value_ = value
    member.__objclass__ = enum
    member._sort_order_ = len(enum._member_names_)  # 3.11 and later
    # before the maps: the metaclass forbids the assignment of an existing member
    setattr(enum, name, member)
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[value] = member
    if hasattr(enum, "_hashable_values_"):  # 3.13.1 and later
        enum._hashable_values_.append(value)
    if enum(value) is not member or member not in list(enum):  # type: ignore[call-overload]
        raise TypeError(f"{enum.__name__} did not accept the member {name}")


def _give_up(training_args: ModuleType | None, error: Exception) -> None:
    """Warns, and makes the names raise the same message."""
    from transformers import __version__

    message = (
        f"striped_hf cannot add {', '.join(OPTIMIZERS)} to transformers {__version__}, whose "
        f"internals differ from the known versions ({type(error).__name__}: {error}): pass "
        "Trainer(optimizer_cls_and_kwargs=striped_hf.optimizer_cls_and_kwargs(args, model)) "
        "instead, which is public and needs no internals"
    )
    warnings.warn(message, stacklevel=2)
    # if there is no enum, transformers accepts no name anyway
    with contextlib.suppress(AttributeError, TypeError):
        _refuse_names(training_args.OptimizerNames, message)  # type: ignore[union-attr]


def _refuse_names(enum: Any, message: str) -> None:
    """Makes our names raise ``message``, with the enum's hook for unknown values."""
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
