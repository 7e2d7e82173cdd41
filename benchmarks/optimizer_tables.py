"""The Markdown table and the plot of a run of ``optimizers.py``."""

import os
from pathlib import Path
from typing import Any

from benchmarks.measuring import STEADY
from striped_hf.results import markdown_table

HEADER = (
    *("optimizer", "state, bytes per parameter", "step, ms", "ratio to fused AdamW (quartiles)"),
    *("temporary memory, MiB", "effective GB/s", "first step, s", "checkpoint, MiB"),
)
UNUSABLE = "unusable"


def ratio_cell(row: dict[str, Any]) -> str:
    """Returns a row's ratio to its baseline with the quartiles."""
    low, high = row["ratio_quartiles"]
    return f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"


def times(row: dict[str, Any]) -> tuple[str, str, str]:
    """Returns the step time, ratio and bandwidth of a row, as the table shows them."""
    if not row["usable"]:
        return UNUSABLE, UNUSABLE, UNUSABLE
    return (
        f"{row['step_ms']:,.1f}",
        ratio_cell(row),
        "" if row["gb_s"] is None else f"{row['gb_s']:,.1f}",
    )


def render(results: dict[str, Any]) -> str:
    """Makes the Markdown table of a results file, and the lines that belong under it."""
    rows = []
    ran = [row for row in results["optimizers"] if "reason" not in row]
    for row in ran:
        step, ratio, gb_s = times(row)
        temporary = row["temporary_bytes"]
        rows.append(
            (
                f"`{row['name']}`",
                f"{row['state_bytes_per_param']:.2f}",
                step,
                ratio,
                "" if temporary is None else f"{temporary / 2**20:,.1f}",
                gb_s,
                f"{row['first_step_s']:.2f}",
                f"{row['checkpoint_bytes'] / 2**20:,.0f}",
            )
        )
    lines = [markdown_table(HEADER, rows), ""]
    lines.append(
        f"The shapes of `{results['shapes']}`, {results['parameters']:,} parameters in "
        f"{results['dtype']}; a plain copy moves {results['copy_gb_s']:.1f} GB/s."
    )
    if not all(row["usable"] for row in ran):
        lines.append(
            f"Unusable: fused AdamW's own time varied by more than {STEADY:.0%} between its "
            "quartiles."
        )
    backends = {row["backend"] for row in ran if "backend" in row}
    if backends:
        lines.append(f"Striped steps computed by: {', '.join(sorted(backends))}.")
    versions = {f"{row['package']} {row['version']}" for row in ran if row["version"] is not None}
    lines.append(f"Packages: {', '.join(sorted(versions))}.")
    skipped = [
        f"`{row['name']}` ({row['reason']})" for row in results["optimizers"] if row not in ran
    ]
    if skipped:
        lines.append(f"Not run: {'; '.join(skipped)}.")
    return "\n".join(lines)


def _label(axes: Any, points: dict[str, tuple[float, float]]) -> None:
    """Writes each point's name beside it, without covering another name or point."""
    from matplotlib.transforms import Bbox

    axes.figure.canvas.draw()  # the positions of the points are known only now
    places = axes.transData.transform(list(points.values()))
    taken = [Bbox.from_extents(x - 8, y - 8, x + 8, y + 8) for x, y in places]  # pixels
    for name, point in sorted(points.items(), key=lambda item: -item[1][1]):
        label = axes.annotate(name, point, (6, 4), textcoords="offset points", fontsize=8)
        for lift in (4, -10, -22, 16, -34, 28):  # points; a line takes 12
            label.xyann = (6, lift)
            box = label.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def draw(results: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draws a point for each optimizer with a usable time: state on x, step time on y.

    Args:
        results: A results file.
        path: The PNG file to write.
    """
    import matplotlib  # a GPU machine may lack matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogFormatter

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    points = {
        row["name"]: (row["state_bytes_per_param"], row["step_ms"])
        for row in results["optimizers"]
        if "reason" not in row and row["usable"]
    }
    for name, point in points.items():
        axes.scatter(*point, color="tab:red" if name.startswith("striped") else "tab:blue")
    axes.set(xlabel="optimizer state, bytes per parameter", ylabel="time of a step, ms")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())  # 60, not 6 x 10^1
    axes.yaxis.set_minor_formatter(LogFormatter())
    axes.set_xlim(left=-0.4, right=10)
    axes.margins(y=0.15)
    axes.grid(alpha=0.3)
    device = results["environment"]["device"]
    axes.set_title(f"{results['shapes']} in {results['dtype']} on {device}")
    _label(axes, points)
    partial = Path(f"{path}.partial")
    figure.savefig(partial, dpi=130, format="png")
    partial.replace(path)
    plt.close(figure)
