"""The differences between a stopped run and the run that resumes it, as one line."""

from collections.abc import Mapping
from typing import Any

_SHOWN = 3


def differences(before: Any, now: Any) -> str:
    """Names the differences between two JSON values, for a message of one line.

    Args:
        before: The value of the stopped run.
        now: The current value.

    Returns:
        A text such as "seed 1 before and 2 now, data.tokens 10 before and 20 now" with at most
        three differences; empty if the values are equal.
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
