"""Train a character-level GPT on tiny Shakespeare (or any data set of data_scripts/) from scratch.

nanoGPT's config/train_shakespeare_char.py with transformers.Trainer, on one GPU:

    python data_scripts/shakespeare_char.py
    python recipes/train_shakespeare_char.py

and its command for a CPU (context 64, 4 layers, 2,000 steps; a minute and a half on 2 cores):

    python recipes/train_shakespeare_char.py --preset cpu

`accelerate launch` works instead of `python`, and every setting of TrainingArguments is a flag:
--optim adamw_torch_fused, --learning_rate 2e-3, --seed 1, --bf16, --report_to wandb,
--resume_from_checkpoint out/shakespeare_char/checkpoint-1000 (or `last`). It logs every
--logging_steps steps (10), evaluates every --eval_steps, saves every --save_steps, and keeps
--save_total_limit checkpoints (2: the best and the last).
"""

from dataclasses import dataclass, field

from transformers import GPT2Config, set_seed

from striped_hf.cli import run
from striped_hf.data import ContiguousBlocks, RandomWindows, collate, open_split
from striped_hf.pretrained import data_tokenizer, new_model
from striped_hf.results import loss_text
from striped_hf.trainer.arguments import RecipeArguments, parse_arguments
from striped_hf.trainer.callbacks import RunMeasurements
from striped_hf.trainer.causal_lm import CausalLMTrainer
from striped_hf.trainer.resuming import windows_per_step
from striped_hf.trainer.run_folder import finish_run, run_folder, train

DEFAULTS = {
    "output_dir": "out/shakespeare_char",
    "optim": "striped_adamw_8bit",
    "lr_scheduler_type": "cosine_warmup_with_min_lr",
    "lr_scheduler_kwargs": '{"min_lr_rate": 0.1}',
    "warmup_steps": 100,
    "adam_beta2": 0.99,  # few tokens per step: the second moment is noisy
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "seed": 1337,
}
PRESETS = {
    # 64 windows x 256 characters = 16,384 tokens a step, x 5,000 steps = 82 M tokens
    "gpu": {
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 384,
        "block_size": 256,
        "dropout": 0.2,
        "per_device_train_batch_size": 64,
        "max_steps": 5000,
        "learning_rate": 1e-3,
        "eval_steps": 250,
        "save_steps": 250,
    },
    # 12 windows x 64 characters = 768 tokens a step, x 2,000 steps = 1.5 M tokens
    "cpu": {
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 128,
        "block_size": 64,
        "dropout": 0.0,
        "per_device_train_batch_size": 12,
        "max_steps": 2000,
        "learning_rate": 4e-3,  # nanoGPT's is 1e-3; docs/benchmarks.md compares them
        "optim_args": "nesterov=true",
        "eval_steps": 500,
        "save_steps": 500,
    },
}


@dataclass
class Options:
    preset: str = field(default="gpu", metadata={"help": "settings to start from: gpu or cpu"})
    data_dir: str = field(
        default="data/shakespeare_char", metadata={"help": "folder written by a data script"}
    )
    n_layer: int = field(default=6, metadata={"help": "transformer blocks"})
    n_head: int = field(default=6, metadata={"help": "attention heads"})
    n_embd: int = field(default=384, metadata={"help": "width of the embedding"})
    block_size: int = field(default=256, metadata={"help": "context, in tokens"})
    dropout: float = field(default=0.2, metadata={"help": "after embedding, attention and MLP"})


def train_model(options: Options, args: RecipeArguments) -> None:
    train_split, val_split = (open_split(options.data_dir, split) for split in ("train", "val"))
    set_seed(args.seed)
    config = GPT2Config(
        vocab_size=max(train_split.vocab_size, val_split.vocab_size),
        n_positions=options.block_size,
        n_layer=options.n_layer,
        n_head=options.n_head,
        n_embd=options.n_embd,
        embd_pdrop=options.dropout,
        attn_pdrop=options.dropout,
        resid_pdrop=options.dropout,
        activation_function="gelu",  # as in nanoGPT; twice as fast as GPT-2's on a CPU
        bos_token_id=None,
        eos_token_id=None,
    )
    measurements = RunMeasurements()
    trainer = CausalLMTrainer(
        model=new_model(config),
        args=args,
        train_dataset=RandomWindows(
            train_split, options.block_size, args.max_steps * windows_per_step(args), args.seed
        ),
        eval_dataset=ContiguousBlocks(val_split, options.block_size),
        data_collator=collate,
        processing_class=data_tokenizer(options.data_dir),
        callbacks=[measurements],
    )
    train(trainer, args)
    result = finish_run(trainer, measurements, train_split)
    if trainer.is_world_process_zero():
        print(
            f"train loss {loss_text(result['train_loss'])}, "
            f"val loss {loss_text(result['eval_loss'])}; the model is in {args.output_dir}"
        )


def main() -> None:
    options, args = parse_arguments(Options, DEFAULTS, PRESETS)
    with run_folder(args):
        train_model(options, args)


if __name__ == "__main__":
    run(main)
