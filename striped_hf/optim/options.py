"""The options of a param group: their allowed values, and their form in ``Settings``.

A new option is an argument of ``StripedAdamW`` with its default, a row here, and, if a backend
needs it, a field of ``Settings``.
"""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from striped_hf.optim.interface import BlocksOption, Group, Settings
from striped_hf.optim.momentum import MOMENTUM_DTYPES

# the smallest eps: a step must not be 0/0 for a gradient that was always zero
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
_READINGS = ("kernel", "stack")  # for parameters of three or more dimensions: ``matrix.py``


class Option(NamedTuple):
    """An option of a param group.

    Attributes:
        check: Called with name and value; raises ValueError for a value that is not allowed.
        settings: Returns the fields of ``Settings`` for a value; None: no backend sees the option.
    """

    check: Callable[[str, Any], None]
    settings: Callable[[Any], dict[str, Any]] | None = None


def _check_lr(name: str, value: Any) -> None:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"{name}={value} is a tensor of several elements: pass a tensor with one element"
        )
    _check_number(name, value)


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, (Real, Tensor)) or not 0 <= float(value) < math.inf:
        raise ValueError(f"{name}={value!r} is out of range: pass a finite number >= 0")


def _check_betas(name: str, value: Any) -> None:
    # any sequence: YAML readers and NumPy have their own
    is_sequence = hasattr(value, "__len__") and not isinstance(value, (str, dict))
    betas = list(value) if is_sequence and len(value) == 2 else []
    if not betas or not all(isinstance(b, (Real, Tensor)) and 0 <= float(b) < 1 for b in betas):
        raise ValueError(f"{name}={value} is out of range: pass two numbers in [0, 1)")


def _check_momentum_dtype(name: str, value: Any) -> None:
    if value not in MOMENTUM_DTYPES:
        raise ValueError(f"{name}={value!r} is unknown: pass one of {', '.join(MOMENTUM_DTYPES)}")


def _check_blocks(name: str, value: Any) -> None:
    for each in value if is_list_of_blocks(value) else [value]:
        if isinstance(each, str) and each in _READINGS:
            continue
        if not _is_pair(each) or not all(isinstance(b, int) and b > 0 for b in each):
            raise ValueError(
                f"{name}={each!r} is not a pair of counts: pass two integers >= 1, or one of "
                f"{_READINGS}"
            )


def _check_one_of(*allowed: bool | None) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not a switch: pass one of {allowed}")

    return check


def _check_master_bits(name: str, value: Any) -> None:
    if value is not None and not (isinstance(value, int) and value == 24):
        raise ValueError(
            f"{name}={value!r} is unknown: pass 24, or None, which keeps no bits of a matrix "
            "beside its bfloat16 weights"
        )


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2


def is_list_of_blocks(blocks: Any) -> bool:
    """Whether a group's ``blocks`` are a list with one value for each of its parameters."""
    # the first value decides: readers ask for every parameter of a group in every step
    return isinstance(blocks, list) and all(isinstance(b, (tuple, list, str)) for b in blocks[:1])


def as_blocks(value: Any) -> BlocksOption:
    """Returns a valid value of ``blocks`` for one parameter as (br, bc), "kernel" or "stack"."""
    return value if isinstance(value, str) else tuple(value)  # type: ignore[return-value]


_check_bool = _check_one_of(True, False)

OPTIONS: dict[str, Option] = {
    "lr": Option(_check_lr, lambda lr: {"lr": lr}),
    "betas": Option(
        _check_betas, lambda betas: {"beta1": float(betas[0]), "beta2": float(betas[1])}
    ),
    "eps": Option(_check_number, lambda eps: {"eps": max(float(eps), _SMALLEST_NORMAL)}),
    "weight_decay": Option(_check_number, lambda rate: {"weight_decay": float(rate)}),
    "maximize": Option(_check_bool, lambda on: {"maximize": bool(on)}),
    "momentum_dtype": Option(_check_momentum_dtype),
    "blocks": Option(_check_blocks),
    "stochastic_rounding": Option(
        _check_one_of(True, False, None), lambda on: {"stochastic_rounding": on is None or bool(on)}
    ),
    "master_bits": Option(_check_master_bits),
    "nesterov": Option(_check_bool, lambda on: {"nesterov": bool(on)}),
    "lagged": Option(_check_bool, lambda on: {"lagged": bool(on)}),
}


def check_options(group: Group) -> None:
    """Raises ValueError unless all options of a param group, or the defaults, are allowed."""
    for name, option in OPTIONS.items():
        option.check(name, group[name])


def settings_of(group: Group, capturable: bool) -> Settings:
    """Returns a param group's options as a backend sees them.

    Args:
        group: A param group.
        capturable: Whether ``lr`` may stay a tensor on the device.
    """
    fields: dict[str, Any] = {}
    for name, option in OPTIONS.items():
        if option.settings is not None:
            fields |= option.settings(group[name])
    lr = fields["lr"]
    if not (capturable and isinstance(lr, Tensor) and lr.device.type != "cpu"):
        fields["lr"] = float(lr)
    return Settings(**fields)
