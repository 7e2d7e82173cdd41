"""A Trainer for the recipes: exact losses, measurements, and a model folder at the end."""

from typing import Any

from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from striped_hf.evaluation import evaluate_loss


class CausalLMTrainer(Trainer):
    """Trainer whose evaluation loss is weighted by token.

    ``Trainer`` reports the mean of its batches' means, which is another number as soon as batches
    hold different numbers of targets. Needs batches with ``shift_labels``, as the data sets of
    ``striped_hf.data`` make them.
    """

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Returns ``{prefix}_loss``, ``{prefix}_perplexity`` and ``{prefix}_tokens``."""
        assert self.model is not None
        model = self._wrap_model(self.model, training=False)
        if model is self.model and not self.is_in_train:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)

        def batches() -> Any:
            for batch in dataloader:
                yield self._prepare_inputs(batch)
                self.control = self.callback_handler.on_prediction_step(
                    self.args, self.state, self.control
                )

        evaluation = evaluate_loss(model, batches(), self.accelerator)
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in evaluation.items()}
        samples = len(dataloader.dataset)  # type: ignore[arg-type]
        return EvalLoopOutput(None, None, metrics, samples)  # type: ignore[arg-type]
