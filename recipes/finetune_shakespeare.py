"""Finetune a pretrained causal language model on tiny Shakespeare.

nanoGPT's config/finetune_shakespeare.py with transformers.Trainer: GPT-2 XL, on one large GPU.

    python data_scripts/shakespeare.py
    python recipes/finetune_shakespeare.py --bf16

Any causal language model will do, by its name on the hub or as a local folder, with data in its own
tokens:

    python data_scripts/shakespeare.py --tokenizer MODEL --output_dir data/shakespeare_model
    python recipes/finetune_shakespeare.py --model_name_or_path MODEL \\
        --data_dir data/shakespeare_model --block_size 512

`accelerate launch` works in place of `python`, and every setting of TrainingArguments is a flag.
The folder --output_dir gets the best checkpoint by validation loss.
"""

from dataclasses import dataclass, field

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from striped_hf.cli import UserError, load_pretrained, run
from striped_hf.data import ContiguousBlocks, RandomWindows, collate, open_split
from striped_hf.trainer.arguments import parse_arguments
from striped_hf.trainer.callbacks import RunMeasurements
from striped_hf.trainer.causal_lm import CausalLMTrainer
from striped_hf.trainer.run_folder import finish_run, windows_per_step

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


@dataclass
class Options:
    model_name_or_path: str = field(
        default="gpt2-xl", metadata={"help": "pretrained model: a hub name or a local folder"}
    )
    data_dir: str = field(
        default="data/shakespeare",
        metadata={"help": "folder written by a data script, in the model's own tokens"},
    )
    block_size: int = field(default=1024, metadata={"help": "context, in tokens"})


def main() -> None:
    options, args = parse_arguments(Options, DEFAULTS)
    set_seed(args.seed)
    with args.main_process_first(desc="load the model"):  # it downloads, the others wait
        model = load_pretrained(AutoModelForCausalLM, options.model_name_or_path)
        tokenizer = load_pretrained(AutoTokenizer, options.model_name_or_path)
    longest = getattr(model.config, "max_position_embeddings", options.block_size)
    if options.block_size > longest:
        raise UserError(
            f"--block_size {options.block_size} is more than {options.model_name_or_path} was made "
            f"for: pass --block_size {longest} or less"
        )
    train, val = (
        open_split(options.data_dir, split, vocab_size=model.config.vocab_size)
        for split in ("train", "val")
    )

    measurements = RunMeasurements()
    trainer = CausalLMTrainer(
        model=model,
        args=args,
        train_dataset=RandomWindows(
            train, options.block_size, args.max_steps * windows_per_step(args), args.seed
        ),
        eval_dataset=ContiguousBlocks(val, options.block_size),
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=[measurements],
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    log = trainer.state.log_history
    before = next((entry["eval_loss"] for entry in log if "eval_loss" in entry), float("nan"))
    result = finish_run(trainer, measurements, train, base_model=options.model_name_or_path)
    if trainer.is_world_process_zero():
        print(
            f"val loss {before:.4f} before, {result['eval_loss']:.4f} after {result['steps']} "
            f"steps; the model is in {args.output_dir}"
        )


if __name__ == "__main__":
    run(main)
