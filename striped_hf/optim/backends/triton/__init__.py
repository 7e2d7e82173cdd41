"""The Triton backend: the step of ``reference.py`` in a few launches for any number of tensors.

- ``backend.py`` has the backend, and ``launch.py`` launches the kernels of a step.
- ``statistics_kernels.py``, ``stripes_kernels.py`` and ``update_kernels.py`` have the kernels,
  ``functions.py`` has what they share, and ``codec.py`` their rounding and their momentum codes.
- ``fold.py`` folds gradients during the backward pass, by the kernels of ``fold_kernels.py``.
- ``arguments.py`` has the arguments of the kernels, and ``tile_sizes.py`` the tile sizes.
- ``kinds.py`` has the facts about an entry on which all of these depend.
- ``plan.py`` lists the work of each program, and with ``workspace.py`` allocates the buffers.
- ``addresses.py`` keeps the tensors' addresses on the device up to date.
- ``counters.py`` remembers on the host which entries have had their first step.

The import of the package raises ImportError if no kernel can run. With TRITON_INTERPRET=1 Triton
interprets the kernels on CPU tensors, for tests only.
"""

import os

import torch

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError("triton is not installed") from error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    raise ImportError("there is no CUDA device")
