"""Run the tests of the kernels on a GPU, and keep each outcome as soon as it is known.

    python -m benchmarks.gpu_tests --results out/gpu_tests.json -- -m gpu -n 8 tests/optim

The arguments after `--` go to pytest. The results file has the number of each outcome and the
message of every failure. It is written every few seconds, so a run that ends early keeps its
outcomes.
"""

import argparse
import sys
import time
from collections import Counter
from typing import Any

import pytest

from striped_hf.results import environment, markdown_table, write_json

WRITE_EVERY_S = 2.0


class Recorder:
    """A pytest plugin that writes the outcomes of the tests into a results file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.outcomes: Counter[str] = Counter()
        self.failures: list[dict[str, str]] = []
        self.environment = environment()
        self._written = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Counts a test. Its set-up counts only if the test failed or was skipped there."""
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1
        if report.failed:
            message = str(report.longrepr).strip().splitlines()
            self.failures.append({"test": report.nodeid, "message": "\n".join(message[-12:])})
        if time.monotonic() > self._written + WRITE_EVERY_S:
            self.write(complete=False)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Notes a module that could not be collected."""
        if report.failed:
            self.outcomes["failed"] += 1
            self.failures.append({"test": report.nodeid, "message": str(report.longrepr)[-1000:]})

    def write(self, complete: bool) -> None:
        """Writes the results file."""
        self._written = time.monotonic()
        results: dict[str, Any] = {"environment": self.environment, "complete": complete}
        results |= {name: self.outcomes[name] for name in ("passed", "failed", "skipped")}
        write_json(self.path, {**results, "failures": self.failures})


def render(results: dict[str, Any]) -> str:
    """Makes the Markdown table of a results file, and the failures below it."""
    header = ("kernel tests", "passed", "failed", "skipped")
    name = "all" if results["complete"] else "before the run was cut off"
    counts = (str(results[key]) for key in header[1:])
    lines = [markdown_table(header, [(name, *counts)])]
    for failure in results["failures"]:
        message = failure["message"].splitlines()
        lines.append(f"{failure['test']}: {message[-1] if message else ''}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", default="out/gpu_tests.json")
    arguments = sys.argv[1:]
    separator = arguments.index("--") if "--" in arguments else len(arguments)
    args = parser.parse_args(arguments[:separator])
    recorder = Recorder(args.results)
    recorder.write(complete=False)
    status = pytest.main(arguments[separator + 1 :], plugins=[recorder])
    recorder.write(complete=True)
    if status == pytest.ExitCode.OK and not recorder.outcomes["passed"]:
        sys.exit("no test passed: pytest selected none, or skipped every test")
    sys.exit(int(status))


if __name__ == "__main__":
    main()
