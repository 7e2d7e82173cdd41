"""Exact loss of a causal language model: a sum over tokens, not a mean of batch means."""

import math
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


@torch.no_grad()
def evaluate_loss(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], accelerator: Accelerator
) -> dict[str, float]:
    """Computes the loss over all targets of some batches, every target weighing the same.

    A mean over batches weighs targets unequally as soon as batches hold different numbers of them
    (masked labels, a shorter last block), and so perplexity comes out wrong. Works on any number of
    processes, each with its share of the batches.

    Args:
        model: A causal language model, prepared by ``accelerator`` where there are several
            processes. Left in the mode, train or eval, that it was in.
        batches: Dicts with ``input_ids`` [B, L] and ``shift_labels`` [B, L], int64, on the model's
            device: the target of each position, -100 for none. A data loader prepared by
            ``accelerator`` may have padded its last batch with copies; they are not counted.
        accelerator: Gathers over the processes.

    Returns:
        ``loss`` in nats per token, ``perplexity`` = exp(loss), and ``tokens``, the targets counted.

    Raises:
        ValueError: There was not one target.
    """
    was_training = model.training
    model.eval()
    loss, tokens = 0.0, 0
    for batch in batches:
        logits = model(input_ids=batch["input_ids"]).logits
        labels = batch["shift_labels"]
        losses = cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
        )
        sums = losses.view(labels.shape).sum(1, dtype=torch.float64)
        sums, counts = accelerator.gather_for_metrics((sums, (labels != -100).sum(1)))
        loss += sums.sum().item()
        tokens += int(counts.sum())
    model.train(was_training)
    if tokens == 0:
        raise ValueError("the evaluation data holds no targets: pass one that has labels")
    loss /= tokens
    # a diverged model's perplexity is no number worth an OverflowError
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"loss": loss, "perplexity": perplexity, "tokens": tokens}
