"""Imports the recipes' packages once, then runs recipes in its forks: two processes per job.

A line of standard input is a job, ``{"script": ..., "arguments": [...], "port": ...}``. The answers
are lines of JSON: null after the imports, then for each job the two process ids and, when both have
ended, their exit statuses. The imports take seconds, a fork almost no time.
"""

import json
import os
import runpy
import sys

import matplotlib.pyplot  # noqa: F401
from transformers import GPT2LMHeadModel, Trainer  # noqa: F401

import striped_hf.trainer.run_folder  # noqa: F401


def work(job: dict, rank: int) -> None:
    """Runs the script as one of two processes. Its output goes to the server's log."""
    os.dup2(2, 1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"])}
    sys.argv = [job["script"], *job["arguments"]]
    runpy.run_path(job["script"], run_name="__main__")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    print("null", file=answers)
    for line in sys.stdin:
        pids = []
        for rank in range(2):
            if (pid := os.fork()) == 0:
                status = 1
                try:
                    work(json.loads(line), rank)
                    status = 0
                except BaseException as error:
                    print(f"rank {rank}: {error!r}", file=sys.stderr)
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            pids.append(pid)
        print(json.dumps(pids), file=answers)
        ended = dict(os.wait() for _ in pids)
        print(json.dumps([os.waitstatus_to_exitcode(ended[pid]) for pid in pids]), file=answers)


if __name__ == "__main__":
    main()
