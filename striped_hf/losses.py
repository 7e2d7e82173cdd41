"""Cross-entropy over a large vocabulary in chunks of rows, without the whole logits in memory.

For 12 x 1,024 tokens and GPT-2's vocabulary of 50,257, the logits take 2.5 GB in float32, and their
gradient another 2.5 GB. Here the output layer is part of the loss. For one chunk of rows at a time,
it computes the logits, the losses, and the gradients of the hidden states and of the weight.

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

_CHUNK_LOGITS = 1 << 25  # logits in a chunk: 128 MiB in float32

# Model types whose loss gets the output layer's result unchanged (checked in transformers 5.23)
_PLAIN_HEADS = ("gpt2", "llama", "mistral", "phi3", "qwen2", "qwen3")


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100
) -> Tensor:
    """Computes ``cross_entropy(hidden @ weight.T, labels, reduction="sum")`` in chunks of rows.

    Matrix products use autocast's dtype, or without autocast the dtype of ``hidden``. The softmax
    and all sums use float32 (float64 for float64 inputs). The forward pass computes the gradients
    too, for one backward pass.

    Args:
        hidden: [N, d], the output layer's input.
        weight: [V, d], the output layer's weight. The layer has no bias.
        labels: [N], int64; ``ignore_index`` for rows without a target.
        ignore_index: The label of rows to ignore.

    Returns:
        The sum over the rows, a scalar in float32 or float64.

    Raises:
        RuntimeError: On a second backward pass.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, ignore_index)  # type: ignore[no-untyped-call]
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


def whole_weight(head: nn.Linear) -> Tensor:
    """Returns a layer's weight, gathered if it is sharded."""
    return head.weight.full_tensor() if isinstance(head.weight, DTensor) else head.weight


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int
    ) -> Tensor:
        device, dtype = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        exact = torch.promote_types(dtype, torch.float32)
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        with torch.autocast(device, enabled=False):
            inputs, columns = hidden.to(dtype), weight.to(dtype)
            kept = labels != ignore_index
            targets = torch.where(kept, labels, 0)[:, None]
            loss = hidden.new_zeros((), dtype=exact)
            hidden_grad = torch.empty_like(inputs) if of_hidden else None
            weight_grad = torch.zeros_like(weight, dtype=exact) if of_weight else None
            for rows in _chunks(len(hidden), len(weight)):
                x, target, keep = inputs[rows], targets[rows], kept[rows, None]
                # the softmax works in place on the logits, [rows, V]
                logits = (x @ columns.T).to(exact)
                logits -= logits.amax(1, keepdim=True)
                of_target = logits.gather(1, target)
                total = logits.exp_().sum(1, keepdim=True)
                loss += torch.where(keep, total.log() - of_target, 0).sum()
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
        if torch.compiler.is_compiling():  # compiled code frees saved tensors itself
            ctx.save_for_backward(hidden_grad, weight_grad)
        else:
            ctx.grads = hidden_grad, weight_grad
        ctx.dtypes = hidden.dtype, weight.dtype
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
        return hidden_grad, weight_grad, None, None


def _chunks(rows: int, columns: int) -> list[slice]:
    """Divides rows into equal chunks of at most ``_CHUNK_LOGITS`` logits."""
    chunks = max(1, -(-rows * columns // _CHUNK_LOGITS))
    size = max(1, -(-rows // chunks))
    return [slice(begin, begin + size) for begin in range(0, rows, size)]
