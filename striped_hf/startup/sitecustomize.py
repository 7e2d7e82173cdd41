"""What ``striped-hf-run`` brings into every Python process below it, through PYTHONPATH.

Python imports ``sitecustomize`` when it starts. This one imports striped_hf where there is one:
milliseconds, because torch and transformers are not imported. Then it steps aside: it leaves
``sys.path`` as it would be without it, and runs the environment's own ``sitecustomize``.

Any Python may be below the command, so the code is valid in all versions, 2.7 included.
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
