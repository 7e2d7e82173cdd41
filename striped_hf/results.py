"""Results files: measurements and their environment, and the Markdown tables made from them."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from striped_hf.cli import UserError
from striped_hf.differences import differences


def environment(device_type: str | None = None) -> dict[str, Any]:
    """Describes the environment of a measurement: device, threads, versions, commit of the code.

    Args:
        device_type: "cuda" or "cpu"; None for the GPU if there is one.
    """
    on_gpu = torch.cuda.is_available() if device_type is None else device_type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else _processor(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
    }


def common_environment(environments: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Merges the environments of several runs into one.

    Args:
        environments: The result of ``environment`` in each run, by the run's name.

    Returns:
        The same keys. If the runs differ in a value, the value is a string with the runs' names,
        such as "a6b9169 (adamw), c230fb3 (striped_adamw, striped_adamw_8bit)".
    """
    first, *others = environments.values()
    common: dict[str, Any] = {}
    for key, value in first.items():
        if all(other.get(key) == value for other in others):
            common[key] = value
            continue
        names: dict[str, list[str]] = {}
        for name, own in environments.items():
            names.setdefault(str(own.get(key)), []).append(name)
        common[key] = ", ".join(f"{each} ({', '.join(runs)})" for each, runs in names.items())
    return common


def measured_on(environment: dict[str, Any]) -> str:
    """Formats a result of ``environment`` as one line."""
    return (
        f"Measured on {environment['device']}, {environment['threads']} threads, "
        f"torch {environment['torch']}, transformers {environment['transformers']}, "
        f"at {environment['commit']}."
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Returns the commit of the code, marked "-dirty" if it is changed; None outside git.

    Results are no code: a benchmark that continues an earlier one has changed its own file.
    """
    git = ["git", "-C", str(Path(__file__).parents[1])]
    describe = [*git, "describe", "--always"]
    status = [*git, "status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results"]
    try:
        commit, changes = (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
            for command in (describe, status)
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changes else commit


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file atomically: under a temporary name, which is then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a JSON file atomically. NaN and infinities raise ValueError."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def loss_text(loss: float | None, digits: int = 4) -> str:
    """Formats a loss for people; None means that the run diverged."""
    return "diverged" if loss is None else f"{loss:.{digits}f}"


def begin_results(
    path: str | os.PathLike[str],
    settings: dict[str, Any],
    resume: bool,
    device_type: str | None = None,
) -> dict[str, Any]:
    """Begins the results of a long measurement, or resumes the results of an earlier run.

    Args:
        path: The results file; an earlier run may have written it.
        settings: The settings, and an empty list for each list of results.
        resume: Whether to resume the earlier run.
        device_type: As for ``environment``.

    Returns:
        ``environment`` and the settings. After an earlier run with the same settings: the content
        of its file.

    Raises:
        UserError: The earlier run had other settings.
    """
    path = Path(path)
    if resume and path.exists():
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        now = {key: value for key, value in settings.items() if value != []}
        if found := differences({key: results.get(key) for key in now}, now):
            raise UserError(
                f"--resume: {path} has results with other settings ({found}): pass the same "
                "settings, name another file with --results, or leave --resume out to begin anew"
            )
        return results
    return {"environment": environment(device_type), **settings}


def is_measured(
    rows: Sequence[dict[str, Any]], names: dict[str, str], measured: dict[str, str | None]
) -> bool:
    """Returns whether a resumed results file has a row already.

    Args:
        rows: The rows of the file.
        names: The entries that identify the row, such as the model's name.
        measured: The current fingerprints of what is measured. Rows of earlier versions have none.

    Raises:
        UserError: The row has the same names but other fingerprints.
    """
    for row in rows:
        if names.items() <= row.items():
            before = {key: row[key] for key in measured if key in row}
            if found := differences(before, {key: measured[key] for key in before}):
                raise UserError(
                    f"--resume: {' '.join(names.values())} was measured with other inputs "
                    f"({found}): leave --resume out to begin anew, or name another file with "
                    "--results"
                )
            return True
    return False


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Makes a Markdown table; the first column is aligned left, the others right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))
