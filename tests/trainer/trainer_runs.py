"""Tiny models and data, and real ``transformers.Trainer`` runs over them."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

import striped_hf

VOCAB_SIZE, LENGTH = 64, 16
NAMES = {"striped_adamw": "float32", "striped_adamw_8bit": "int8", "striped_adamw_4bit": "int4"}
LAYERWISE = {f"{name}_layerwise": momentum_dtype for name, momentum_dtype in NAMES.items()}
TEXT = "the cat sat on the mat and the dog sat on the log"
WIDE = 256  # a square matrix of so many rows is the smallest whose gradient is freed


class Counting(Dataset[dict[str, torch.Tensor]]):
    """Sequences that count upwards, with different starts and strides."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (index + torch.arange(LENGTH) * (1 + index % 3)) % VOCAB_SIZE
        return {"input_ids": ids, "labels": ids}


def tiny_model(kind: str, width: int = 32, vocab_size: int = VOCAB_SIZE) -> PreTrainedModel:
    """A GPT-2 (with packed projections, tied embeddings, dropout) or a Llama (without them)."""
    set_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab_size, n_positions=LENGTH, n_embd=width, n_layer=2, n_head=2, **ids
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            **ids,
        )
    )


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {token: i for i, token in enumerate(["<eos>", *sorted(set(TEXT))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", bos_token="<eos>"
    )


def arguments(output_dir: Path | str, **changes: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(output_dir),
            "max_steps": 8,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 64,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "lr_scheduler_type": "cosine",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **changes,
        }
    )


def train(
    kind: str,
    output_dir: Path | str,
    resume_from: Path | None = None,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Trainer:
    trainer = Trainer(
        tiny_model(kind).to(dtype),
        arguments(output_dir, **changes),
        train_dataset=Counting(),
        eval_dataset=Counting(),
    )
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    return trainer


def optimizer_of(trainer: Trainer) -> striped_hf.StripedAdamW:
    # accelerate wraps the optimizer
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def packed_count(optimizer: striped_hf.StripedAdamW) -> int:
    """The number of matrices whose state has the blocks of GPT-2's c_attn."""
    return sum(
        state["exp_avg_sq_row"].shape[-1] == 3
        for state in optimizer.state.values()
        if "exp_avg_sq_row" in state
    )


def stepped(optimizer: striped_hf.StripedAdamW, model: torch.nn.Module) -> striped_hf.StripedAdamW:
    """Steps once on a short sequence, without Trainer."""
    ids = torch.arange(8)[None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    return optimizer
