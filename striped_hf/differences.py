"""What a stopped run was, against what it is to go on as."""

from collections.abc import Mapping
from typing import Any

_SHOWN = 3


def differences(before: Any, now: Any) -> str:
    """Names what two values of JSON's types differ in, for a message of one line.

    Args:
        before: What was written then.
        now: What it is now.

    Returns:
        Such as "seed 1 before and 2 now, data.tokens 10 before and 20 now"; empty where the two are
        equal. No more than three are named.
    """
    found = list(_differences("", before, now))
    more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more


def _differences(name: str, before: Any, now: Any) -> list[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = {**before, **now}
        return [
            line
            for key in keys
            for line in _differences(
                f"{name}.{key}" if name else key, before.get(key), now.get(key)
            )
        ]
    if before == now:
        return []
    return [f"{name} {_short(before)} before and {_short(now)} now".strip()]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:40]}...{text[-15:]}"
