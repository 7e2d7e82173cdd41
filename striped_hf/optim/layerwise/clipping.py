"""Clips gradients that are freed before their norm is known."""

import torch
from torch import Tensor

_LARGEST_RATIO = 2.0  # of a norm to the assumed norm
_SPIKE_RATIO = 1.3  # estimates are mostly within 30% of the norm


class ForwardClipping:
    """Clips the gradients of a step to a norm that is known only after them.

    ``torch.nn.utils.clip_grad_norm_`` multiplies gradients by min(1, max_norm / norm). Gradients
    that are folded into the momentum one by one are multiplied by min(1, max_norm / assumed). The
    assumed norm is the norm of the step before. If an estimate by the gradients so far
    (``norm_estimate``) is over 1.3 times as large, as in a spike, the estimate takes its place.

    After the last gradient the norm is known. If a gradient's factor is at most twice the right
    one, the difference stays: the scale of a gradient changes AdamW's update only by the gradient's
    share in the averages. If it is larger, ``corrections`` has a factor of the whole momentum,
    which no longer keeps this gradient apart from earlier ones. Then the momentum shrinks and takes
    some steps to grow again.

    The next step assumes this step's norm, but at most twice the norm that this step assumed, or
    twice max_norm if that is larger. So a spike does not change how the step after it is clipped,
    and norms that stay larger are reached in a few steps.

    ``max_norm`` may change at any time. The first gradient of a step decides whether its gradients
    are clipped, and to which norm.

    No number is read from the device.
    """

    def __init__(self, max_norm: float | None) -> None:
        self.max_norm = max_norm
        self.assumed: Tensor | None = None  # [] float32
        self.is_exact = False  # whether the assumed norm is the norm of this step
        self._has_begun = False
        self._max_norm_of_step: float | None = None  # None: this step's gradients are not clipped

    def begin_step(self) -> None:
        """Forgets what the step before decided."""
        self.is_exact, self._has_begun, self._max_norm_of_step = False, False, None

    def decide(self) -> bool:
        """Returns whether this step's gradients are clipped; the first call in a step decides."""
        if not self._has_begun:
            self._has_begun = True
            if self.assumed is not None:
                self._max_norm_of_step = self.max_norm
        return self._max_norm_of_step is not None

    def coefficient(self, device: torch.device, estimate: Tensor | None = None) -> Tensor:
        """Returns the factor of a gradient that is folded: [] float32.

        Args:
            device: Of the result.
            estimate: [] float32, an estimate of the norm of all gradients; None: there is none.
        """
        assert self.assumed is not None
        assert self._max_norm_of_step is not None
        norm = self.assumed.to(device)
        if estimate is not None:
            estimate = estimate.to(device)
            is_spike = (estimate > _SPIKE_RATIO * norm) & estimate.isfinite()
            norm = torch.where(is_spike, estimate, norm)
        return _clip(norm, self._max_norm_of_step)

    def clip(self, norm: Tensor) -> Tensor:
        """Returns min(1, max_norm / norm), as ``torch.nn.utils.clip_grad_norm_`` computes it."""
        assert self.max_norm is not None
        return _clip(norm, self.max_norm)

    def assume(self, norm: Tensor) -> None:
        """Sets the norm of this step. Call it before the first gradient is folded."""
        self.assumed, self.is_exact = norm, True

    def corrections(self, norm: Tensor, used: Tensor) -> Tensor:
        """Returns second factors for folded gradients, after the first ones: [n] float32.

        Args:
            norm: [] float32, the norm of all gradients of the step, before clipping.
            used: [n] float32, the first factors.
        """
        ratio = self.clip(norm).to(used.device) / used
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


def _clip(norm: Tensor, max_norm: float) -> Tensor:
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
