"""torch's own inputs for AdamW, good and bad, from ``torch.testing._internal``.

That module imports ``expecttest``, which torch itself does not install.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from striped_hf import StripedAdamW

pytest.importorskip("expecttest", reason="torch's optimizer test helpers import expecttest")
helpers = pytest.importorskip("torch.testing._internal.common_optimizers")

KNOWN = {"lr", "betas", "eps", "weight_decay", "maximize"}
# arguments that only AdamW has, and values that only AdamW's kernels forbid
GOOD = [i for i in helpers.optim_inputs_func_adamw("cpu") if set(i.kwargs) <= KNOWN]
BAD = [
    e
    for e in helpers.optim_error_inputs_func_adamw("cpu", torch.float32)
    if set(e.optimizer_error_input.kwargs) <= KNOWN and "both Tensors" not in e.error_regex
]


def test_there_are_inputs() -> None:
    assert len(GOOD) >= 4
    assert len(BAD) >= 4


@pytest.mark.parametrize("optimizer_input", GOOD, ids=lambda i: i.desc)
def test_vectors_step_like_adamws(optimizer_input: Any) -> None:
    """torch's tracker compares the parameters after each step, and then aligns them."""
    case = helpers.unittest.TestCase()
    case.assertEqual = lambda a, b, **kwargs: torch.testing.assert_close(a, b, **kwargs)
    tracker = helpers.TensorTracker({"rtol": 1.3e-6, "atol": 1e-6})
    start = [torch.randn(7), torch.randn(())]
    grads = [[torch.randn(7), torch.randn(())] for _ in range(7)]
    for cls in (torch.optim.AdamW, StripedAdamW):
        ps = [torch.nn.Parameter(values.clone()) for values in start]
        optimizer = cls(ps, **optimizer_input.kwargs)
        for at_step in grads:
            for p, g in zip(ps, at_step, strict=True):
                p.grad = g.clone()
            optimizer.step()
            for p in ps:
                for tensor in (p, *(optimizer.state[p][k] for k in ("exp_avg", "exp_avg_sq"))):
                    if cls is torch.optim.AdamW:
                        tracker.add(tensor)
                    else:
                        tracker.pop_check_set(tensor, case)
    assert tracker.all_popped()


@pytest.mark.parametrize("error_input", BAD, ids=lambda e: e.optimizer_error_input.desc)
def test_torchs_error_inputs_are_errors(error_input: Any) -> None:
    bad = error_input.optimizer_error_input
    params = bad.params or [torch.nn.Parameter(torch.randn(2, 3))]
    if issubclass(error_input.error_type, Warning):
        with pytest.warns(error_input.error_type, match=error_input.error_regex):
            StripedAdamW(params, **bad.kwargs)
    elif error_input.error_on == helpers.OptimizerErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises((error_input.error_type, ValueError)):
            StripedAdamW(params, **bad.kwargs)
    else:
        optimizer = StripedAdamW(params, **bad.kwargs)
        with pytest.raises((error_input.error_type, ValueError)):
            optimizer.step()
