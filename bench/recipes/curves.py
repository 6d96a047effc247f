"""Figures by step, what is told of them, and their pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from textwrap import fill
from typing import Any

import numpy as np

ENDS = 10  # steps at either end that a curve is judged by

Rows = list[dict[str, Any]]  # one a step
Curves = dict[str, list[Rows]]  # by arm and seed
Told = list[tuple[str, str]]  # figure of a step, and what of its curve (see READ)
Points = Sequence[tuple[str, float, str]]  # name of a line, number, arm
READ: dict[str, Callable[[list[float]], float]] = {
    "first": lambda values: mean(values[:ENDS]),
    "last": lambda values: mean(values[-ENDS:]),
    "mean": mean,
    "total": sum,
}


def values(rows: Rows, figure: str) -> list[float]:
    return [row[figure] for row in rows if figure in row]


def draw(claim: str, told: Told, points: Points, found: Curves, path: Path) -> None:
    """A panel a figure: its curves by step; or, where there are `points`, what is told of it by their numbers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = told if points else list({figure: (figure, read) for figure, read in told if read != "total"}.values())
    width = 4.4 * len(panels) + 2.6
    figure, axes = pyplot.subplots(1, len(panels), figsize=(width, 3.8), layout="constrained", squeeze=False)
    figure.suptitle(fill(claim, int(11 * width)), fontsize=11)
    for axis, (name, read) in zip(axes[0], panels, strict=True):
        if points:
            draw_points(axis, points, found, name, read)
        else:
            draw_curves(axis, found, name)
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=9, frameon=False)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def draw_curves(axis: Any, found: Curves, name: str) -> None:
    """The mean over seeds of what a few steps average to, and in pale from the least to the most."""
    for arm, curves in found.items():
        seeds = np.array([smooth([row.get(name, float("nan")) for row in rows]) for rows in curves])
        draw_line(axis, arm, range(seeds.shape[1]), seeds)
    axis.set_title(name.replace("_", " "), loc="left", fontsize=10)
    axis.set_xlabel("step", fontsize=9)


def draw_points(axis: Any, points: Points, found: Curves, name: str, read: str) -> None:
    """The mean over seeds of what is told of a figure, and in pale from the least to the most."""
    for label in dict.fromkeys(line for line, _, _ in points):
        mine = {number: arm for line, number, arm in points if line == label and arm in found}
        seeds = [[READ[read](values(rows, name)) for rows in found[arm]] for arm in mine.values()]
        draw_line(axis, label, list(mine), np.array(seeds).T, marker="o")
    axis.set_title(f"{name.replace('_', ' ')}, {read}", loc="left", fontsize=10)
    axis.set_xlabel("staleness in versions", fontsize=9)


def draw_line(axis: Any, label: str, numbers: Sequence[float], seeds: np.ndarray, **style: Any) -> None:
    (line,) = axis.plot(numbers, seeds.mean(0), label=label, linewidth=1.6, **style)
    axis.fill_between(numbers, seeds.min(0), seeds.max(0), color=line.get_color(), alpha=0.12)


def smooth(curve: list[float], width: int = 7) -> list[float]:
    """Means over the `width` values around each, fewer at the ends."""
    half = width // 2
    return [mean(curve[max(0, place - half) : place + half + 1]) for place in range(len(curve))]
