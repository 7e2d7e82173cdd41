"""A Trainer for benchmarks of training: it only trains, on random tokens.

It downloads, saves, evaluates and reports nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from striped_hf.data import collate
from striped_hf.trainer.causal_lm import CausalLMTrainer


class RandomTokens(Dataset[dict[str, torch.Tensor]]):
    """A data set that repeats a few windows of random tokens.

    Args:
        vocab_size: The vocabulary size.
        block_size: The length of a window, in tokens.
        windows: The number of different windows.
        length: The number of items in the data set.
    """

    def __init__(self, vocab_size: int, block_size: int, windows: int, length: int) -> None:
        self.tokens = torch.randint(vocab_size, (windows, block_size + 1))
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        windows = self.tokens[torch.as_tensor(indices) % len(self.tokens)]
        labels = windows[:, 1:].contiguous()
        return {"input_ids": windows[:, :-1], "labels": labels, "shift_labels": labels}


def make_trainer(
    model: nn.Module,
    train: Dataset[Any],
    device: str,
    callbacks: list[TrainerCallback],
    **settings: Any,
) -> CausalLMTrainer:
    """Makes a Trainer for a benchmark.

    Args:
        model: A model, on the device already.
        train: The training data.
        device: "cuda" or "cpu".
        callbacks: Further callbacks.
        settings: Settings of TrainingArguments, including ``output_dir`` and ``max_steps``.
    """
    on_gpu = device == "cuda"
    args = TrainingArguments(
        **{
            "eval_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "logging_nan_inf_filter": False,
            "dataloader_pin_memory": on_gpu,
            "accelerator_config": {"non_blocking": on_gpu},
            "use_cpu": not on_gpu,
            **settings,
        }
    )
    return CausalLMTrainer(
        model=model, args=args, train_dataset=train, data_collator=collate, callbacks=callbacks
    )
