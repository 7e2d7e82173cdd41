"""Cross-entropy of a large vocabulary, without ever holding all of its logits.

At 12 x 1,024 tokens and GPT-2's 50,257 columns the logits take 2.5 GB in float32, and their
gradient as much again. Here the output layer is part of the loss: some rows at a time become
logits, then losses, then gradients of the hidden states and of the weight.

torch 2.13 has the like (``torch.nn.functional.linear_cross_entropy`` with ``options``), but adds up
the losses in the hidden states' dtype (in bfloat16 to 8.69 where 8.85 is right) and does not follow
autocast; Liger's kernels know no GPT-2.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

_CHUNK_LOGITS = 1 << 25  # at a time: 128 MiB in float32

# Models whose output layer's result goes into the loss as it is (read in transformers 5.23)
_PLAIN_HEADS = ("gpt2", "llama", "mistral", "phi3", "qwen2", "qwen3")


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100
) -> Tensor:
    """Computes ``cross_entropy(hidden @ weight.T, labels, reduction="sum")`` in chunks of rows.

    Products are in autocast's dtype, or else in that of ``hidden``; the softmax and every sum are
    in float32, or float64 for float64. The gradients are computed with the loss and handed out
    once: a second backward pass raises RuntimeError.

    Args:
        hidden: [N, d], what the output layer gets.
        weight: [V, d], that layer's weight; it has no bias.
        labels: [N], int64; ``ignore_index`` for no target.
        ignore_index: The label whose rows count for nothing.

    Returns:
        The sum over the rows, a scalar in float32 or float64.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, ignore_index)  # type: ignore[no-untyped-call]
    return loss


def is_worthwhile(tokens: int, vocab_size: int) -> bool:
    """Tells whether so many logits are more than one chunk: below, nothing is saved."""
    return tokens * vocab_size > _CHUNK_LOGITS


def token_losses(
    head: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, vocab_size: int
) -> Tensor:
    """Computes the loss of each token, without gradients and without whole logits in float32.

    Args:
        head: Makes logits [n, V] of n rows of ``hidden``; they may be of any floating dtype.
        hidden: [N, d].
        labels: [N], int64; -100 for no target.
        vocab_size: V.

    Returns:
        [N], float32; 0 where there is no target.
    """
    with torch.no_grad():
        return torch.cat(
            [
                cross_entropy(head(hidden[rows]).float(), labels[rows], reduction="none")
                for rows in _chunks(len(hidden), vocab_size)
            ]
        )


def plain_head(model: nn.Module) -> nn.Linear | None:
    """Returns the output layer of a model whose loss takes its logits as they are.

    None for all others, among them those of which that is not known; for wrapped models; and for
    an output layer that has a bias or is no plain ``nn.Linear``.
    """
    if not isinstance(model, PreTrainedModel) or model.config.model_type not in _PLAIN_HEADS:
        return None
    head = model.get_output_embeddings()
    # its own "forward": a hook of accelerate's, or this module's
    plain = type(head) is nn.Linear and head.bias is None and "forward" not in vars(head)
    return head if plain else None


@contextlib.contextmanager
def head_in_loss(
    model: Any, head: nn.Linear, loss_function: Callable[..., Tensor]
) -> Iterator[None]:
    """Has a model leave its output layer to its loss.

    Args:
        model: A model that has a :func:`plain_head`.
        head: That layer.
        loss_function: Takes the place of the model's own (``transformers.loss``) and is called as
            that is, but that its ``logits`` are the hidden states, [B, L, d].
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
    """Returns a layer's weight, gathered where it is sharded."""
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
                # every step of the softmax in the logits' place, [rows, V]
                logits = (x @ columns.T).to(exact)
                logits -= logits.amax(1, keepdim=True)
                of_target = logits.gather(1, target)
                total = logits.exp_().sum(1, keepdim=True)
                loss += torch.where(keep, total.log() - of_target, 0).sum()
                if not (of_hidden or of_weight):
                    continue
                # their gradient: probabilities, less 1 for the target
                logits.div_(total).scatter_add_(1, target, -torch.ones_like(total))
                grad = logits.masked_fill_(~keep, 0).to(dtype)
                del logits
                if hidden_grad is not None:
                    hidden_grad[rows] = grad @ columns
                if weight_grad is not None and dtype == exact:
                    weight_grad.addmm_(grad.T, x)
                elif weight_grad is not None:
                    weight_grad += grad.T @ x
                del grad  # before the next ones are made
        if torch.compiler.is_compiling():  # which frees what it saves by itself
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
        # in place, for nothing else has them: the weight's is as large as the weight
        if hidden_grad is not None:
            hidden_grad = hidden_grad.mul_(loss_grad).to(ctx.dtypes[0])
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(loss_grad).to(ctx.dtypes[1])
        return hidden_grad, weight_grad, None, None


def _chunks(rows: int, columns: int) -> list[slice]:
    """Divides rows into equal chunks of no more than ``_CHUNK_LOGITS`` logits."""
    chunks = max(1, -(-rows * columns // _CHUNK_LOGITS))
    size = max(1, -(-rows // chunks))
    return [slice(begin, begin + size) for begin in range(0, rows, size)]
