"""The table and the plot of a results file of losses.py."""

from typing import Any


def render(results: dict[str, Any]) -> str:
    """Makes the table."""
    return str(len(results["runs"]))
