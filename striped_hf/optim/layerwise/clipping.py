"""Clips gradients that are freed before their norm is known."""

import torch
from torch import Tensor

_LARGEST_RATIO = 2.0  # the ratio of a norm to the assumed norm


class ForwardClipping:
    """Clips the gradients of a step to a norm, by the norm of the step before.

    ``torch.nn.utils.clip_grad_norm_`` multiplies gradients by min(1, max_norm / norm). Gradients
    that are folded into the momentum one by one are multiplied by min(1, max_norm / assumed). After
    the last one the norm is known. If it is at most twice the assumed one, the difference stays:
    the scale of a gradient changes AdamW's update only by the gradient's share in the averages. If
    it is larger, as in a spike, ``correction`` is a factor of the whole momentum, which no longer
    keeps this gradient apart from earlier ones. So the momentum shrinks with a spike and takes some
    steps to grow again.

    The next step assumes this step's norm, but at most twice the norm that this step assumed, or
    twice max_norm if that is larger. So a spike does not change how the step after it is clipped,
    and norms that stay larger are reached in a few steps.

    ``max_norm`` may change at any time. The first gradient of a step decides the coefficient of all
    its gradients.

    No number is read from the device.
    """

    def __init__(self, max_norm: float | None) -> None:
        self.max_norm = max_norm
        self.assumed: Tensor | None = None  # [] float32
        self._has_begun = False
        self._used: Tensor | None = None  # [] float32, this step's coefficient

    def begin_step(self) -> None:
        """Forgets the coefficient of the step before."""
        self._has_begun, self._used = False, None

    def coefficient(self, device: torch.device) -> Tensor | None:
        """Returns the factor of this step's folded gradients; None: 1."""
        if not self._has_begun and self.max_norm is not None and self.assumed is not None:
            self._used = self.clip(self.assumed)
        self._has_begun = True
        return None if self._used is None else self._used.to(device)

    def clip(self, norm: Tensor) -> Tensor:
        """Returns min(1, max_norm / norm), as ``torch.nn.utils.clip_grad_norm_`` computes it."""
        assert self.max_norm is not None
        return (self.max_norm / (norm + 1e-6)).clamp(max=1.0)

    def assume(self, norm: Tensor) -> None:
        """Sets the norm that this step assumes. Call it before the first ``fold``."""
        self.assumed = norm

    def correction(self, norm: Tensor) -> Tensor:
        """Returns a second factor for the folded gradients, after the first one: [] float32.

        Args:
            norm: [] float32, the norm of all gradients of the step, before clipping.
        """
        used = torch.ones_like(norm) if self._used is None else self._used.to(norm.device)
        ratio = self.clip(norm) / used
        return torch.where(ratio * _LARGEST_RATIO < 1, ratio, torch.ones_like(ratio))

    def end_step(self, norm: Tensor) -> None:
        """Sets the norm that the next step assumes."""
        assert self.max_norm is not None
        if self.assumed is None:
            self.assumed = norm
            return
        before = self.assumed.to(norm.device)
        following = torch.minimum(norm, _LARGEST_RATIO * before.clamp(min=self.max_norm))
        self.assumed = torch.where(norm.isfinite(), following, before)
