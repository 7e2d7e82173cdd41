"""``python -m striped_hf SCRIPT`` or ``python -m striped_hf -m MODULE``: see ``runner.py``."""

import sys

from striped_hf.runner import run_program

run_program(sys.argv[1:])
