"""Bad settings, parameters and gradients: the error, its message, and that nothing changes."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from error_checks import ERRORS, assert_names, matrix, optimizer_with_history
from optim_checks import (
    assert_same_bits,
    assert_same_snapshot,
    parameter,
    set_grad,
    snapshot,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from striped_hf import StripedAdamW

# ---------------------------------------------------------------------------------------------
# settings
# ---------------------------------------------------------------------------------------------


class BadSetting(NamedTuple):
    setting: dict[str, Any]
    words: tuple[str, ...]  # the argument, the value, and words of the fix


BAD_SETTINGS = [
    BadSetting({"lr": -1e-3}, ("lr", "-0.001")),
    BadSetting({"lr": math.nan}, ("lr", "nan")),
    BadSetting({"lr": math.inf}, ("lr", "inf")),
    BadSetting({"lr": "1e-3"}, ("lr", "1e-3")),
    BadSetting({"lr": torch.tensor(-1.0)}, ("lr", "-1")),
    BadSetting({"lr": torch.tensor([0.1, 0.2])}, ("lr",)),
    BadSetting({"eps": -1e-8}, ("eps", "-1e-08")),
    BadSetting({"eps": math.nan}, ("eps", "nan")),
    BadSetting({"eps": math.inf}, ("eps", "inf")),
    BadSetting({"weight_decay": -0.1}, ("weight_decay", "-0.1")),
    BadSetting({"weight_decay": math.nan}, ("weight_decay", "nan")),
    BadSetting({"weight_decay": math.inf}, ("weight_decay", "inf")),
    BadSetting({"betas": (-0.1, 0.999)}, ("betas", "-0.1")),
    BadSetting({"betas": (1.0, 0.999)}, ("betas", "1.0")),
    BadSetting({"betas": (0.9, 1.0)}, ("betas", "1.0")),
    BadSetting({"betas": (0.9, -0.5)}, ("betas", "-0.5")),
    BadSetting({"betas": (0.9, math.nan)}, ("betas", "nan")),
    BadSetting({"betas": (0.9,)}, ("betas", "0.9")),
    BadSetting({"betas": (0.9, 0.99, 0.999)}, ("betas", "0.99")),
    BadSetting({"betas": 0.9}, ("betas", "0.9")),
    BadSetting(
        {"momentum_dtype": "fp8"}, ("momentum_dtype", "fp8", "float32", "bfloat16", "int8", "int4")
    ),
    BadSetting({"momentum_dtype": torch.float32}, ("momentum_dtype", "torch.float32", "float32")),
    BadSetting({"momentum_dtype": None}, ("momentum_dtype", "None", "float32")),
    BadSetting({"blocks": (1, 4)}, ("blocks", "(1, 4)", "(4, 6)")),
    BadSetting({"blocks": (3, 1)}, ("blocks", "(3, 1)", "(4, 6)")),
    BadSetting({"blocks": (0, 1)}, ("blocks", "(0, 1)")),
    BadSetting({"blocks": (1, -3)}, ("blocks", "(1, -3)")),
    BadSetting({"blocks": (1,)}, ("blocks", "(1,)")),
    BadSetting({"blocks": (1, 1, 1)}, ("blocks", "(1, 1, 1)")),
    BadSetting({"blocks": 3}, ("blocks", "3")),
    BadSetting({"blocks": (1.0, 2.0)}, ("blocks", "1.0")),
    BadSetting({"blocks": "12"}, ("blocks", "12")),
    BadSetting({"master_bits": 32}, ("master_bits", "32", "24")),
    BadSetting({"master_bits": True}, ("master_bits", "True", "24")),
    BadSetting({"master_bits": "24"}, ("master_bits", "'24'", "24")),
]


@pytest.mark.parametrize("bad", BAD_SETTINGS, ids=lambda bad: str(bad.setting))
def test_bad_settings_of_the_constructor(bad: BadSetting) -> None:
    with pytest.raises(ERRORS) as caught:
        StripedAdamW([matrix()], **bad.setting)
    assert_names(caught.value, *bad.words)


@pytest.mark.parametrize("bad", BAD_SETTINGS, ids=lambda bad: str(bad.setting))
def test_bad_settings_of_a_group(bad: BadSetting) -> None:
    with pytest.raises(ERRORS) as caught:
        StripedAdamW([{"params": [matrix()]}, {"params": [matrix()], **bad.setting}])
    assert_names(caught.value, *bad.words)


@pytest.mark.parametrize("bad", BAD_SETTINGS, ids=lambda bad: str(bad.setting))
def test_bad_settings_of_an_added_group_leave_the_optimizer_as_it_was(bad: BadSetting) -> None:
    p = matrix()
    optimizer = StripedAdamW([p])
    p.grad = torch.randn(4, 6)
    optimizer.step()
    before = snapshot(optimizer)
    with pytest.raises(ERRORS) as caught:
        optimizer.add_param_group({"params": [matrix()], **bad.setting})
    assert_names(caught.value, *bad.words)
    assert_same_snapshot(snapshot(optimizer), before)
    optimizer.step()


@pytest.mark.parametrize("backend", ["cuda", "Reference", "", None, 1])
def test_unknown_backend(backend: Any) -> None:
    with pytest.raises(ERRORS) as caught:
        StripedAdamW([matrix()], backend=backend)
    assert_names(caught.value, "backend", repr(backend), "auto", "reference")


def test_zeros_are_valid_settings() -> None:
    """Zeros are not mistakes."""
    p = matrix()
    optimizer = StripedAdamW([p], lr=0, betas=(0, 0), eps=0, weight_decay=0)
    p.grad = torch.randn(4, 6)
    before = p.detach().clone()
    optimizer.step()
    assert_same_bits(p, before)


def test_blocks_that_do_not_divide_name_the_parameter() -> None:
    named = [("encoder.weight", matrix(4, 6)), ("attention.packed", matrix(6, 8))]
    with pytest.raises(ERRORS) as caught:
        StripedAdamW(named, blocks=(1, 3))
    assert_names(caught.value, "attention.packed", "(1, 3)", "(6, 8)")
    with pytest.raises(ERRORS) as caught:
        StripedAdamW([p for _, p in named], blocks=(1, 3))
    assert_names(caught.value, "1", "(1, 3)", "(6, 8)")


# ---------------------------------------------------------------------------------------------
# parameters
# ---------------------------------------------------------------------------------------------


def flattened_by_fsdp1() -> torch.nn.Parameter:
    p = parameter(torch.randn(24))
    p._fsdp_flattened = True  # type: ignore[attr-defined]
    return p


BAD_PARAMETERS: dict[str, tuple[Callable[[], torch.Tensor], tuple[str, ...]]] = {
    "float64": (lambda: matrix(dtype=torch.float64), ("float64", "float32")),
    "complex64": (lambda: matrix(dtype=torch.complex64), ("complex64", "float32")),
    "fsdp1": (flattened_by_fsdp1, ("FSDP2", "fully_shard")),
}


@pytest.mark.parametrize("kind", BAD_PARAMETERS)
@pytest.mark.parametrize("named", [True, False], ids=["named", "by index"])
def test_bad_parameters(named: bool, kind: str) -> None:
    make, words = BAD_PARAMETERS[kind]
    params: list[Any] = [matrix(), matrix(), make()]
    if named:
        params = list(zip(["a.weight", "b.weight", "the.bad.one"], params, strict=True))
    with pytest.raises(ERRORS) as caught:
        StripedAdamW(params)
    assert_names(caught.value, "the.bad.one" if named else "2", *words)

    optimizer = StripedAdamW(params[:1])
    with pytest.raises(ERRORS) as caught:
        optimizer.add_param_group({"params": params[1:]})
    assert_names(caught.value, *(("the.bad.one",) if named else ()), *words)
    assert len(optimizer.param_groups) == 1


def test_parameters_that_deepspeed_flattened(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ZeRO 1 and 2 each group has one flat buffer instead of its parameters."""
    ps = [parameter(torch.randn(3)), matrix()]
    optimizer = StripedAdamW([{"params": ps[:1]}, {"params": ps[1:]}])
    flat = parameter(torch.randn(24))
    flat.grad = torch.ones(24)
    optimizer.param_groups[1]["params"] = [flat]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
        for _ in range(2):  # the second try is an error, too
            with pytest.raises(RuntimeError) as caught:
                optimizer.step()
            assert_names(caught.value, "param group 1", "ZeRO", "24 elements", "FSDP2")
            assert not optimizer.state
    optimizer.step()  # without DeepSpeed it is a vector that other code put there


def test_a_sharded_gradient_of_a_plain_parameter_or_the_reverse_is_an_error(
    mesh_of_one: DeviceMesh,
) -> None:
    whole = torch.ones(2, 3)
    sharded = distribute_tensor(whole, mesh_of_one, [Shard(0)])
    for values, grad in ((sharded, whole), (whole, sharded)):
        p = torch.nn.Parameter(values)
        p.grad = grad
        optimizer = StripedAdamW([("the.bad.one", p)])
        with pytest.raises(RuntimeError) as caught:
            optimizer.step()
        assert_names(caught.value, "the.bad.one", "DTensor", "plain tensor", "distribute")


@pytest.fixture
def mesh_of_one(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A mesh of one process; its parameters are real DTensors."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_capturable_steps_whole_parameters_only(mesh_of_one: DeviceMesh) -> None:
    p = torch.nn.Parameter(distribute_tensor(torch.ones(2, 3), mesh_of_one, [Shard(0)]))
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="capturable"):
        StripedAdamW([p], capturable=True).step()


# ---------------------------------------------------------------------------------------------
# gradients
# ---------------------------------------------------------------------------------------------

BAD_GRADIENTS: dict[str, tuple[Callable[[], torch.Tensor], tuple[str, ...]]] = {
    "sparse": (lambda: torch.randn(4, 6).to_sparse(), ("sparse", "dense")),
    "complex": (lambda: torch.randn(4, 6, dtype=torch.complex64), ("complex64",)),
    "float64": (lambda: torch.randn(4, 6, dtype=torch.float64), ("float64",)),
}


@pytest.mark.parametrize("kind", BAD_GRADIENTS)
@pytest.mark.parametrize("named", [True, False], ids=["named", "by index"])
def test_bad_gradients_are_errors_before_anything_moves(named: bool, kind: str) -> None:
    make, words = BAD_GRADIENTS[kind]
    optimizer, ps = optimizer_with_history(named)
    before = snapshot(optimizer)
    for p in ps:
        p.grad = torch.randn_like(p)
    set_grad(ps[2], make())
    with pytest.raises(ERRORS) as caught:
        optimizer.step()
    assert_names(caught.value, "second.weight" if named else "2", *words)
    assert_same_snapshot(snapshot(optimizer), before)
    ps[2].grad = torch.randn_like(ps[2])
    optimizer.step()  # the run continues with a good gradient
    assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}


def test_a_bad_gradient_in_the_first_step_leaves_no_state() -> None:
    ps = [matrix(), matrix()]
    optimizer = StripedAdamW(ps)
    ps[0].grad = torch.randn(4, 6)
    set_grad(ps[1], torch.randn(4, 6).to_sparse())
    with pytest.raises(ERRORS):
        optimizer.step()
    assert all(not state for state in optimizer.state.values())


def test_a_real_sparse_embedding_gradient() -> None:
    embedding = torch.nn.Embedding(7, 3, sparse=True)
    optimizer = StripedAdamW(embedding.named_parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ERRORS) as caught:
        optimizer.step()
    assert_names(caught.value, "weight", "sparse")
