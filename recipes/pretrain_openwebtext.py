"""Pretrain GPT-2 124M, or any other causal language model, on OpenWebText from scratch.

nanoGPT's config/train_gpt2.py with transformers.Trainer, on 8 GPUs, or on fewer with more gradient
accumulation:

    python data_scripts/openwebtext.py
    accelerate launch --config_file recipes/accelerate/ddp.yaml --num_processes 8 \\
        recipes/pretrain_openwebtext.py --bf16 --torch_compile

--model is one of GPT-2's four sizes. --config_name is any configuration of transformers: a name on
the hub, a folder or a file. The recipe has two of GPT-2's size with rotary position embeddings:

    python recipes/pretrain_openwebtext.py --config_name recipes/configs/llama_124m.json
    python recipes/pretrain_openwebtext.py --config_name recipes/configs/qwen3_124m.json

With --batch_size_warmup N the batch grows linearly over the first N tokens, from one micro-batch
per process to the full batch. The run takes more steps for the same tokens, and the learning rate
at each token stays the same. Every setting of TrainingArguments is a flag. To resume a run, pass
--resume_from_checkpoint last. The folder --output_dir gets the best checkpoint by validation loss.
"""

import os
from dataclasses import dataclass, field

from transformers import GPT2Config, PretrainedConfig, set_seed

from striped_hf.cli import UserError, is_main_process, run
from striped_hf.data import ContiguousBlocks, RandomWindows, collate, open_split
from striped_hf.pretrained import data_tokenizer, load_config, new_model
from striped_hf.published_configs import GPT2_SIZES
from striped_hf.results import loss_text
from striped_hf.trainer.arguments import RecipeArguments, parse_arguments
from striped_hf.trainer.callbacks import RunMeasurements
from striped_hf.trainer.pretraining import PretrainingTrainer
from striped_hf.trainer.resuming import windows_per_step
from striped_hf.trainer.run_folder import finish_run, run_folder, train

DEFAULTS = {
    "output_dir": "out/pretrain_openwebtext",
    "optim": "striped_adamw_8bit",
    # 12 windows x 1,024 tokens x 5 accumulation steps x 8 GPUs = 491,520 tokens a step,
    # x 600,000 steps = 295 B tokens, 33 passes over OpenWebText; fewer GPUs accumulate more
    "per_device_train_batch_size": 12,
    "gradient_accumulation_steps": max(1, 5 * 8 // int(os.environ.get("WORLD_SIZE", "1"))),
    "max_steps": 600_000,
    # from 6e-4 to 6e-5 along a cosine, after 2,000 steps = 983 M tokens of warm-up
    "learning_rate": 6e-4,
    "lr_scheduler_type": "cosine_warmup_with_min_lr",
    "lr_scheduler_kwargs": '{"min_lr_rate": 0.1}',
    "warmup_steps": 2000,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "eval_steps": 1000,
    "save_steps": 1000,
    "per_device_eval_batch_size": 12,
    "seed": 1337,
}


@dataclass
class Options:
    model: str = field(default="gpt2", metadata={"help": f"one of {', '.join(GPT2_SIZES)}"})
    config_name: str | None = field(
        default=None,
        metadata={"help": "configuration instead of --model: a hub name, a folder or a file"},
    )
    data_dir: str = field(
        default="data/openwebtext", metadata={"help": "folder written by a data script"}
    )
    block_size: int = field(default=1024, metadata={"help": "context, in tokens"})
    batch_size_warmup: int = field(
        default=0, metadata={"help": "tokens over which the batch grows; 0: full from the start"}
    )


def make_config(options: Options) -> PretrainedConfig:
    if options.config_name is not None:
        return load_config(options.config_name)
    if options.model not in GPT2_SIZES:
        raise UserError(
            f"--model {options.model}: choose one of {', '.join(GPT2_SIZES)}, or pass another "
            "configuration with --config_name"
        )
    return GPT2Config(
        **GPT2_SIZES[options.model],
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",  # GPT-2's gelu_new in one kernel
    )


def train_model(options: Options, args: RecipeArguments) -> None:
    train_split, val_split = (open_split(options.data_dir, split) for split in ("train", "val"))
    tokenizer = data_tokenizer(options.data_dir)
    set_seed(args.seed)
    with args.main_process_first(desc="load the configuration"):  # only one process downloads it
        config = make_config(options)
    # round up to a multiple of 64, which is faster on GPUs: 50,257 becomes 50,304
    config.vocab_size = -(-max(train_split.vocab_size, val_split.vocab_size) // 64) * 64
    config.max_position_embeddings = options.block_size
    config.bos_token_id = config.eos_token_id = getattr(tokenizer, "eos_token_id", None)
    config.pad_token_id = None
    model = new_model(config)

    measurements = RunMeasurements()
    windows = args.max_steps * windows_per_step(args)
    try:
        trainer = PretrainingTrainer(
            model=model,
            args=args,
            train_dataset=RandomWindows(train_split, options.block_size, windows, args.seed),
            eval_dataset=ContiguousBlocks(val_split, options.block_size),
            data_collator=collate,
            processing_class=tokenizer,
            callbacks=[measurements],
            batch_size_warmup=options.batch_size_warmup,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    if is_main_process():
        print(
            f"{type(model).__name__} of {model.num_parameters():,} parameters; "
            f"{windows_per_step(args) * options.block_size:,} tokens a full step, "
            f"{trainer.args.max_steps:,} steps, {windows * options.block_size:,} tokens in all",
            flush=True,
        )
    train(trainer, args, batch_size_warmup=options.batch_size_warmup)
    result = finish_run(trainer, measurements, train_split)
    if trainer.is_world_process_zero():
        print(
            f"train loss {loss_text(result['train_loss'])}, "
            f"val loss {loss_text(result['eval_loss'])}; the model is in {args.output_dir}"
        )


def main() -> None:
    options, args = parse_arguments(Options, DEFAULTS)
    with run_folder(args):
        train_model(options, args)


if __name__ == "__main__":
    run(main)
