"""Checkpoints that survive a kill at any moment: a folder has its name only once it is whole."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

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
    """

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
            super()._save_checkpoint(model, trial)
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

    def _name(self, partial: Path, whole: Path) -> None:
        """Gives a checkpoint that is whole its name, and deletes those over the limit."""
        if not partial.is_dir():
            raise RuntimeError(
                f"transformers {transformers.__version__} did not write its checkpoint into "
                f"{partial}, where it would stay until it is whole: install a version that the "
                "README names"
            )
        flush(partial)
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
    """Deletes checkpoints, those of the earliest steps first, until ``limit`` are left.

    Args:
        run_dir: The folder that holds them.
        limit: How many are to stay.
        keep: Those that stay even so.
    """
    steps = {
        int(found[1]): folder
        for folder in run_dir.iterdir()
        if (found := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name))
    }
    deletable = [steps[step] for step in sorted(steps) if steps[step] not in keep]
    for folder in deletable[: max(0, len(steps) - limit)]:
        # renamed first: a deletion that is cut short must not leave a part of it either
        doomed = run_dir / _PARTIAL / f"{folder.name}.old"
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


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
