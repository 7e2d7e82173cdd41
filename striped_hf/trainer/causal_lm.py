"""A Trainer for the recipes: exact losses, and checkpoints that survive a kill."""

import contextlib
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.trainer_utils import EvalLoopOutput

from striped_hf.cli import UserError, one_line
from striped_hf.evaluation import evaluate_loss
from striped_hf.losses import (
    head_in_loss,
    is_untied,
    is_worthwhile,
    linear_cross_entropy,
    plain_head,
    whole_weight,
)
from striped_hf.trainer.checkpoints import WholeCheckpoints
from striped_hf.trainer.watching import watch
from striped_hf.trainer.weight_rounding import WarnOfRounding

# In every forward pass, transformers' "sdpa" checks for packed sequences, which waits for the GPU.
# A compiled model cannot check and makes a mask instead, and a mask rules out flash attention. An
# attention implementation under a name without a mask function gets no mask: it is causal.
_CAUSAL_SDPA = "causal_sdpa"
AttentionInterface.register(_CAUSAL_SDPA, sdpa_attention_forward)


class CausalLMTrainer(WholeCheckpoints):
    """A Trainer with an evaluation loss weighted by token, and with whole checkpoints.

    ``Trainer`` reports the mean of its batches' means, which is wrong if batches have different
    numbers of targets. This class needs batches with ``shift_labels``, as the data sets of
    ``striped_hf.data`` make them.

    It logs the figures of ``striped_hf.trainer.watching``, and warns if the optimizer rounds 16-bit
    weights to nearest. If a step has many logits, as with GPT-2's vocabulary, training computes the
    loss in chunks (``striped_hf.losses``) and never holds all logits; ``chunked_loss = False``
    turns this off. Attention is causal over each whole sequence, without a padding mask: padding
    may only follow the last target. Between two logs no step waits for a GPU, given
    ``logging_nan_inf_filter=False`` and a model without ``pad_token_id``.
    """

    chunked_loss = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(getattr(self.model, "config", None), "_attn_implementation", None) == "sdpa":
            self.model.set_attn_implementation(_CAUSAL_SDPA)  # type: ignore[union-attr,operator]
        watch(self, peak_tflops=getattr(self.args, "peak_tflops", None))
        self.add_callback(WarnOfRounding())
        self._head: nn.Linear | None = None
        self._flops_per_token: int | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Computes the loss; in training in chunks of logits if that saves memory."""
        with contextlib.ExitStack() as changes:
            # the first step decides, so that a compiled model is compiled once
            if model.training and not return_outputs and self._chunks_loss(inputs["input_ids"]):
                assert self._head is not None
                changes.enter_context(head_in_loss(self.model, self._head, self._loss_from_hidden))
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _chunks_loss(self, input_ids: Tensor) -> bool:
        if self.chunked_loss and self._head is None:
            assert self.model is not None
            head = plain_head(self.model)
            self.chunked_loss = (
                head is not None
                and is_worthwhile(input_ids.numel(), len(head.weight))
                and self.compute_loss_func is None
                and self.label_smoother is None
                and self.args.n_gpu <= 1
            )
            if head is not None:
                self._head = head
                self._loss_from_hidden = partial(
                    loss_from_hidden, head, is_untied(self.model, head)
                )
        return self.chunked_loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Returns Trainer's count, but reads the sizes of all parameters only once."""
        tokens = inputs["input_ids"]
        if self._flops_per_token is None:
            self._flops_per_token = super().floating_point_ops({"input_ids": tokens[:1, :1]})
        return self._flops_per_token * tokens.numel()

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Resets the sum of losses to zero after each log, even if the sum is not finite.

        Trainer subtracts the sum from itself, which leaves a NaN in place. Its own filter,
        ``logging_nan_inf_filter``, waits for the GPU in every step and logs a mean of earlier
        losses in place of a NaN.
        """
        last_logged = self._globalstep_last_logged
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)
        if self._globalstep_last_logged != last_logged:
            tr_loss.zero_()

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Makes the repository on the hub; UserError if the hub refuses."""
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:  # the client's error classes differ between its versions
            name = self.args.hub_model_id or Path(self.args.output_dir or "").resolve().name
            raise UserError(
                f"--push_to_hub cannot make {name} on the hub: log in with `hf auth login` or set "
                f"HF_TOKEN, and pass a repository of yours with --hub_model_id ({one_line(error)})"
            ) from error

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes Trainer's draft only if there is no card: ``finish_run`` writes a fuller one."""
        if not Path(self.args.output_dir or "", "README.md").exists():
            super().create_model_card(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Returns the results of ``evaluate_loss``, each key prefixed by ``{prefix}_``."""
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


def loss_from_hidden(
    head: nn.Linear,
    untied: bool,
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Replaces a model's loss function.

    Args:
        head: The model's output layer.
        untied: As for ``linear_cross_entropy``.
        logits: Hidden states, [B, L, d].
        labels, vocab_size, num_items_in_batch, shift_labels, kwargs: As for transformers' losses.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    targets = shift_labels.flatten()
    hidden, weight = logits.flatten(0, -2), whole_weight(head)
    loss = linear_cross_entropy(hidden, weight, targets, untied=untied)
    return loss / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)
