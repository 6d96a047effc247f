"""The curves of a run in one picture."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
Panel = Callable[["Axes", list[Row], list[Row]], None]  # (axis, rows of kind step, rows of kind evaluation)

COLUMNS = 3
PHASES = {"wait_s": "waiting for groups", "train_s": "training", "publish_s": "publishing", "other_s": "other"}


def draw(steps: list[Row], evaluations: list[Row], title: str, path: Path) -> None:
    """Draws every panel of `PANELS` over the versions of a run and writes the picture to `path` as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    num_rows = -(-len(PANELS) // COLUMNS)
    figure, axes = pyplot.subplots(num_rows, COLUMNS, figsize=(5.4 * COLUMNS, 3.3 * num_rows), layout="constrained")
    figure.suptitle(title)
    for axis, (name, unit, panel) in zip(axes.flat, PANELS, strict=True):
        panel(axis, steps, evaluations)
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_ylabel(unit, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.locator_params(axis="x", integer=True)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, framealpha=0.6)
    for axis in axes[-1]:
        axis.set_xlabel("version", fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def lines(*names: str, scale: str = "linear", **labels: str) -> Panel:
    """A panel of the figures `names` of the steps, and of those in `labels` under another name. `scale`: linear, log or
    share, which is linear from 0 to 1."""

    def panel(axis: "Axes", steps: list[Row], evaluations: list[Row]) -> None:
        for name, label in {**{name: name.replace("_", " ") for name in names}, **labels}.items():
            versions, values = series(steps, name)
            if values:
                axis.plot(versions, values, label=label, linewidth=1.2, marker="." if len(values) < len(steps) else "")
        if scale == "share":
            axis.set_ylim(-0.03, 1.03)
        else:
            axis.set_yscale(scale)
        axis.grid(alpha=0.3)

    return panel


def series(rows: list[Row], name: str) -> tuple[list[int], list[float]]:
    """The steps that have the figure `name`, and it."""
    present = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in present], [value for _, value in present]


def rollout_accuracy(axis: "Axes", steps: list[Row], evaluations: list[Row]) -> None:
    for number, domain in enumerate(domains(steps)):
        versions, values = series(steps, f"accuracy/{domain}")
        axis.plot(versions, values, color=f"C{number + 1}", alpha=0.25, linewidth=1)
        axis.plot(versions, smooth(values), color=f"C{number + 1}", label=domain, linewidth=1.4)
    versions, values = series(steps, "accuracy")
    axis.plot(versions, smooth(values), color="black", label="all", linewidth=1.4)
    axis.set_ylim(-0.03, 1.03)
    axis.grid(alpha=0.3)


def held_out_accuracy(axis: "Axes", steps: list[Row], evaluations: list[Row]) -> None:
    """A point an evaluation: as wide as the versions it measured, as high as one standard error up and down."""
    for number, domain in enumerate(domains(evaluations)):
        points = [row for row in evaluations if row.get(f"accuracy/{domain}") is not None]
        spans = np.array([(row["first_version"], row["last_version"]) for row in points]).reshape(-1, 2)
        axis.errorbar(
            spans.mean(axis=1),
            [row[f"accuracy/{domain}"] for row in points],
            xerr=(spans[:, 1] - spans[:, 0]) / 2,
            yerr=[row.get(f"stderr/{domain}") or 0.0 for row in points],
            color="black" if domain == "all" else f"C{number + 1}",
            label=domain,
            marker="o",
            markersize=3,
            linewidth=1.2,
            capsize=2,
        )
    axis.set_ylim(-0.03, 1.03)
    axis.grid(alpha=0.3)


def staleness_histogram(axis: "Axes", steps: list[Row], evaluations: list[Row]) -> None:
    """A column a step: which share of its tokens had which age; the line is their mean."""
    rows = [row for row in steps if row.get("staleness_histogram")]
    if not rows:
        return
    counts = np.zeros((max(len(row["staleness_histogram"]) for row in rows), len(rows)))
    for number, row in enumerate(rows):
        counts[: len(row["staleness_histogram"]), number] = row["staleness_histogram"]
    versions, ages = [row["step"] for row in rows], range(len(counts))
    shares = np.ma.masked_equal(counts / counts.sum(axis=0), 0.0)
    mesh = axis.pcolormesh(versions, ages, shares, cmap="Blues", vmin=0.0, vmax=1.0, shading="nearest")
    bar = axis.figure.colorbar(mesh, ax=axis, pad=0.01)
    bar.set_label("share of tokens", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    axis.plot(*series(rows, "staleness"), color="C1", label="mean", linewidth=1.2)
    axis.set_yticks(ages)


def staleness_parts(axis: "Axes", steps: list[Row], evaluations: list[Row]) -> None:
    versions, in_flight = series(steps, "staleness_in_flight")
    _, in_queue = series(steps, "staleness_in_queue")
    axis.stackplot(versions, in_flight, in_queue, labels=("in flight (mean)", "in queue (mean)"), alpha=0.7)
    axis.plot(*series(steps, "staleness_max"), color="black", label="largest", linewidth=1.0)
    axis.locator_params(axis="y", integer=True)
    axis.grid(alpha=0.3)


def step_time(axis: "Axes", steps: list[Row], evaluations: list[Row]) -> None:
    timed = [row | {"other_s": other_s(row)} for row in steps]
    parts = [series(timed, name)[1] for name in PHASES]
    axis.stackplot([row["step"] for row in timed], *parts, labels=list(PHASES.values()), alpha=0.7)
    axis.grid(alpha=0.3)


def other_s(step: Row) -> float:
    """Seconds of a step that none of its phases tells of: checkpoints, metrics."""
    return max(0.0, step["step_s"] - step["wait_s"] - step["train_s"] - step["publish_s"])


def domains(rows: list[Row]) -> list[str]:
    """The domains that the rows have accuracies of; in evaluations `all` is one of them, and the last."""
    names = {key.partition("/")[2] for row in rows for key in row if key.startswith("accuracy/")}
    return sorted(names, key=lambda name: (name == "all", name))


def smooth(values: list[float]) -> list[float]:
    """Each value's mean with its neighbours, up to a twentieth of all to either side."""
    reach = len(values) // 20
    return [float(np.mean(values[max(0, i - reach) : i + reach + 1])) for i in range(len(values))]


PANELS: tuple[tuple[str, str, Panel], ...] = (
    ("Rollouts: solved", "share", rollout_accuracy),
    ("Held out: avg@k, one standard error", "share solved", held_out_accuracy),
    ("Rollouts: mean reward", "score", lines("reward")),
    ("Age of tokens", "versions", staleness_histogram),
    ("Age of tokens, by where they grew old", "versions", staleness_parts),
    ("Wait between arrival and training", "seconds", lines(queue_s="mean", queue_s_max="longest")),
    ("Idle share", "share of time", lines(scale="share", learner_idle="learner", generator_idle="generators")),
    ("Speed", "tokens/s", lines(generated_tokens_per_s="generated", trained_tokens_per_s="trained")),
    ("A step's time", "seconds", step_time),
    ("Off-policy correction", "share", lines("effective_sample_size", "clipped", "rejected", scale="share")),
    ("Policy against behaviour", "nats a token", lines("drift", "mismatch", "kl", scale="log")),
    ("Completions", "tokens", lines(length="mean", length_max="longest")),
    ("Completions cut off at the limit", "share", lines("truncated", scale="share")),
    ("Entropy of the policy", "nats a token", lines("entropy")),
    ("Gradient norm before clipping", "norm", lines("grad_norm", scale="log")),
)
