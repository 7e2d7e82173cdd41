"""Runs a recipe, and records when each process begins and ends loading Trainer's inputs.

spy_on_loading.py RECIPE [its arguments]
"""

import os
import runpy
import sys
import time

from transformers import AutoModelForCausalLM, AutoTokenizer


def note(what: str) -> None:
    with open("loading.txt", "a", encoding="utf-8") as file:
        file.write(f"{os.environ['RANK']} {what} {time.time():.6f}\n")


def spy_on(auto_class: type) -> None:
    load = auto_class.from_pretrained

    def from_pretrained(*args, **kwargs):
        note(f"{auto_class.__name__}-begins")
        time.sleep(0.3)  # time in which the other process could start too early
        loaded = load(*args, **kwargs)
        note(f"{auto_class.__name__}-ends")
        return loaded

    auto_class.from_pretrained = from_pretrained


spy_on(AutoModelForCausalLM)
spy_on(AutoTokenizer)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
