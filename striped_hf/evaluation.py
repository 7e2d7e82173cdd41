"""Exact loss of a causal language model: a sum over tokens, not a mean of batch means."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from striped_hf.data import collate
from striped_hf.losses import head_in_loss, plain_head, token_losses, whole_weight

_LARGEST_BATCH = 64  # sequences; more of them are no faster on any device


def mean_token_loss(losses: Sequence[float], tokens: Sequence[int]) -> dict[str, float | None]:
    """Computes the mean loss of tokens that come in sequences.

    Args:
        losses: For each sequence the sum of its tokens' losses, in nats.
        tokens: For each sequence how many tokens were summed.

    Returns:
        ``loss`` in nats per token, every token weighing the same; its ``standard_error`` from the
        scatter between sequences, since the tokens of one sequence depend on each other (None for
        a single sequence); ``perplexity`` = exp(loss); and ``tokens``, the number counted.

    Raises:
        ValueError: There is no token.
    """
    # a sequence without targets, such as a fully masked one, is no observation
    counts = torch.tensor([count for count in tokens if count], dtype=torch.float64)
    sums = torch.tensor(
        [loss for loss, count in zip(losses, tokens, strict=True) if count], dtype=torch.float64
    )
    total, sequences = int(counts.sum()), len(counts)
    if total == 0:
        raise ValueError("the evaluation data holds no targets: pass data that has labels")
    loss = (sums.sum() / total).item()
    # of a ratio of two sums over sequences, both of which vary
    residuals = (sums - loss * counts).square().sum().item()
    error = math.sqrt(residuals * sequences / (sequences - 1)) / total if sequences > 1 else None
    return {
        "loss": loss,
        "standard_error": error,
        # a diverged model's perplexity is infinite, not an OverflowError
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "tokens": total,
    }


@torch.no_grad()
def evaluate_loss(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], accelerator: Accelerator
) -> dict[str, float | None]:
    """Computes the loss over all targets of some batches, every target weighing the same.

    A mean over batches weighs targets unequally as soon as batches hold different numbers of them
    (masked labels, a shorter last block), and so perplexity comes out wrong. Works on any number of
    processes, each with its share of the batches.

    Of GPT-2, Llama and other models with a :func:`striped_hf.losses.plain_head` the logits are
    never whole in memory; those of other models are, in the dtype in which the model gives them.

    Args:
        model: A causal language model, prepared by ``accelerator`` where there are several
            processes. Left in the mode, train or eval, that it was in.
        batches: Dicts with ``input_ids`` [B, L] and ``shift_labels`` [B, L], int64, on the model's
            device: the target of each position, -100 for none. A data loader prepared by
            ``accelerator`` may have padded its last batch with copies; they are not counted.
        accelerator: Gathers over the processes.

    Returns:
        As :func:`mean_token_loss`, a sequence being one row of a batch.

    Raises:
        ValueError: There was not one target.
    """
    was_training = model.training
    model.eval()
    losses_of = _losses(model, accelerator)
    sums, counts = [], []
    for batch in batches:
        labels = batch["shift_labels"]
        sequences = losses_of(batch["input_ids"], labels).sum(1, dtype=torch.float64)
        sequences, targets = accelerator.gather_for_metrics((sequences, (labels != -100).sum(1)))
        sums += sequences.tolist()
        counts += targets.tolist()
    model.train(was_training)
    return mean_token_loss(sums, counts)


def _losses(model: nn.Module, accelerator: Accelerator) -> Callable[[Tensor, Tensor], Tensor]:
    """Makes what computes the losses [B, L] of inputs and targets [B, L]."""
    unwrapped: Any = accelerator.unwrap_model(model)
    # DataParallel's copies have output layers of their own
    head = None if isinstance(model, nn.DataParallel) else plain_head(unwrapped)

    def from_logits(inputs: Tensor, labels: Tensor) -> Tensor:
        logits = model(input_ids=inputs).logits.flatten(0, 1)
        losses = token_losses(lambda rows: rows, logits, labels.flatten(), logits.shape[-1])
        return losses.view(labels.shape)

    if head is None:
        return from_logits
    loss_function = partial(_losses_from_hidden, head)

    def from_hidden(inputs: Tensor, labels: Tensor) -> Tensor:
        with head_in_loss(unwrapped, head, loss_function):
            losses: Tensor = model(input_ids=inputs, labels=labels).loss
        return losses

    return from_hidden


@torch.compiler.disable  # its loop would become a graph of hundreds of chunks
def _losses_from_hidden(head: nn.Linear, logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
    """Takes the place of a model's loss function; ``logits`` are hidden states, [B, L, d].

    ``labels`` [B, L] are targets as they are, not to be shifted.
    """
    weight = whole_weight(head)
    to_logits = partial(linear, weight=weight)
    losses = token_losses(to_logits, logits.flatten(0, 1), labels.flatten(), len(weight))
    return losses.view(labels.shape)


def evaluate_data_set(
    model: nn.Module,
    data_set: Dataset[dict[str, Tensor]],
    block_size: int,
    accelerator: Accelerator,
    description: str,
) -> dict[str, float | None]:
    """Computes the loss over a data set, in batches as large as the device holds.

    Begins with :func:`largest_batch`, and anew with fewer where the device's memory runs out.

    Args:
        model: As for :func:`evaluate_loss`, with transformers' ``config``.
        data_set: Sequences with ``input_ids`` [L] and ``shift_labels`` [L], int64.
        block_size: L.
        accelerator: As for :func:`evaluate_loss`.
        description: What stands before the progress bar.

    Returns:
        As :func:`evaluate_loss`.

    Raises:
        RuntimeError: Not even one sequence fits.
    """
    unwrapped: Any = accelerator.unwrap_model(model)
    # the widest that there is of a token: its logits, or without whole ones what its MLP computes
    config = unwrapped.config
    width = config.vocab_size if plain_head(unwrapped) is None else 4 * config.hidden_size
    largest = largest_batch(block_size, width, accelerator.device)

    @find_executable_batch_size(starting_batch_size=min(largest, len(data_set)))  # type: ignore[arg-type]
    def evaluate(batch_size: int) -> dict[str, float | None]:
        loader = accelerator.prepare_data_loader(
            DataLoader(data_set, batch_size=batch_size, collate_fn=collate)
        )
        batches = tqdm(loader, description, disable=not accelerator.is_main_process)
        return evaluate_loss(model, batches, accelerator)

    return evaluate()


def largest_batch(block_size: int, width: int, device: torch.device) -> int:
    """Returns how many sequences a batch to evaluate may have at most, at least 1.

    What counts is the widest thing computed of a token, three times in float32: of logits, as the
    model gives them, in float32, and as the loss takes them.

    Args:
        block_size: Tokens of a sequence.
        width: Numbers of a token.
        device: A GPU's free memory is used; of a CPU's a GiB, since it has no more use for it.
    """
    free = 2**30
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    return max(1, min(_LARGEST_BATCH, free // (block_size * width * 3 * 4)))
