"""Checks before a run resumes: the checkpoint is whole, and it belongs to the same run."""

import hashlib
import json
import re
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from striped_hf.cli import UserError, is_main_process, one_line
from striped_hf.data import ContiguousBlocks, RandomWindows
from striped_hf.differences import differences

IDENTITY = "run_identity.json"  # a file in each checkpoint
_STATE = "trainer_state.json"
# Arguments that a checkpoint overrides silently, or that would make its counts and windows wrong.
# `optim` is not among them: a run may continue with another optimizer.
_ARGUMENTS = (
    *("seed", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
)


def run_identity(trainer: Trainer, args: TrainingArguments, **options: Any) -> dict[str, Any]:
    """Describes a run by its data, model, batch and schedule. Other values make another run.

    Args:
        trainer: Before ``train()``, over the data sets of ``striped_hf.data``.
        args: The parsed arguments.
        options: The recipe's own settings that are part of the identity.

    Returns:
        JSON-serializable values. They include ``max_steps``, which a resumed run may change.
    """
    train, val = trainer.train_dataset, trainer.eval_dataset
    assert isinstance(train, RandomWindows)
    assert isinstance(val, ContiguousBlocks)
    tokenizer: Any = trainer.processing_class
    vocabulary = None
    if tokenizer is not None:
        entries = json.dumps(sorted(tokenizer.get_vocab().items()))
        vocabulary = hashlib.sha256(entries.encode()).hexdigest()[:16]
    config = trainer.model.config.to_dict()  # type: ignore[union-attr,operator]
    identity = {
        "data": {
            "train": train.split.fingerprint(),
            "val": val.split.fingerprint(),
            "vocabulary": vocabulary,
        },
        "model": {
            key: value
            for key, value in config.items()
            if isinstance(value, int | float | str)
            and key not in ("transformers_version", "dtype", "torch_dtype", "use_cache")
            and not key.startswith("_")
        },
        "block_size": train.block_size,
        "windows_per_step": windows_per_step(args),
        "max_steps": args.max_steps,
        **{name: getattr(args, name) for name in _ARGUMENTS},
        **options,
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


def windows_per_step(args: TrainingArguments) -> int:
    """Returns the number of windows in one optimizer step, over all processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def check_same_run(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Checks that a checkpoint belongs to this run.

    Args:
        checkpoint: A folder that :func:`check_whole` has accepted.
        identity: This run's identity, from :func:`run_identity`.

    Raises:
        UserError: The checkpoint belongs to another run; the message names the differences.
    """
    path = checkpoint / IDENTITY
    if not path.exists():
        _note(
            f"{checkpoint} does not name its run: make sure that data, model, batch and schedule "
            "are the same"
        )
        return
    before, now = json.loads(path.read_text(encoding="utf-8")), dict(identity)
    steps = before.pop("max_steps", None), now.pop("max_steps", None)
    before.pop("save_only_model", None)
    # ignore configuration entries that another version of transformers adds
    shared = before.get("model", {}).keys() & now["model"].keys()
    for each in (before, now):
        each["model"] = {key: each.get("model", {})[key] for key in sorted(shared)}
    if found := differences(before, now):
        raise UserError(
            f"--resume_from_checkpoint {checkpoint} belongs to another run ({found}): pass the "
            "settings of that run to continue it, or leave the flag out and pass another "
            "--output_dir to start anew"
        )
    if steps[0] != steps[1]:
        _note(
            f"continuing from {checkpoint}: its run had {steps[0]} steps, this run has {steps[1]}"
        )


def last_checkpoint(output_dir: str) -> Path | None:
    """Finds the newest whole checkpoint, and prints what is wrong with newer ones.

    Returns:
        None if there is no checkpoint at all.

    Raises:
        UserError: There are checkpoints, but none is whole.
    """
    found = checkpoints(Path(output_dir))
    wrong = None
    for checkpoint in reversed(found):
        if wrong is not None:
            _note(f"{wrong}; continuing from {checkpoint}, the checkpoint before it")
        try:
            check_whole(checkpoint)
        except UserError as error:
            wrong = error
        else:
            return checkpoint
    if wrong is not None:
        raise wrong
    return None


def checkpoints(run_dir: Path) -> list[Path]:
    """Lists a run's checkpoints, the earliest step first."""
    if not run_dir.is_dir():
        return []
    steps = {
        int(found[1]): folder
        for folder in run_dir.iterdir()
        if (found := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name))
    }
    return [steps[step] for step in sorted(steps)]


def check_whole(checkpoint: Path) -> None:
    """Checks that a folder is a checkpoint with all files that a run needs to continue.

    Reads JSON files, the headers of safetensors files and torch's files with their checksums.

    Raises:
        UserError: It is no checkpoint, or a file is missing or damaged; the message names it.
    """
    flag = f"--resume_from_checkpoint {checkpoint}"
    if not checkpoint.is_dir():
        raise UserError(f"{flag}: there is no such folder; pass a checkpoint's, or `last`")
    names = {path.name for path in checkpoint.iterdir()}
    lacking = [] if _STATE in names else [_STATE]
    if not any(name.startswith(("optimizer.", "optimizer_")) for name in names):
        lacking.append("optimizer.pt")
    if "scheduler.pt" not in names:
        lacking.append("scheduler.pt")
    if lacking and (inside := checkpoints(checkpoint)):
        raise UserError(f"{flag} is a run's folder: pass its checkpoint, such as {inside[-1]}")
    if _STATE not in lacking and lacking and _saved_only_model(checkpoint):
        _note(f"{checkpoint} was saved by --save_only_model: optimizer and schedule start anew")
    elif lacking:
        raise UserError(
            f"{flag} lacks {' and '.join(lacking)}, without which a run begins anew: pass a "
            "checkpoint that has it, or leave the flag out"
        )
    for path in sorted(filter(Path.is_file, checkpoint.rglob("*"))):
        try:
            _check_file(path)
        except (OSError, ValueError, zipfile.BadZipFile, SafetensorError) as error:
            raise UserError(
                f"{path} is damaged ({one_line(error)}): delete {checkpoint}, and continue from "
                "an earlier checkpoint"
            ) from error


def _check_file(path: Path) -> None:
    if path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".safetensors":
        with safe_open(path, "pt"):
            pass
    elif path.suffix in (".pt", ".pth", ".bin"):  # torch's files are ZIP files, with checksums
        with zipfile.ZipFile(path) as file:
            if (name := file.testzip()) is not None:
                raise ValueError(f"the checksum of {name} is wrong")


def _saved_only_model(checkpoint: Path) -> bool:
    try:
        identity = json.loads((checkpoint / IDENTITY).read_text(encoding="utf-8"))
        return bool(identity["save_only_model"])
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _note(line: str) -> None:
    if is_main_process():
        print(line, flush=True)
