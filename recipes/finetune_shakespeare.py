"""Finetune a pretrained causal language model on tiny Shakespeare.

nanoGPT's config/finetune_shakespeare.py with transformers.Trainer: GPT-2 XL, on one large GPU.

    python data_scripts/shakespeare.py
    python recipes/finetune_shakespeare.py --bf16

Any causal language model works, by its name on the hub or as a local folder. The data must be in
the model's own tokens:

    python data_scripts/shakespeare.py --tokenizer MODEL --output_dir data/shakespeare_model
    python recipes/finetune_shakespeare.py --model_name_or_path MODEL \\
        --data_dir data/shakespeare_model --block_size 512

`accelerate launch` works instead of `python`, and every setting of TrainingArguments is a flag.
The folder --output_dir gets the best checkpoint by validation loss.

The weights are trained and saved in float32, whatever the dtype of the saved model, and --bf16
computes in bfloat16. --dtype bfloat16 trains and saves them in bfloat16, with half of the memory
for weights and gradients, and --dtype auto in the dtype of the saved model. StripedAdamW rounds
bfloat16 weights stochastically, which keeps the loss. AdamW and most other optimizers round them to
nearest, which drops most updates at this learning rate. So float32, which is right with every
--optim, is the default.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, set_seed

from striped_hf.cli import UserError, run
from striped_hf.data import ContiguousBlocks, RandomWindows, collate, open_split
from striped_hf.pretrained import check_length, check_tokens, load_model, load_tokenizer
from striped_hf.results import loss_text
from striped_hf.trainer.arguments import RecipeArguments, parse_arguments
from striped_hf.trainer.callbacks import RunMeasurements
from striped_hf.trainer.causal_lm import CausalLMTrainer
from striped_hf.trainer.resuming import windows_per_step
from striped_hf.trainer.run_folder import dtype_name, finish_run, run_folder, train

DEFAULTS = {
    "output_dir": "out/finetune_shakespeare",
    "optim": "striped_adamw_8bit",
    # 1 window x 1,024 tokens x 32 gradient accumulation steps = 32,768 tokens a step; the train
    # split has 301,966 GPT-2 tokens, so 20 steps are a little over two passes
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 32,
    "max_steps": 20,
    "learning_rate": 3e-5,
    "lr_scheduler_type": "constant",
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "eval_on_start": True,
    "eval_steps": 5,
    "save_steps": 5,
    "per_device_eval_batch_size": 4,
    "logging_steps": 1,
    "seed": 1337,
}

DTYPES = ("float32", "bfloat16")
AUTO = "auto"


@dataclass
class Options:
    model_name_or_path: str = field(
        default="gpt2-xl", metadata={"help": "pretrained model: a hub name or a local folder"}
    )
    data_dir: str = field(
        default="data/shakespeare",
        metadata={"help": "folder written by a data script, with the model's tokenizer"},
    )
    block_size: int = field(default=1024, metadata={"help": "context, in tokens"})
    dtype: str = field(
        default="float32",
        metadata={
            "help": f"dtype in which weights are trained and saved: {', '.join(DTYPES)}, or {AUTO} "
            "for the saved model's"
        },
    )


def load(name: str, dtype: str) -> PreTrainedModel:
    model = load_model(name, AUTO if dtype == AUTO else getattr(torch, dtype))
    if dtype == AUTO and (saved := dtype_name(model.dtype)) not in DTYPES:
        raise UserError(
            f"--dtype {AUTO}: {name} was saved in {saved}, in which gradients would underflow: "
            "pass --dtype bfloat16, or float32"
        )
    return model


def train_model(options: Options, args: RecipeArguments) -> None:
    name = options.model_name_or_path
    set_seed(args.seed)
    with args.main_process_first(desc="load the model"):  # only one process downloads it
        model = load(name, options.dtype)
        tokenizer = load_tokenizer(name)
        check_tokens(options.data_dir, name, tokenizer)
    check_length("--block_size", options.block_size, name, model.config)
    train_split, val_split = (
        open_split(options.data_dir, split, vocab_size=model.config.vocab_size)
        for split in ("train", "val")
    )

    measurements = RunMeasurements()
    trainer = CausalLMTrainer(
        model=model,
        args=args,
        train_dataset=RandomWindows(
            train_split, options.block_size, args.max_steps * windows_per_step(args), args.seed
        ),
        eval_dataset=ContiguousBlocks(val_split, options.block_size),
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=[measurements],
    )
    base = Path(name).resolve().name if Path(name).exists() else name
    train(trainer, args, base_model=base, dtype=dtype_name(model.dtype))
    log = trainer.state.log_history
    before = next((entry["eval_loss"] for entry in log if "eval_loss" in entry), None)
    result = finish_run(trainer, measurements, train_split, base_model=name)
    if trainer.is_world_process_zero():
        print(
            f"val loss {loss_text(before)} before, {loss_text(result['eval_loss'])} after "
            f"{result['steps']} steps; the model is in {args.output_dir}"
        )


def main() -> None:
    options, args = parse_arguments(Options, DEFAULTS)
    if options.dtype not in (*DTYPES, AUTO):
        raise UserError(f"--dtype {options.dtype}: choose one of {', '.join((*DTYPES, AUTO))}")
    with run_folder(args):
        train_model(options, args)


if __name__ == "__main__":
    run(main)
