"""The loss without whole logits: torch's values and gradients, and the memory that it saves."""

import subprocess
import sys

import pytest
import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from striped_hf import losses
from striped_hf.losses import is_worthwhile, linear_cross_entropy

ROWS, WIDTH, VOCAB_SIZE = 13, 5, 17


@pytest.fixture(params=[1, 3 * VOCAB_SIZE, 1 << 25], ids=["rows alone", "3 rows", "one chunk"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK_LOGITS", request.param)


def tensors(dtype=torch.float64, rows=ROWS, width=WIDTH, vocab_size=VOCAB_SIZE):
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab_size, width, dtype=dtype, requires_grad=True)
    labels = torch.randint(vocab_size, (rows,))
    labels[[0, rows // 2, -1]] = -100
    return hidden, weight, labels


def expected(hidden, weight, labels):
    return cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_equal_torchs(dtype):
    hidden, weight, labels = tensors(dtype)
    loss = linear_cross_entropy(hidden, weight, labels)
    whole = cross_entropy(hidden @ weight.T, labels, reduction="sum")
    assert loss.dtype == dtype
    torch.testing.assert_close(loss, whole)
    ours = torch.autograd.grad(0.3 * loss, (hidden, weight))
    theirs = torch.autograd.grad(0.3 * whole, (hidden, weight))
    torch.testing.assert_close(ours, theirs)


class _Again(torch.autograd.Function):
    """Computes loss and gradients again for each backward pass: gradcheck needs many."""

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        ctx.save_for_backward(hidden, weight, labels)
        return linear_cross_entropy(hidden, weight, labels)

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_grad):
        hidden, weight, labels = ctx.saved_tensors
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (hidden, weight)]
            loss = linear_cross_entropy(*inputs, labels)
        return *torch.autograd.grad(loss, inputs, loss_grad), None


@pytest.mark.usefixtures("chunk")
def test_gradcheck():
    assert torch.autograd.gradcheck(_Again.apply, tensors())


@pytest.mark.usefixtures("chunk")
def test_in_bfloat16_only_the_products_are_rounded():
    exact = tensors(torch.float64, rows=96, width=24, vocab_size=200)
    hidden, weight, labels = (x.detach() for x in exact)
    inputs = hidden.float().requires_grad_(), weight.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(*inputs, labels)
        whole = expected(*inputs, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=0)
    truth = torch.autograd.grad(expected(*exact), exact[:2])
    ours = torch.autograd.grad(loss, inputs)
    theirs = torch.autograd.grad(whole, inputs)
    for true, mine, other in zip(truth, ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - true).norm() < 1.1 * (other - true).norm()


def test_only_required_gradients_are_computed():
    hidden, weight, labels = tensors()
    weight.requires_grad_(False)
    linear_cross_entropy(hidden, weight, labels).backward()
    assert weight.grad is None
    assert hidden.grad is not None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels).requires_grad


def test_a_row_without_target_does_not_count_even_if_it_is_not_finite():
    hidden, weight, labels = tensors()
    with torch.no_grad():
        hidden[0] = float("nan")
    loss = linear_cross_entropy(hidden, weight, labels)
    hidden_grad, _ = torch.autograd.grad(loss, (hidden, weight))
    assert loss.isfinite()
    assert hidden_grad[0].eq(0).all()


def test_a_second_backward_pass_is_an_error():
    hidden, weight, labels = tensors()
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


def test_it_compiles_to_one_graph(monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK_LOGITS", 3 * VOCAB_SIZE)
    hidden, weight, labels = tensors(torch.float32)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    loss, whole = (f(hidden, weight, labels) for f in (compiled, expected))
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(whole, (hidden, weight))
    )


# in a separate process: memory that malloc kept from other tests would count
MEMORY = """
import torch
from striped_hf import losses
from benchmarks.measuring import return_freed_memory, temporary_bytes

return_freed_memory()
losses._CHUNK_LOGITS //= 4
hidden = torch.randn(512, 32, requires_grad=True)
weight = torch.randn(50257, 32, requires_grad=True)
labels = torch.randint(50257, (512,))
cpu = torch.device("cpu")

def ours():
    losses.linear_cross_entropy(hidden, weight, labels).backward()

def whole():
    loss = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    loss.backward()

ours(), temporary_bytes(cpu, ours)
print(temporary_bytes(cpu, ours) or 0, temporary_bytes(cpu, whole) or 0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no counter of a call's memory elsewhere")
def test_memory_is_for_one_chunk_of_logits():
    printed = subprocess.check_output([sys.executable, "-c", MEMORY], text=True)
    ours, whole = map(int, printed.split())
    logits = 4 * 512 * 50257
    assert whole > 1.9 * logits
    # a quarter of the logits at a time, and the weight's gradient
    assert ours < 0.3 * logits + 4 * 50257 * 32 + (8 << 20)


def test_small_vocabularies_use_torchs_loss():
    assert not is_worthwhile(12 * 64, 65)
    assert not is_worthwhile(64 * 256, 65)
    assert is_worthwhile(1024, 50257)
