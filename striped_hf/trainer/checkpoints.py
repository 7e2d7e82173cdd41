"""Checkpoints that survive a kill at any moment: a folder has its name only once it is whole."""

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

# Trainer's uploads to the hub leave out what begins with an underscore
_PARTIAL = "_partial"


class WholeCheckpoints(Trainer):
    """Trainer that never leaves a part of a checkpoint under a checkpoint's name.

    ``Trainer`` writes into ``checkpoint-N`` file by file, each process its own, and deletes older
    checkpoints before the others have written theirs. A run killed meanwhile leaves a folder that
    ``get_last_checkpoint`` takes for the last checkpoint. Here all processes write into
    ``_partial/checkpoint-N``; when the last one has written, the folder is flushed to the disk and
    renamed, and only then are older ones deleted.

    The processes of several machines need an ``output_dir`` that they share.

    Attributes:
        identity: What the run is, from :func:`striped_hf.trainer.resuming.run_identity`; each
            checkpoint gets it.
        replaced: Folders and files of an earlier run in ``output_dir``, which go when the first
            checkpoint is there in their place.
    """

    identity: dict[str, Any] | None = None
    replaced: tuple[Path, ...] = ()
    _writes_partial = False

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, _PARTIAL) if self._writes_partial else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._writes_partial:  # else it is pushed once it is whole
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        whole = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        partial = run_dir / _PARTIAL / whole.name
        if self.args.should_save:
            shutil.rmtree(partial.parent, ignore_errors=True)  # what a killed run left
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

        if self.state.best_global_step:  # Trainer looked for the best one in the partial folder
            best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best == whole or best.is_dir():
                self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(partial / "trainer_state.json"))
        self.accelerator.wait_for_everyone()  # all have written
        if self.args.should_save:
            self._name(partial, whole)
        self.accelerator.wait_for_everyone()  # the checkpoint is there for all
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(whole))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warns as Trainer does, but not of a tied weight, which is saved under one name only."""
        tied = getattr(self.model, "_tied_weights_keys", None) or ()
        if getattr(getattr(self.model, "config", None), "tie_word_embeddings", False):
            missing = load_result.missing_keys
            missing[:] = [name for name in missing if name not in tied]
        super()._issue_warnings_after_load(load_result)

    def _name(self, partial: Path, whole: Path) -> None:
        """Gives a checkpoint that is whole its name, and deletes those over the limit."""
        if not partial.is_dir():
            raise RuntimeError(
                f"transformers {transformers.__version__} did not write its checkpoint into "
                f"{partial}, where it would stay until it is whole: install a version that the "
                "README names"
            )
        flush(partial)
        # before the new one has its name, or a run killed here would go on from an old one
        for path in self.replaced:
            _delete(path, whole.parent)
        self.replaced = ()
        if whole.exists():  # of a run that was at this step before
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
        run_dir: The folder that holds them.
        limit: How many are to stay.
        keep: Those that stay even so.
    """
    found = checkpoints(run_dir)
    deletable = [folder for folder in found if folder not in keep]
    for folder in deletable[: max(0, len(found) - limit)]:
        _delete(folder, run_dir)


def _delete(path: Path, run_dir: Path) -> None:
    """Deletes a file or folder; one that is cut short leaves no part under its name."""
    if path.is_dir():
        doomed = run_dir / _PARTIAL / f"{path.name}.old"
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Makes what a library raises when it cannot write, as on a full disk, one line.

    Raises:
        UserError: An error of the system, or one that says so in a library's words.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        there = next((path for path in (folder, *folder.parents) if path.exists()), Path())
        free = shutil.disk_usage(there).free >> 20
        # torch raises RuntimeError for everything; these are words of its writer
        words = ("write failed", "writing file", "iostream error", "unexpected pos")
        if isinstance(error, RuntimeError) and free and not any(w in str(error) for w in words):
            raise
        full = "the disk is full" if free == 0 else f"{free:,} MiB are free"
        raise UserError(
            f"cannot write into {folder} ({full}; {one_line(error)}): make space there, or pass an "
            "--output_dir on another disk"
        ) from error


def flush(folder: Path, inside: bool = True) -> None:
    """Has the system write a folder to the disk, so that it survives a loss of power.

    Args:
        folder: The folder, whose list of entries is written.
        inside: Whether all that it holds is written before.
    """
    if os.name != "posix":
        return  # no folder can be opened elsewhere
    for path in [*(folder.rglob("*") if inside else ()), folder]:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
