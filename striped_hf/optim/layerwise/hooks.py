"""Hooks that get each gradient as soon as the backward pass has completed it."""

import weakref
from collections.abc import Callable, Iterable

from torch import Tensor
from torch.utils.hooks import RemovableHandle


class GradientHooks:
    """Hooks of an optimizer, which do not keep it alive and are removed with it."""

    def __init__(self, on_gradient: Callable[[Tensor], None]) -> None:
        """Prepares the hooks.

        Args:
            on_gradient: A method of the optimizer, which is called with a parameter.
        """
        self._method = weakref.WeakMethod(on_gradient)
        self._handles: dict[int, RemovableHandle] = {}
        weakref.finalize(self, _remove, self._handles)

    def attach(self, params: Iterable[Tensor]) -> None:
        """Hooks those parameters that have no hook yet."""
        for param in params:
            if not self._is_hooked(param):
                hook = param.register_post_accumulate_grad_hook(self._call)
                self._handles[id(param)] = hook

    def remove(self) -> None:
        """Removes all hooks."""
        _remove(self._handles)

    def _is_hooked(self, param: Tensor) -> bool:
        handle = self._handles.get(id(param))
        # other code may have replaced the parameter, and its id may be in use again
        return handle is not None and handle.id in (param._post_accumulate_grad_hooks or ())

    @property
    def _call(self) -> Callable[[Tensor], None]:
        method = self._method

        def call(param: Tensor) -> None:
            on_gradient = method()
            if on_gradient is not None:
                on_gradient(param)

        return call


def _remove(handles: dict[int, RemovableHandle]) -> None:
    for handle in handles.values():
        handle.remove()
    handles.clear()
