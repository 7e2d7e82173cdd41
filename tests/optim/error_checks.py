"""Shared by the tests of errors: an optimizer after some steps, and checks of messages."""

from __future__ import annotations

from typing import Any

import torch
from optim_checks import parameter

from striped_hf import StripedAdamW

ERRORS = (ValueError, RuntimeError)


def matrix(rows: int = 4, columns: int = 6, dtype: torch.dtype = torch.float32) -> Any:
    return parameter(torch.randn(rows, columns), dtype)


def assert_names(error: BaseException, *words: str) -> None:
    text = str(error)
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"


def optimizer_with_history(named: bool, **settings: Any) -> tuple[StripedAdamW, list[Any]]:
    ps = [matrix(), parameter(torch.randn(5)), matrix(), matrix(dtype=torch.bfloat16)]
    names = ["first.weight", "first.bias", "second.weight", "third.weight"]
    optimizer = StripedAdamW(list(zip(names, ps, strict=True)) if named else ps, **settings)
    for _ in range(2):
        for p in ps:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return optimizer, ps
