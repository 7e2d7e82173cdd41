"""Every Python process that ``striped-hf-run`` starts imports this file, through PYTHONPATH.

Python imports ``sitecustomize`` when it starts. This one imports striped_hf if it is installed,
which takes milliseconds: torch and transformers are not imported. Then it restores ``sys.path`` and
runs the environment's own ``sitecustomize``.

The command may start any Python, so the code is valid in all versions, including 2.7.
"""

import os
import sys


def _step_aside():  # type: ignore[no-untyped-def]
    folder = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != folder]
    this = sys.modules.pop("sitecustomize")
    try:
        import sitecustomize  # noqa: F401
    except ImportError as error:
        if getattr(error, "name", "sitecustomize") != "sitecustomize":
            raise
        sys.modules["sitecustomize"] = this  # there is no other


if sys.version_info >= (3, 10):
    try:
        import striped_hf  # noqa: F401
    except ImportError:
        pass  # another environment's Python

_step_aside()
