"""Hooks that get each gradient as soon as the backward pass has completed it.

A loss function can compute the gradient of an output layer's weight in blocks of rows. It asks
``row_consumer`` for a function that consumes them, and then need not make the whole gradient.
"""

import weakref
from collections.abc import Callable, Iterable

from torch import Tensor
from torch.utils.hooks import RemovableHandle

RowBlocks = Iterable[tuple[slice, Tensor]]  # rows of a matrix, and the gradient of these rows
RowConsumer = Callable[[RowBlocks], None]


class GradientHooks:
    """Hooks of an optimizer. They do not keep it alive, and are removed with it.

    A parameter has the hook of one optimizer: the last one that attached its hooks. An earlier
    optimizer may still be alive, such as with an earlier Trainer in a notebook, and would take the
    gradients.
    """

    def __init__(
        self,
        on_gradient: Callable[[Tensor], None],
        row_consumer: Callable[[Tensor], RowConsumer | None],
    ) -> None:
        """Prepares the hooks.

        Args:
            on_gradient: A method of the optimizer, which is called with a parameter.
            row_consumer: A method of the optimizer, as the function ``row_consumer``.
        """
        self._methods = weakref.WeakMethod(on_gradient), weakref.WeakMethod(row_consumer)
        self._handles: dict[int, RemovableHandle] = {}
        weakref.finalize(self, _remove, self._handles)

    def attach(self, params: Iterable[Tensor]) -> None:
        """Hooks the parameters that have no hook yet."""
        for param in params:
            if not self._is_hooked(param):
                _remove_from(param)
                hook = param.register_post_accumulate_grad_hook(_Call(*self._methods))
                self._handles[id(param)] = hook

    def remove(self) -> None:
        """Removes all hooks."""
        _remove(self._handles)

    def _is_hooked(self, param: Tensor) -> bool:
        handle = self._handles.get(id(param))
        # other code may have replaced the parameter, and its id may be in use again
        return handle is not None and handle.id in (param._post_accumulate_grad_hooks or ())


class _Call:
    """The function that a parameter keeps as its hook."""

    def __init__(
        self,
        on_gradient: weakref.WeakMethod[Callable[[Tensor], None]],
        row_consumer: weakref.WeakMethod[Callable[[Tensor], RowConsumer | None]],
    ) -> None:
        self._on_gradient, self._row_consumer = on_gradient, row_consumer

    def __call__(self, param: Tensor) -> None:
        on_gradient = self._on_gradient()
        if on_gradient is not None:
            on_gradient(param)

    def row_consumer(self, param: Tensor) -> RowConsumer | None:
        method = self._row_consumer()
        return None if method is None else method(param)


def row_consumer(param: Tensor) -> RowConsumer | None:
    """Returns a function that consumes a gradient of a matrix in blocks of rows, in any order.

    Returns:
        None: no optimizer consumes them, and the matrix needs its whole gradient.
    """
    for hook in (getattr(param, "_post_accumulate_grad_hooks", None) or {}).values():
        if isinstance(hook, _Call):
            return hook.row_consumer(param)
    return None


def _remove_from(param: Tensor) -> None:
    hooks: dict[int, object] = param._post_accumulate_grad_hooks or {}
    for key, hook in list(hooks.items()):
        if isinstance(hook, _Call):
            del hooks[key]


def _remove(handles: dict[int, RemovableHandle]) -> None:
    for handle in handles.values():
        handle.remove()
    handles.clear()
