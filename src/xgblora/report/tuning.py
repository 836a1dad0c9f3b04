"""The trials of a search: a table to read, and a picture of what each flag does to the dev loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from xgblora.report.figures import COLOURS, save


@dataclass(frozen=True)
class TrialResult:
    """What became of one trial."""

    number: int
    """From 0."""
    given: bool
    """Whether it has the flags as they were given."""
    values: dict[str, Any]
    """Of the flags that are searched."""
    state: str
    """complete, ended early or diverged."""
    loss: float | None
    """Of the dev rows, or minus their reward (:attr:`Trials.measure`); None where it did not come to its end."""
    steps: int | None
    """At its last evaluation."""
    seconds: float | None


@dataclass(frozen=True)
class Trials:
    """The trials of a search."""

    all: list[TrialResult]
    best: TrialResult
    """The one among them with the lowest loss."""
    measure: str
    """What the loss is, in words: the dev loss, or minus the dev reward."""
    logarithmic: dict[str, bool]
    """The flags that are searched, and whether their values are drawn evenly in their logarithm."""


def short(value: Any) -> str:
    """The value of a flag, with at most three digits of what is no whole number."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def trials_table(trials: Trials) -> Table:
    """One line a trial, the best one marked."""
    table = Table(
        title=f"{len(trials.all)} trials; test rows chose nothing",
        caption=f"* lowest {trials.measure}; time in seconds",
    )
    for name in ("trial", *trials.logarithmic, trials.measure, "steps", "time", ""):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for trial in trials.all:
        table.add_row(
            f"{'*' if trial is trials.best else ''}{trial.number + 1}",
            *map(short, trial.values.values()),
            "-" if trial.loss is None else f"{trial.loss:.4f}",
            "-" if trial.steps is None else f"{trial.steps:,}",
            "-" if trial.seconds is None else f"{trial.seconds:,.0f}",
            "" if trial.state == "complete" else trial.state,
        )
    return table


def draw_trials(trials: Trials, what: str, path: Path) -> None:
    """The loss of every trial in their order, with the lowest so far, then over each flag that was searched.

    Args:
        trials: Finished ones; those without a loss are ticks at the upper edge.
        what: Which model learned what, as the heading says it.
        path: Where the picture goes.
    """
    panels = 1 + len(trials.logarithmic)
    columns = 2 if panels == 4 else min(3, panels)
    figure = Figure(figsize=(4.4 * columns, 3.9 * -(-panels // columns)), layout="constrained")
    figure.suptitle(f"{len(trials.all)} trials: {what}")
    axes = figure.subplots(-(-panels // columns), columns, squeeze=False).ravel()
    done = [trial for trial in trials.all if trial.loss is not None]
    lowest = np.minimum.accumulate(np.array([trial.loss for trial in done]))
    numbers = [trial.number + 1 for trial in done]
    axes[0].step(numbers, lowest, where="post", color=COLOURS[0], label="lowest so far")
    _points(axes[0], {trial.number: trial.number + 1 for trial in trials.all}, trials)
    axes[0].set(xlabel="trial")
    axes[0].xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    for panel, (name, log) in zip(axes[1:], trials.logarithmic.items(), strict=False):
        values = [trial.values[name] for trial in trials.all]
        if numeric := all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            places: dict[int, Any] = {trial.number: trial.values[name] for trial in trials.all}
        else:
            kinds = list(dict.fromkeys(values))
            places = {trial.number: kinds.index(trial.values[name]) for trial in trials.all}
            panel.set_xticks(range(len(kinds)), [str(kind) for kind in kinds])
        _points(panel, places, trials)
        if log:
            panel.set_xscale("log")
        elif numeric and all(isinstance(value, int) for value in values):
            panel.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        panel.set(xlabel=name)
    for panel in axes[:panels]:
        panel.set(ylabel=trials.measure + (" (nats)" if "loss" in trials.measure else ""))
    for panel in axes[panels:]:
        panel.remove()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    save(figure, path)


def _points(axes: Axes, places: Mapping[int, Any], trials: Trials) -> None:
    """Every trial at its place."""
    done = [trial for trial in trials.all if trial.loss is not None]
    losses = np.array([one.loss for one in done], dtype=float)
    axes.plot([places[one.number] for one in done], losses, "o", color="grey", label="a trial")
    first = trials.all[0]
    if first.given and first.loss is not None:
        axes.plot(places[0], first.loss, "s", markersize=9, color=COLOURS[1], label="trial 1: flags as given")
    axes.plot(places[trials.best.number], losses.min(), "*", markersize=16, color=COLOURS[2], label="best")
    if left := [places[one.number] for one in trials.all if one.loss is None]:
        axes.plot(left, [0.985] * len(left), "x", color="grey", transform=axes.get_xaxis_transform(),
                  label="ended early, or diverged")  # fmt: skip
    axes.grid(alpha=0.3)
