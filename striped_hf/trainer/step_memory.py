"""Computes the memory of a training step by running the step on fake tensors.

A model of any size makes its forward and backward passes and its optimizer's step on tensors that
have shapes but no memory (torch's ``FakeTensorMode``). ``LiveBytes`` follows the live tensors. So
the gradients that exist at a time, the optimizer's temporaries and the buffers of gradient
accumulation come from the real code. Operations allocate the same tensors as on a GPU
(``gpu_shapes``).

The memory that a kernel allocates within one operation is not seen. The allocator's fragmentation
and the CUDA context come on top.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from striped_hf.cli import UserError, one_line
from striped_hf.losses import head_in_loss, is_untied, is_worthwhile, plain_head
from striped_hf.optim import LayerwiseStripedAdamW
from striped_hf.optim.backends import chunks
from striped_hf.pretrained import new_model
from striped_hf.trainer.causal_lm import loss_from_hidden
from striped_hf.trainer.gpu_shapes import ATTENTION, GpuShapes
from striped_hf.trainer.live_bytes import OTHER, LiveBytes

_OPTIMIZER = "optimizer"  # the label of optimizers' memory beside their state


@dataclass(frozen=True)
class Setting:
    """The settings of a training.

    Attributes:
        batch_size: Sequences in one forward pass.
        context: Tokens in a sequence.
        accumulation: Forward and backward passes in one step.
        gradient_checkpointing: Whether layers are computed again in the backward pass.
        chunked_loss: Whether the loss is computed as by ``CausalLMTrainer`` instead of ``Trainer``.
        max_grad_norm: The norm that gradients are clipped to.
    """

    batch_size: int = 1
    context: int = 1024
    accumulation: int = 1
    gradient_checkpointing: bool = False
    chunked_loss: bool = False
    max_grad_norm: float = 1.0


class Memory(NamedTuple):
    """The memory at the peak of a step, in bytes.

    Attributes:
        weights: Parameters and buffers.
        gradients: The parameters' gradients.
        state: The optimizer's state.
        optimizer: The optimizer's buffers until the end of its step.
        activations: All other memory: tensors that the forward pass keeps, and temporaries of the
            passes.
    """

    weights: int
    gradients: int
    state: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self)


class FakeTraining:
    """Training steps of a causal language model on fake tensors.

    Args:
        config: The model's configuration.
        dtype: The dtype of the weights.
        setting: The settings of the training.
        autocast: Whether the forward pass is under bfloat16 autocast.
        prepare: A function that changes the model after its construction.

    Raises:
        UserError: The model has no such configuration.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        dtype: torch.dtype,
        setting: Setting,
        autocast: bool,
        prepare: Callable[[Any], None] | None = None,
    ) -> None:
        self.setting = setting
        self._mode = FakeTensorMode()
        self._live: LiveBytes | None = None
        self._label_in_hooks = OTHER
        with self._running():
            model: Any = new_model(config, dtype).train()
            with contextlib.suppress(ValueError):  # a model with attention of its own keeps it
                model.set_attn_implementation(ATTENTION)
            if prepare is not None:
                prepare(model)
            if setting.gradient_checkpointing:
                _checkpoint_gradients(model)
        self.model = model
        self._forward = model.forward
        if autocast:  # as accelerate does it
            in_bfloat16 = torch.autocast("cpu", torch.bfloat16)(model.forward)
            self._forward = convert_outputs_to_fp32(in_bfloat16)
        self.parameters = [param for param in model.parameters() if param.requires_grad]
        for param in self.parameters:
            param.register_post_accumulate_grad_hook(self._on_gradient)

    def passes(self) -> Memory:
        """Runs the passes of one step and returns their peak. The gradients stay.

        Raises:
            UserError: The model cannot run without values.
        """
        with self._running(), self._following() as live:
            self._run_passes()
        return _memory(live)

    def step(self, build: Callable[[Any], Optimizer]) -> Memory:
        """Returns the peak of an optimizer's first step, with the gradients of ``passes``.

        Args:
            build: A function that makes an optimizer for the model.
        """
        with self._running():
            optimizer = build(self.model)
            with self._following() as live:
                live.new = _OPTIMIZER
                torch.nn.utils.clip_grad_norm_(self.parameters, self.setting.max_grad_norm)
                optimizer.step()
                live.label("state", _state(optimizer))
        return _memory(live)

    def passes_and_step(self, build: Callable[[Any], LayerwiseStripedAdamW]) -> Memory:
        """Returns the peak of a whole step of an optimizer that works in the backward pass.

        Args:
            build: A function that makes an optimizer for the model. The optimizer itself clips the
                gradients.
        """
        with self._running():
            optimizer = build(self.model)
            self._give_state(optimizer)
            self._label_in_hooks = _OPTIMIZER
            for param in self.parameters:  # after the optimizer's hooks
                param.register_post_accumulate_grad_hook(self._after_optimizer)
            with self._following() as live:
                live.label("state", _state(optimizer))
                self._run_passes()
                live.new = _OPTIMIZER
                optimizer.step()
        return _memory(live)

    def _run_passes(self) -> None:
        for _ in range(min(self.setting.accumulation, 2)):  # a third pass is like the second
            self._loss().backward()

    def _loss(self) -> Tensor:
        setting, model = self.setting, self.model
        ids = torch.zeros(setting.batch_size, setting.context, dtype=torch.long)
        with contextlib.ExitStack() as changes:
            head = plain_head(model) if setting.chunked_loss else None
            if head is not None and is_worthwhile(ids.numel(), len(head.weight)):
                chunked = functools.partial(loss_from_hidden, head, is_untied(model, head))
                changes.enter_context(head_in_loss(model, head, chunked))
            outputs = self._forward(input_ids=ids, labels=ids, use_cache=False)
        loss: Tensor = outputs["loss"]
        return loss

    def _give_state(self, optimizer: LayerwiseStripedAdamW) -> None:
        for param in self.parameters:
            param.grad = torch.empty_like(param)
        optimizer.step()
        optimizer.zero_grad()

    def _on_gradient(self, param: Tensor) -> None:
        if self._live is not None and param.grad is not None:
            self._live.label("gradients", [param.grad])
            self._live.new = self._label_in_hooks

    def _after_optimizer(self, param: Tensor) -> None:
        if self._live is not None:
            self._live.new = OTHER

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        with self._mode, GpuShapes(), chunks.skipped():
            try:
                yield
            except RuntimeError as error:  # all errors of fake tensors are RuntimeErrors
                raise UserError(
                    "memory cannot be planned for this model, which does not run on tensors "
                    f"without values: {one_line(error)}"
                ) from error

    @contextlib.contextmanager
    def _following(self) -> Iterator[LiveBytes]:
        with LiveBytes() as live:
            live.label("weights", [*self.model.parameters(), *self.model.buffers()])
            live.label("gradients", [p.grad for p in self.parameters if p.grad is not None])
            self._live = live
            try:
                yield live
            finally:
                self._live = None


def _checkpoint_gradients(model: Any) -> None:
    with warnings.catch_warnings():  # transformers 5 has another name, too
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(
            {
                "use_reentrant": False,
                "context_fn": lambda: (contextlib.nullcontext(), GpuShapes()),  # first, and again
            }
        )


def _state(optimizer: Optimizer) -> Iterable[Tensor]:
    leaves = tree_leaves(list(optimizer.state.values()))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _memory(live: LiveBytes) -> Memory:
    found = live.at_peak()
    labels = ("weights", "gradients", "state", _OPTIMIZER, OTHER)
    return Memory(*(found.get(label, 0) for label in labels))
