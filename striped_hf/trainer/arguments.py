"""The command line of the recipes: their own options, and all of TrainingArguments as flags."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import HfArgumentParser, TrainingArguments, get_scheduler

from striped_hf.cli import UserError, one_line
from striped_hf.trainer.resuming import check_whole, last_checkpoint

OptionsT = TypeVar("OptionsT")

# Trainer's defaults for every recipe. A recipe's own defaults override them, then the user's flags.
_DEFAULTS: dict[str, Any] = {
    "remove_unused_columns": False,  # otherwise Trainer drops shift_labels
    "dataloader_pin_memory": torch.cuda.is_available(),
    "accelerator_config": {"non_blocking": torch.cuda.is_available()},  # copies overlap the step
    "per_device_eval_batch_size": 64,
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "save_total_limit": 2,  # the best checkpoint and the last
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": False,
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # its check for NaN waits for the GPU in each step
    # without a GPU accelerate would treat each of several processes as a separate run
    "use_cpu": not torch.accelerator.is_available(),
    "report_to": "none",  # transformers 4 reports to all installed trackers
    "log_level_replica": "error",  # the main process logs the rest
    "log_on_each_node": False,
    # the models use all parameters, and a search costs time in every step; DDP reports unused ones
    "ddp_find_unused_parameters": False,
}
# Under FSDP each accumulated pass reduces its gradients to shards. Otherwise every device would
# hold whole gradients until the step.
_FSDP_DEFAULTS = {
    "accelerator_config": {
        **_DEFAULTS["accelerator_config"],
        "gradient_accumulation_kwargs": {"sync_each_batch": True},
    },
}


_POSITIVE = (
    *("max_steps", "per_device_train_batch_size", "per_device_eval_batch_size"),
    *("gradient_accumulation_steps", "block_size", "n_layer", "n_head", "n_embd"),
)


@dataclass
class RecipeArguments(TrainingArguments):
    """All of TrainingArguments, and the option of ``striped_hf.trainer.watching``."""

    peak_tflops: float | None = field(
        default=None,
        metadata={"help": "the device's dense bfloat16 TFLOPS, for MFU if the table lacks it"},
    )

    def __post_init__(self) -> None:
        """Checks the peak."""
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ValueError(
                f"--peak_tflops {self.peak_tflops}: must be positive, such as 312 for an A100"
            )
        super().__post_init__()


def parse_arguments(
    options_class: type[OptionsT],
    defaults: dict[str, Any],
    presets: dict[str, dict[str, Any]] | None = None,
) -> tuple[OptionsT, RecipeArguments]:
    """Parses a recipe's command line.

    Args:
        options_class: A dataclass of the recipe's own options. With ``presets`` it has a field
            ``preset``, with the name of a preset as its default.
        defaults: The recipe's defaults, for its own options and for TrainingArguments. A default
            ``optim_args`` applies to the default ``optim`` only, and a default
            ``lr_scheduler_kwargs`` to the default ``lr_scheduler_type`` only.
        presets: Named sets of further defaults, for ``--preset``.

    Returns:
        The recipe's options and the training arguments. ``resume_from_checkpoint="last"`` is
        resolved to the newest whole checkpoint in ``output_dir``.

    Raises:
        SystemExit: A flag is unknown or its value is wrong; the message names it.
    """
    parser = HfArgumentParser((options_class, RecipeArguments))  # type: ignore[arg-type]
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"  # set by the launcher
    defaults = {**_DEFAULTS, **(_FSDP_DEFAULTS if fsdp else {}), **defaults}
    defaults["accelerator_config"] = json.dumps(defaults["accelerator_config"])
    parser.set_defaults(**defaults)
    given = parser.parse_known_args()[0]
    if presets is not None:
        if given.preset not in presets:
            parser.error(f"--preset {given.preset}: choose one of {', '.join(presets)}")
        defaults |= presets[given.preset]
    # the default's arguments are not for another optimizer or schedule
    for name, own in (("optim", "optim_args"), ("lr_scheduler_type", "lr_scheduler_kwargs")):
        if name in defaults and getattr(given, name) != defaults[name]:
            defaults.pop(own, None)
            parser.set_defaults(**{own: None})
    parser.set_defaults(**defaults)
    try:
        options, args = parser.parse_args_into_dataclasses()
    except (ValueError, TypeError, ImportError, RuntimeError) as error:  # TrainingArguments' own
        parser.error(one_line(error))
    for name in _POSITIVE:
        value = getattr(args, name, None) or getattr(options, name, None) or 0
        if value < 1 and (hasattr(args, name) or hasattr(options, name)):
            more = "; the recipes count steps, not epochs" if name == "max_steps" else ""
            parser.error(f"--{name} {value}: pass a number above 0{more}")
    _check_schedule(parser, args)
    if fsdp and args.use_cpu:
        parser.error(
            "FSDP needs GPUs, and there is none or --use_cpu was passed: accelerate would run DDP "
            "instead; launch with recipes/accelerate/ddp.yaml"
        )
    try:
        _find_checkpoint(args)
    except UserError as error:
        parser.error(str(error))
    return options, args


def _find_checkpoint(args: TrainingArguments) -> None:
    """Resolves ``resume_from_checkpoint`` to the folder of a whole checkpoint, or to None."""
    given = args.resume_from_checkpoint
    if given is None or given.lower() == "false":
        args.resume_from_checkpoint = None
    elif given == "last" or given.lower() == "true":  # Trainer accepts true for it
        found = last_checkpoint(args.output_dir or "")
        if found is None:
            raise UserError(
                f"--resume_from_checkpoint {given}: {args.output_dir} has no checkpoint yet; leave "
                "the flag out to begin"
            )
        args.resume_from_checkpoint = str(found)
    else:
        check_whole(Path(given))


def _check_schedule(parser: HfArgumentParser, args: TrainingArguments) -> None:
    """Makes the schedule once, to check its arguments before the run begins."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    arguments: Any = args.lr_scheduler_kwargs
    try:
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(args.max_steps),
            num_training_steps=args.max_steps,
            scheduler_specific_kwargs=dict(arguments or {}),
        )
    except (TypeError, ValueError) as error:
        kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        parser.error(
            f"--lr_scheduler_type {kind} and --lr_scheduler_kwargs {args.lr_scheduler_kwargs}: "
            f"the schedule takes other arguments ({one_line(error)})"
        )
