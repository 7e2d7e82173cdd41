"""Trains with an ordinary and a layerwise optimizer under DDP, and prints their results.

Script: ``accelerate launch layerwise_ddp.py FOLDER``; see ``test_layerwise_ddp.py``.
"""

import json
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from striped_hf import losses
from striped_hf.cli import run
from striped_hf.trainer.causal_lm import CausalLMTrainer

WIDTH = 256


class Windows(Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        tokens = (i + torch.arange(16) * (1 + i % 3)) % 64
        return {"input_ids": tokens, "labels": tokens}


class Kept(TrainerCallback):
    """Counts the large matrices that have a gradient before each step."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_pre_optimizer_step(self, *args, model: nn.Module, **kwargs) -> None:
        large = [p for p in model.parameters() if p.numel() >= WIDTH**2]
        self.counts.append(sum(p.grad is not None for p in large))


def train(
    optim: str, max_grad_norm: float, accumulation: int, trainer_class: type[Trainer] = Trainer
) -> dict:
    set_seed(0)
    sizes = {"vocab_size": WIDTH, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0)
    args = TrainingArguments(
        sys.argv[1],
        optim=optim,
        max_steps=3,
        learning_rate=1e-3,
        max_grad_norm=max_grad_norm,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    kept = Kept()
    model = LlamaForCausalLM(config)
    trainer = trainer_class(model, args, train_dataset=Windows(), callbacks=[kept])
    trainer.train()
    assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    everywhere = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, weights)
    return {
        "kept": kept.counts,
        "replicas agree": all(torch.equal(weights, each) for each in everywhere),
        "weights": weights.double().abs().sum().item(),
        "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e],
        "norms": [e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e],
    }


def main() -> None:
    results = {}
    for optim in ("striped_adamw", "striped_adamw_layerwise"):
        for max_grad_norm, accumulation in ((0.0, 1), (1.0, 1), (1.0, 2)):
            results[f"{optim} {max_grad_norm} {accumulation}"] = train(
                optim, max_grad_norm, accumulation
            )
    losses._CHUNK_LOGITS = 1 << 12
    in_chunks = train("striped_adamw_layerwise", 0.0, 1, CausalLMTrainer)
    results["striped_adamw_layerwise in chunks"] = in_chunks
    if dist.get_rank() == 0:
        print("RESULTS", json.dumps(results))


if __name__ == "__main__":
    run(main)
