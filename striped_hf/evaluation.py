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

_LARGEST_BATCH = 64  # sequences; larger batches are not faster


def mean_token_loss(losses: Sequence[float], tokens: Sequence[int]) -> dict[str, float | None]:
    """Computes the mean loss per token over sequences.

    Args:
        losses: The sum of the token losses of each sequence, in nats.
        tokens: The number of summed tokens of each sequence.

    Returns:
        ``loss``: nats per token; all tokens have the same weight.
        ``standard_error``: of the loss, from the scatter between sequences, because the tokens of
        one sequence are not independent. None for a single sequence.
        ``perplexity``: exp(loss).
        ``tokens``: the number of tokens.

    Raises:
        ValueError: There is no token.
    """
    # a sequence without targets is not an observation
    counts = torch.tensor([count for count in tokens if count], dtype=torch.float64)
    sums = torch.tensor(
        [loss for loss, count in zip(losses, tokens, strict=True) if count], dtype=torch.float64
    )
    total, sequences = int(counts.sum()), len(counts)
    if total == 0:
        raise ValueError("the evaluation data holds no targets: pass data that has labels")
    loss = (sums.sum() / total).item()
    # the standard error of a ratio of two sums over sequences
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
    """Computes the loss over all targets of some batches, with the same weight for each target.

    A mean over batches gives targets unequal weights if batches have different numbers of targets
    (masked labels, a shorter last block), and the perplexity is then wrong. Works on any number of
    processes, each with its own share of the batches.

    For GPT-2, Llama and other models with a :func:`striped_hf.losses.plain_head`, the whole logits
    are never in memory. For other models they are, in the model's own dtype.

    Args:
        model: A causal language model; ``accelerator`` has prepared it if there are several
            processes. Its training mode is the same before and after.
        batches: Dicts on the model's device with ``input_ids`` [B, L] and ``shift_labels`` [B, L],
            int64: the target of each position, -100 for none. Copies with which a prepared data
            loader padded its last batch are not counted.
        accelerator: Gathers the losses of all processes.

    Returns:
        The results of :func:`mean_token_loss`; each row of a batch is a sequence.

    Raises:
        ValueError: There was no target.
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
    """Returns a function from inputs and targets [B, L] to losses [B, L]."""
    unwrapped: Any = accelerator.unwrap_model(model)
    # each copy of DataParallel has its own output layer
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
    """Replaces a model's loss function; ``logits`` are hidden states, [B, L, d].

    ``labels`` [B, L] are shifted already.
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
    """Computes the loss over a data set, in batches as large as the device can hold.

    The first try uses :func:`largest_batch`. If the device runs out of memory, the evaluation
    starts again with smaller batches.

    Args:
        model: As for :func:`evaluate_loss`, with a transformers ``config``.
        data_set: Sequences with ``input_ids`` [L] and ``shift_labels`` [L], int64.
        block_size: L.
        accelerator: As for :func:`evaluate_loss`.
        description: The label of the progress bar.

    Returns:
        The results of :func:`evaluate_loss`.

    Raises:
        RuntimeError: A batch of one sequence does not fit into memory.
    """
    unwrapped: Any = accelerator.unwrap_model(model)
    # the widest activation of a token: its logits, or, without whole logits, its MLP's
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
    """Returns the largest number of sequences for an evaluation batch, at least 1.

    The estimate is three float32 copies of a token's widest activation: for logits, the model's
    output, its float32 copy, and the loss function's copy.

    Args:
        block_size: The number of tokens in a sequence.
        width: The number of values of a token's widest activation.
        device: The estimate uses the free memory of a GPU, and 1 GiB on a CPU.
    """
    free = 2**30
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    return max(1, min(_LARGEST_BATCH, free // (block_size * width * 3 * 4)))
