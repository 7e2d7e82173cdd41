"""The Triton backend: the step of ``reference.py`` in a few launches for any number of tensors.

- ``launch.py`` has the functions of a backend and launches the kernels.
- ``kernels.py`` has the kernels, ``codec.py`` their rounding and their momentum codes.
- ``fold.py`` folds gradients during the backward pass, by the kernels of ``fold_kernels.py``.
- ``arguments.py`` has what a launch passes to a kernel, and the tile sizes.
- ``plan.py`` computes what depends on shapes alone: buffers, and what each program works on.
- ``addresses.py`` keeps the tensors' addresses on the device up to date.

Importing the package raises ImportError where no kernel can run. With TRITON_INTERPRET=1 Triton
interprets the kernels, on CPU tensors: for tests only.
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
