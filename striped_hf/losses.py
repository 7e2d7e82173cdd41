"""Cross-entropy over a large vocabulary in chunks of rows, without the whole logits in memory.

For 12 x 1,024 tokens and GPT-2's vocabulary of 50,257, the logits take 2.5 GB in float32, and their
gradient another 2.5 GB. Here the output layer is part of the loss. For one chunk of rows at a time,
it computes the logits, the losses, and the gradients of the hidden states and of the weight.

For Llama 3's vocabulary of 128,256 and a width of 4,096, the gradient of the weight takes 2.1 GB in
float32. An optimizer that frees gradients in the backward pass (LayerwiseStripedAdamW) does not
need all of it at a time. For such an optimizer the backward pass computes the logits again, in
blocks of the vocabulary. Each block gives some rows of the gradient, summed over all tokens. The
optimizer consumes them before the next block. That takes a fourth matrix product beside the three.

torch 2.13 has a similar function (``torch.nn.functional.linear_cross_entropy`` with ``options``).
It sums the losses in the hidden states' dtype (in bfloat16 it gave 8.69 for a sum of 8.85) and
ignores autocast. Liger's kernels do not support GPT-2.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from striped_hf.optim.layerwise.hooks import RowBlocks, row_consumer

_CHUNK_LOGITS = 1 << 25  # logits in a chunk: 128 MiB in float32

# Model types whose loss gets the output layer's result unchanged (checked in transformers 5.23)
_PLAIN_HEADS = ("gpt2", "llama", "mistral", "phi3", "qwen2", "qwen3")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    untied: bool = False,
) -> Tensor:
    """Computes ``cross_entropy(hidden @ weight.T, labels, reduction="sum")`` in chunks of rows.

    Matrix products use autocast's dtype, or without autocast the dtype of ``hidden``. The softmax
    and all sums use float32 (float64 for float64 inputs). The forward pass computes the gradients
    too, for one backward pass, except a gradient of the weight that an optimizer consumes in blocks
    of rows.

    Args:
        hidden: [N, d], the output layer's input.
        weight: [V, d], the output layer's weight. The layer has no bias.
        labels: [N], int64; ``ignore_index`` for rows without a target.
        ignore_index: The label of rows to ignore.
        untied: Whether the weight's whole gradient comes from this call. Then an optimizer may
            consume it in blocks of rows, and ``weight.grad`` stays None.

    Returns:
        The sum over the rows, a scalar in float32 or float64.

    Raises:
        RuntimeError: On a second backward pass.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, ignore_index, untied)  # type: ignore[no-untyped-call]
    return loss


def is_worthwhile(tokens: int, vocab_size: int) -> bool:
    """Returns whether the logits are larger than one chunk, so that chunks save memory."""
    return tokens * vocab_size > _CHUNK_LOGITS


def token_losses(
    head: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, vocab_size: int
) -> Tensor:
    """Computes the loss of each token, without gradients and without whole logits in float32.

    Args:
        head: Maps n rows of ``hidden`` to logits [n, V], of any floating dtype.
        hidden: [N, d].
        labels: [N], int64; -100 for rows without a target.
        vocab_size: V.

    Returns:
        [N], float32; 0 for rows without a target.
    """
    with torch.no_grad():
        return torch.cat(
            [
                cross_entropy(head(hidden[rows]).float(), labels[rows], reduction="none")
                for rows in _chunks(len(hidden), vocab_size)
            ]
        )


def plain_head(model: nn.Module) -> nn.Linear | None:
    """Returns a model's output layer if the model passes its result to the loss unchanged.

    Returns:
        None for other and unknown model types, for wrapped models, and for an output layer that has
        a bias or is not a plain ``nn.Linear``.
    """
    if not isinstance(model, PreTrainedModel) or model.config.model_type not in _PLAIN_HEADS:
        return None
    head = model.get_output_embeddings()
    # an instance's own "forward" is a hook of accelerate, or head_in_loss
    plain = type(head) is nn.Linear and head.bias is None and "forward" not in vars(head)
    return head if plain else None


@contextlib.contextmanager
def head_in_loss(
    model: Any, head: nn.Linear, loss_function: Callable[..., Tensor]
) -> Iterator[None]:
    """Makes a model skip its output layer and pass the hidden states to its loss function.

    Args:
        model: A model with a :func:`plain_head`.
        head: The model's output layer.
        loss_function: Replaces the model's loss function (``transformers.loss``). It gets the same
            arguments, but ``logits`` are the hidden states, [B, L, d].
    """
    before, model.loss_function = model.loss_function, loss_function
    layer: Any = head
    layer.forward = _unchanged
    try:
        yield
    finally:
        del layer.forward
        model.loss_function = before


def is_untied(model: Any, head: nn.Linear) -> bool:
    """Returns whether an output layer's weight is not the input embedding's, too."""
    return head.weight is not model.get_input_embeddings().weight


def whole_weight(head: nn.Linear) -> Tensor:
    """Returns a layer's weight, gathered if it is sharded."""
    return head.weight.full_tensor() if isinstance(head.weight, DTensor) else head.weight


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, untied: bool
    ) -> Tensor:
        device, dtype = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        exact = torch.promote_types(dtype, torch.float32)
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        compiling = torch.compiler.is_compiling()
        in_rows = untied and of_weight and not compiling and row_consumer(weight) is not None
        with torch.autocast(device, enabled=False):
            inputs, columns = hidden.to(dtype), weight.to(dtype)
            kept = labels != ignore_index
            targets = torch.where(kept, labels, 0)[:, None]
            loss = hidden.new_zeros((), dtype=exact)
            hidden_grad = torch.empty_like(inputs) if of_hidden else None
            weight_grad = None
            if of_weight and not in_rows:
                weight_grad = torch.zeros_like(weight, dtype=exact)
            log_sums = hidden.new_empty((len(hidden), 1), dtype=exact) if in_rows else None
            for rows in _chunks(len(hidden), len(weight)):
                x, target, keep = inputs[rows], targets[rows], kept[rows, None]
                # the softmax works in place on the logits, [rows, V]
                logits = (x @ columns.T).to(exact)
                largest = logits.amax(1, keepdim=True)
                logits -= largest
                of_target = logits.gather(1, target)
                total = logits.exp_().sum(1, keepdim=True)
                loss += torch.where(keep, total.log() - of_target, 0).sum()
                if log_sums is not None:
                    log_sums[rows] = total.log() + largest
                if not (of_hidden or of_weight):
                    continue
                # the logits' gradient: probabilities, minus 1 at the target
                logits.div_(total).scatter_add_(1, target, -torch.ones_like(total))
                grad = logits.masked_fill_(~keep, 0).to(dtype)
                del logits
                if hidden_grad is not None:
                    hidden_grad[rows] = grad @ columns
                if weight_grad is not None and dtype == exact:
                    weight_grad.addmm_(grad.T, x)
                elif weight_grad is not None:
                    weight_grad += grad.T @ x
                del grad  # free it before the next chunk
        if compiling:  # compiled code frees saved tensors itself
            ctx.save_for_backward(hidden_grad, weight_grad)
        else:
            ctx.grads = hidden_grad, weight_grad
            if in_rows:
                ctx.save_for_backward(weight, inputs, targets, kept[:, None], log_sums)
        ctx.dtypes, ctx.in_rows = (hidden.dtype, weight.dtype), in_rows
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (loss_grad,) = grads
        if torch.compiler.is_compiling():
            hidden_grad, weight_grad = ctx.saved_tensors
        else:
            if ctx.grads is None:
                raise RuntimeError(
                    "linear_cross_entropy keeps no gradients for a second backward pass: compute "
                    "the loss again"
                )
            (hidden_grad, weight_grad), ctx.grads = ctx.grads, None
        # in place, since nothing else uses them: weight_grad is as large as the weight
        if hidden_grad is not None:
            hidden_grad = hidden_grad.mul_(loss_grad).to(ctx.dtypes[0])
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(loss_grad).to(ctx.dtypes[1])
        if ctx.in_rows:
            weight = ctx.saved_tensors[0]
            with torch.autocast(weight.device.type, enabled=False):
                weight_grad = _consumed(weight, _weight_gradient(loss_grad, *ctx.saved_tensors))
        return hidden_grad, weight_grad, None, None, None


def _weight_gradient(
    loss_grad: Tensor,
    weight: Tensor,
    inputs: Tensor,
    targets: Tensor,
    kept: Tensor,
    log_sums: Tensor,
) -> RowBlocks:
    """Computes the gradient of the output layer's weight in blocks of rows.

    Args:
        loss_grad: [], the gradient of the loss.
        weight: [V, d].
        inputs: [N, d], in the dtype of the products.
        targets: [N, 1], from 0 to V - 1 in all rows.
        kept: [N, 1], False for rows without a target.
        log_sums: [N, 1], the log of the sum of the logits' exponentials; the dtype of the sums.
    """
    for rows in _chunks(len(weight), len(inputs)):
        logits = (inputs @ weight[rows].to(inputs.dtype).T).to(log_sums.dtype)  # [N, rows]
        grad = logits.sub_(log_sums).exp_()
        column = targets - rows.start
        here = (column >= 0) & (column < grad.shape[1])
        grad.scatter_add_(1, torch.where(here, column, 0), -here.to(grad.dtype))
        grad = grad.mul_(loss_grad).masked_fill_(~kept, 0).to(inputs.dtype)
        del logits
        yield rows, (grad.T @ inputs).to(weight.dtype)


def _consumed(weight: Tensor, blocks: RowBlocks) -> Tensor | None:
    """Lets an optimizer consume a gradient; returns the gradient if there is no optimizer."""
    consume = row_consumer(weight)
    if consume is not None:
        consume(blocks)
        return None
    grad = torch.empty_like(weight)  # the optimizer was deleted since the forward pass
    for rows, block in blocks:
        grad[rows] = block
    return grad


def _chunks(rows: int, columns: int) -> list[slice]:
    """Divides rows into equal chunks of at most ``_CHUNK_LOGITS`` logits."""
    chunks = max(1, -(-rows * columns // _CHUNK_LOGITS))
    size = max(1, -(-rows // chunks))
    return [slice(begin, begin + size) for begin in range(0, rows, size)]
