"""The loss without whole logits: torch's values and gradients, and the memory that it saves."""

import subprocess
import sys

import pytest
import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from striped_hf import LayerwiseStripedAdamW, losses
from striped_hf.losses import is_worthwhile, linear_cross_entropy
from striped_hf.trainer.live_bytes import OTHER, LiveBytes

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


# -------------------------------------------------------------------------------------------------
# an optimizer that consumes the weight's gradient in blocks of rows
# -------------------------------------------------------------------------------------------------

# a matrix whose gradient a layerwise optimizer frees
LARGE = {"rows": 90, "width": 256, "vocab_size": 700}


@pytest.fixture
def blocks(monkeypatch):
    """Blocks of 10 rows of the weight, whose last one is shorter."""
    monkeypatch.setattr(losses, "_CHUNK_LOGITS", 90 * 11)


def optimizer_of(weight, lr=1e-2, **options):
    return LayerwiseStripedAdamW([weight], lr=lr, **options)


def train(untied, dtype, passes=1, **options):
    hidden, weight, labels = (x.detach() for x in tensors(torch.float32, **LARGE))
    hidden = hidden.to(dtype).requires_grad_()
    weight = torch.nn.Parameter((0.1 * weight).to(dtype))
    optimizer = optimizer_of(weight, gradient_accumulation=passes > 1, **options)
    for _ in range(2):
        for rows in torch.arange(90).chunk(passes):
            inputs = hidden[rows]
            loss = linear_cross_entropy(inputs, weight, labels[rows], untied=untied)
            (loss / 80).backward()
            assert weight.grad is None
        norm = optimizer.grad_norm()
        optimizer.step()
    state = {key: value.float() for key, value in optimizer.state[weight].items()}
    return {**state, "norm": norm, "weight": weight.float(), "hidden": hidden.grad.float()}


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum_dtype": "int8"},
        # steps so small that no block of rows says that the norm has grown
        {"maximize": True, "max_grad_norm": 0.5, "lr": 1e-4},
    ],
    ids=str,
)
def test_folding_rows_is_folding_the_whole_gradient(backend, dtype, passes, options):
    whole, in_rows = (
        train(untied, dtype, passes, backend=backend, **options) for untied in (False, True)
    )
    # logits of other matrix products differ in the last bit of their dtype, and codes by one
    within = 1e-5 if dtype == torch.float32 else 0.01
    if "momentum_dtype" in options:
        within = 0.005 if dtype == torch.float32 else 0.02
    for key, value in whole.items():
        assert (in_rows[key] - value).norm() < within * value.norm(), key


@pytest.mark.usefixtures("blocks")
def test_the_first_block_of_rows_tells_that_a_step_is_a_spike():
    hidden, weight, labels = (x.detach() for x in tensors(torch.float32, **LARGE))
    labels = torch.arange(90) * 7 % 700  # every block has its share of the gradient
    momenta = []
    for untied in (False, True):
        param = torch.nn.Parameter(0.1 * weight)
        optimizer = optimizer_of(param, lr=0.0, max_grad_norm=200.0)
        for factor in (1.0, 1.0, 1.0, 100.0):
            loss = linear_cross_entropy(hidden, param, labels, untied=untied)
            (factor * loss).backward()
            norm = optimizer.grad_norm().item() / factor
            optimizer.step()
        momenta.append(optimizer.state[param]["exp_avg"].norm().item() / (0.1 * norm))
    # three gradients that are not clipped, and one that is clipped to a norm of 200
    assert norm < 200
    exact = 0.9 + 0.9**2 + 0.9**3 + 200 / norm
    assert momenta[0] == pytest.approx(exact, rel=0.01)
    assert momenta[1] == pytest.approx(exact, rel=0.3)


@pytest.mark.usefixtures("blocks")
def test_rows_in_bfloat16_are_as_exact_as_a_whole_gradient():
    hidden, weight, labels = tensors(torch.float64, **LARGE)
    (truth,) = torch.autograd.grad(expected(hidden, weight, labels), weight)
    errors = []
    for untied in (False, True):
        param = torch.nn.Parameter(weight.detach().float())
        optimizer = optimizer_of(param, betas=(0.0, 0.99))
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_cross_entropy(hidden.detach().float(), param, labels, untied=untied)
        loss.backward()
        optimizer.step()
        errors.append((optimizer.state[param]["exp_avg"] - truth).norm() / truth.norm())
    assert errors[1] < 1.1 * errors[0]


@pytest.mark.usefixtures("blocks")
def test_the_whole_gradient_never_exists():
    hidden, weight, labels = tensors(torch.float32, **LARGE)
    weight = torch.nn.Parameter(weight.detach())
    optimizer = optimizer_of(weight, momentum_dtype="int8")
    linear_cross_entropy(hidden, weight, labels).backward()
    optimizer.step()  # the state exists now
    added = {}
    for untied in (False, True):
        with LiveBytes() as live:
            live.label("before", [hidden, weight, *optimizer.state[weight].values()])
            linear_cross_entropy(hidden, weight, labels, untied=untied).backward()
        added[untied] = live.at_peak()[OTHER]
        optimizer.step()
    assert added[False] > weight.nbytes
    assert added[True] < weight.nbytes / 3  # a block, and the gradient of hidden


def _deleted(weight, optimizers):
    optimizers.clear()


def _kept(weight, optimizers):
    weight.grad = torch.zeros_like(weight)


def _hooked(weight, optimizers):
    weight.register_hook(lambda grad: None)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("before_backward", [True, False])
@pytest.mark.parametrize("change", [_deleted, _kept, _hooked])
def test_the_gradient_is_whole_where_no_optimizer_consumes_it(change, before_backward):
    hidden, weight, labels = tensors(torch.float32, **LARGE)
    weight = torch.nn.Parameter(weight.detach())
    optimizers = [optimizer_of(weight)]
    got = []
    if change is not _deleted:  # after the optimizer's own hook it would be gone
        optimizers[0].gradient_hook = lambda param, grad: got.append(grad.clone())
    if before_backward:
        loss = linear_cross_entropy(hidden, weight, labels, untied=True)
        change(weight, optimizers)
    else:
        change(weight, optimizers)
        loss = linear_cross_entropy(hidden, weight, labels, untied=True)
    (0.3 * loss).backward()
    (grad,) = got or [weight.grad]
    other = weight.detach().requires_grad_()
    (truth,) = torch.autograd.grad(0.3 * expected(hidden, other, labels), other)
    torch.testing.assert_close(grad, truth, rtol=1e-4, atol=1e-4)  # logits are in the tens


@pytest.mark.usefixtures("blocks")
def test_a_weight_that_is_no_leaf_gets_its_gradient():
    """Such as the gathered weight of a sharded output layer."""
    hidden, weight, labels = tensors(torch.float32, **LARGE)
    weight = torch.nn.Parameter(weight.detach())
    optimizer = optimizer_of(weight)
    grads = []
    optimizer.gradient_hook = lambda param, grad: grads.append(grad)
    linear_cross_entropy(hidden, 1 * weight, labels, untied=True).backward()
    assert [grad.shape for grad in grads] == [weight.shape]


@pytest.mark.usefixtures("blocks")
def test_a_second_loss_of_one_step_is_refused():
    hidden, weight, labels = tensors(torch.float32, **LARGE)
    weight = torch.nn.Parameter(weight.detach())
    optimizer = optimizer_of(weight)
    loss = sum(linear_cross_entropy(hidden, weight, labels, untied=True) for _ in range(2))
    with pytest.raises(RuntimeError, match="second gradient"):
        loss.backward()
    optimizer.zero_grad()


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
