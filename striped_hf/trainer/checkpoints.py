"""Checkpoints that survive a kill at any moment: a folder gets its name once it is whole."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from striped_hf.cli import UserError, one_line
from striped_hf.results import write_json
from striped_hf.trainer.resuming import IDENTITY, checkpoints

# Trainer does not upload names that begin with an underscore to the hub
_PARTIAL = "_partial"


class WholeCheckpoints(Trainer):
    """A Trainer that never leaves an incomplete checkpoint under a checkpoint's name.

    In ``Trainer`` every process writes its files directly into ``checkpoint-N``, and older
    checkpoints are deleted before all processes have written. If the run is killed meanwhile,
    ``get_last_checkpoint`` takes the incomplete folder for the last checkpoint. Here all processes
    write into ``_partial/checkpoint-N``. When all have written, the folder is flushed to the disk
    and renamed. Only then are older checkpoints deleted.

    On several machines the processes need a shared ``output_dir``.

    Attributes:
        identity: The run's identity, from :func:`striped_hf.trainer.resuming.run_identity`. Each
            checkpoint stores it.
        replaced: Folders and files of an earlier run in ``output_dir``. They are deleted when the
            first checkpoint is complete.
    """

    identity: dict[str, Any] | None = None
    replaced: tuple[Path, ...] = ()
    _writes_partial = False

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, _PARTIAL) if self._writes_partial else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._writes_partial:  # otherwise it is pushed once it is whole
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        whole = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        partial = run_dir / _PARTIAL / whole.name
        if self.args.should_save:
            shutil.rmtree(partial.parent, ignore_errors=True)  # left by a killed run
        self.accelerator.wait_for_everyone()
        self._writes_partial = True
        try:
            with saving(partial):
                super()._save_checkpoint(model, trial)
                if self.args.should_save and self.identity is not None:
                    only_model = {"save_only_model": self.args.save_only_model}
                    write_json(partial / IDENTITY, self.identity | only_model)
        except UserError:
            if self.args.should_save:
                shutil.rmtree(partial.parent, ignore_errors=True)
            raise
        finally:
            self._writes_partial = False

        # Trainer looked for the best checkpoint in the partial folder
        if self.state.best_global_step:
            best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best == whole or best.is_dir():
                self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(partial / "trainer_state.json"))
        self.accelerator.wait_for_everyone()  # all processes have written
        if self.args.should_save:
            self._name(partial, whole)
        self.accelerator.wait_for_everyone()  # all processes see the checkpoint
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(whole))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warns like Trainer, but not of a tied weight, which is saved under one name only."""
        tied = getattr(self.model, "_tied_weights_keys", None) or ()
        if getattr(getattr(self.model, "config", None), "tie_word_embeddings", False):
            missing = load_result.missing_keys
            missing[:] = [name for name in missing if name not in tied]
        super()._issue_warnings_after_load(load_result)

    def _name(self, partial: Path, whole: Path) -> None:
        """Gives a whole checkpoint its name, and deletes checkpoints over the limit."""
        if not partial.is_dir():
            raise RuntimeError(
                f"transformers {transformers.__version__} did not write its checkpoint into "
                f"{partial}: install a version that the README names"
            )
        flush(partial)
        # before the new name: a run killed in between must not resume an old checkpoint
        for path in self.replaced:
            _delete(path, whole.parent)
        self.replaced = ()
        if whole.exists():  # an earlier run reached this step
            whole.rename(partial.with_name(f"{whole.name}.old"))
        partial.rename(whole)
        flush(whole.parent, inside=False)
        if self.args.save_total_limit:
            best = self.state.best_model_checkpoint
            keep = {whole, Path(best)} if best else {whole}
            delete_oldest(whole.parent, self.args.save_total_limit, keep)
        shutil.rmtree(partial.parent, ignore_errors=True)


def delete_oldest(run_dir: Path, limit: int, keep: set[Path]) -> None:
    """Deletes checkpoints, the earliest steps first, until ``limit`` are left.

    Args:
        run_dir: The folder of the checkpoints.
        limit: How many to keep.
        keep: Checkpoints never to delete.
    """
    found = checkpoints(run_dir)
    deletable = [folder for folder in found if folder not in keep]
    for folder in deletable[: max(0, len(found) - limit)]:
        _delete(folder, run_dir)


def _delete(path: Path, run_dir: Path) -> None:
    """Deletes a file or folder; a kill leaves no part of it under its name."""
    if path.is_dir():
        doomed = run_dir / _PARTIAL / f"{path.name}.old"
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Turns a library's error when it cannot write, as on a full disk, into one line.

    Args:
        folder: The folder to be written, for the message.

    Raises:
        UserError: The system, torch or safetensors could not write.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        there = next((path for path in (folder, *folder.parents) if path.exists()), Path())
        free = shutil.disk_usage(there).free >> 20
        # torch raises RuntimeError for everything; its writer's messages have these words
        words = ("write failed", "writing file", "iostream error", "unexpected pos")
        if isinstance(error, RuntimeError) and free and not any(w in str(error) for w in words):
            raise
        full = "the disk is full" if free == 0 else f"{free:,} MiB are free"
        raise UserError(
            f"cannot write into {folder} ({full}; {one_line(error)}): make space there, or pass an "
            "--output_dir on another disk"
        ) from error


def flush(folder: Path, inside: bool = True) -> None:
    """Flushes a folder to the disk, so that it survives a loss of power.

    Args:
        folder: The folder; its list of entries is flushed.
        inside: Whether to flush its files and subfolders first.
    """
    if os.name != "posix":
        return  # only POSIX opens folders
    for path in [*(folder.rglob("*") if inside else ()), folder]:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
