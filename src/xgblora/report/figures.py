"""The figures of a comparison, readable at first sight: one colour a method, thin lines for seeds, bold for means."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from xgblora.files import write_atomically
from xgblora.report.result import Curves

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe & Ito: told apart by colour-blind readers too
STYLES = ("-", "--", "-.", ":")  # identical curves stay visible on top of each other


def draw_loss(runs: Sequence[Curves], path: Path) -> None:
    """Training loss or reward over steps: seeds thin, running mean over all seeds bold, merges as ticks on the axis."""
    work, unit = _work(runs)
    title, name, sign = ("Reward in training", "reward", -1) if _rewarded(runs) else ("Training loss", "loss (nats)", 1)
    figure, axes = _canvas(title, work, name, runs)
    for number, (label, group) in enumerate(_by_label(runs).items()):
        colour, style = COLOURS[number % 4], STYLES[number % 4]
        for run in group:
            axes.plot(
                unit(run) * _measured(run),
                sign * _column(run.loss, "loss"),
                color=colour,
                alpha=0.25,
                linewidth=0.8,
            )
        shared = min(len(run.loss) for run in group)
        if shared:
            mean = sign * np.mean([_column(run.loss, "loss")[:shared] for run in group], axis=0)
            window = max(1, shared // 20)
            smooth = np.convolve(mean, np.ones(window) / window, mode="valid")
            steps = unit(group[0]) * _measured(group[0])[window - 1 : shared]
            name = f"{label}, {_seeds(group)}" + (f", running mean over {window} points" if window > 1 else "")
            axes.plot(steps, smooth, style, color=colour, linewidth=2.4, label=name)
        for run in group:
            if not (merges := run.result.merge_steps):
                continue  # an empty line would count as one at the figure's corner
            axes.plot(unit(run) * np.array(merges), [0.015] * len(merges), "|", color=colour, markersize=12,
                      markeredgewidth=1.6, transform=axes.get_xaxis_transform(), clip_on=False)  # fmt: skip
    _finish(figure, axes, path, merges=any(run.result.merges for run in runs))


ACCURACY = "accuracy (%)", "eval_accuracy", 100
LOSS = "loss (nats)", "eval_loss", 1
"""Measures of dev rows: name, column, factor."""


def draw_eval(runs: Sequence[Curves], path: Path) -> None:
    """Accuracy, reward or, of answers that were not written, loss on the dev rows over steps, from the base on.

    Merges are marked.
    """
    work, unit = _work(runs)
    column, factor, name = "eval_loss", 1, "loss (nats)"
    if _rewarded(runs):
        column, name = "eval_reward", "reward"
    elif _answered(runs):
        column, factor, name = "eval_accuracy", 100, "accuracy (%)"
    rows = runs[0].result.rows["dev"]
    figure, axes = _canvas(f"{name.split(' ')[0].capitalize()} on {rows:,} development rows", work, name, runs)
    for number, (label, group) in enumerate(_by_label(runs).items()):
        colour = COLOURS[number % 4]
        for run in group:
            legend = f"{label}, {_seeds(group)}" if run is group[0] else None
            work_done, reached = unit(run) * _column(run.evals, "step"), factor * _column(run.evals, column)
            merged = np.array([line["merge"] for line in run.evals], dtype=bool)
            axes.plot(work_done[merged], reached[merged], "D", markersize=7, color=colour)
            before = run.result.before_on_dev(column)
            if before is not None:
                work_done, reached = np.insert(work_done, 0, 0.0), np.insert(reached, 0, factor * before)
            axes.plot(work_done, reached, "o-", markersize=3, color=colour, alpha=0.8, label=legend)
    _finish(figure, axes, path, merges=any(run.result.merges for run in runs), merge_marker="D")


def _measured(run: Curves) -> np.ndarray:
    """The step at which each training loss was measured: of a fitted booster it is that before the booster."""
    return _column(run.loss, "step") - (1 if run.result.method == "boost" else 0)


def _answered(runs: Sequence[Curves]) -> bool:
    """Whether accuracies were measured on the way."""
    return all("eval_accuracy" in line for run in runs for line in run.evals)


def _rewarded(runs: Sequence[Curves]) -> bool:
    """Whether training followed a reward: then the loss is minus that."""
    return runs[0].result.reward is not None


def _work(runs: Sequence[Curves]) -> tuple[str, Callable[[Curves], float]]:
    """What to draw curves over, and how much of it a step is: steps, or examples where steps differ in size."""

    def examples(run: Curves) -> float:
        return run.result.forward_sequences / max(run.result.steps, 1)

    if len({examples(run) for run in runs}) == 1:
        return "step", lambda run: 1.0
    return "examples forwarded", examples


def draw_merge_eval(runs: Sequence[Curves], path: Path) -> None:
    """Dev accuracy, where it was measured, and loss with the first boosters; without boosters, a line across."""
    measured = [ACCURACY, LOSS] if _answered(runs) else [LOSS]
    figure, panels = _booster_panels("Development {} after each booster", [name for name, _, _ in measured])
    for number, (label, group) in enumerate(_by_label(runs).items()):
        for run in (run for run in group if run.evals):
            points = [line for line in run.evals if line["merge"]]
            points += [] if run.evals[-1]["merge"] else run.evals[-1:]
            for axes, (_, column, factor) in zip(panels, measured, strict=True):
                style: dict[str, Any] = {"color": COLOURS[number % 4], "alpha": 0.8}
                style["label"] = f"{label}, {_seeds(group)}" if run is group[0] else None
                if not run.result.merges:
                    axes.axhline(factor * points[-1][column], linestyle="--", **style)
                    continue
                before, counts = run.result.before_on_dev(column), np.arange(1, len(points) + 1)
                values = factor * _column(points, column)
                if before is not None:
                    counts, values = np.insert(counts, 0, 0), np.insert(values, 0, factor * before)
                axes.plot(counts, values, "o-", **style)
    _finish_panels(figure, panels, path)


def draw_stages(scores: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """Accuracy and loss with the first 0, 1, ... boosters of one run, a line for each set of rows."""
    figure, panels = _booster_panels("{} with the first boosters", [ACCURACY[0], LOSS[0]])
    for number, (rows, stages) in enumerate(scores.items()):
        for axes, values, factor in zip(panels, zip(*stages, strict=True), (100, 1), strict=True):
            axes.plot(range(len(stages)), factor * np.array(values), "o" + STYLES[number % 4],
                      color=COLOURS[number % 4], label=f"{rows} rows")  # fmt: skip
    _finish_panels(figure, panels, path)


def _booster_panels(title: str, names: Sequence[str]) -> tuple[Figure, Sequence[Axes]]:
    """A panel for each of some measures side by side, over the number of boosters."""
    figure = Figure(figsize=(5.5 * len(names), 4.4), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        heading = title.format(name)
        axes.set(title=heading[0].upper() + heading[1:], xlabel="boosters", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.grid(alpha=0.3)
    return figure, panels


def _finish_panels(figure: Figure, panels: Sequence[Axes], path: Path) -> None:
    _legend(figure, *panels[0].get_legend_handles_labels())
    save(figure, path)


def draw_summary(runs: Sequence[Curves], path: Path) -> None:
    """Held-out accuracy against zero-shot, and the time of a training.

    Of several seeds the mean and every seed; of one seed the 95 % interval that its rows leave. The whole training's
    time, since a step of one method may be a whole booster of another.
    """
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for number, (label, group) in enumerate(_by_label(runs).items()):
        accuracies = [100 * run.result.accuracy for run in group]
        seconds = [run.result.training_seconds for run in group if run.result.training_seconds is not None]
        for axes, values, form in ((left, np.array(accuracies), "{:.1f} %"), (right, np.array(seconds), "{:.3g} s")):
            if not len(values):
                continue  # nothing was trained
            mean, top = values.mean(), values.max()
            axes.bar(label, mean, color=COLOURS[number % 4], width=0.6)
            if len(values) > 1:
                axes.plot([label] * len(values), values, "o", color="black", markersize=4, alpha=0.7)
            elif axes is left:
                low, top = (100 * end for end in group[0].result.interval)
                axes.errorbar(label, mean, [[mean - low], [top - mean]], color="black", capsize=6)
            axes.annotate(form.format(mean), (label, top), (0, 4), textcoords="offset points", ha="center")
    zero_shot = 100 * float(np.mean([run.result.zero_shot_accuracy for run in runs]))
    left.axhline(zero_shot, color="grey", linestyle="--", label=f"zero-shot {zero_shot:.1f} %")
    first = runs[0].result
    most = max(len(group) for group in _by_label(runs).values())
    spread = "bars: 95 % interval of 1 seed" if most == 1 else f"dots: {most} seeds"
    left.set(title=f"{first.task}: accuracy on {first.rows['evaluation']:,} {first.evaluation_split} rows\n({spread})",
             ylabel="accuracy (%)", ylim=(0, 110))  # fmt: skip
    _legend(figure, *left.get_legend_handles_labels())
    right.set(title=f"Time of a training\n({'1 seed' if most == 1 else f'mean of {most} seeds'})", ylabel="seconds")
    right.margins(y=0.15)
    for axes in (left, right):
        axes.tick_params(axis="x", rotation=0 if len(_by_label(runs)) < 5 else 30)
    save(figure, path)


def _seeds(group: Sequence[Curves]) -> str:
    """How many runs a line is about."""
    return "1 seed" if len(group) == 1 else f"{len(group)} seeds"


def _by_label(runs: Sequence[Curves]) -> dict[str, list[Curves]]:
    groups: dict[str, list[Curves]] = {}
    for run in runs:
        groups.setdefault(run.result.label, []).append(run)
    return groups


def _column(lines: Sequence[dict[str, float]], name: str) -> np.ndarray:
    return np.array([line[name] for line in lines], dtype=float)


def _canvas(title: str, x: str, y: str, runs: Sequence[Curves]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    result = runs[0].result
    axes.set(title=f"{title}: {Path(result.model).name} on {result.task}", xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def _finish(figure: Figure, axes: Axes, path: Path, merges: bool, merge_marker: str = "|") -> None:
    handles, labels = axes.get_legend_handles_labels()
    if merges:
        handles.append(Line2D([], [], color="black", marker=merge_marker, linestyle="", markersize=8))
        labels.append("merge: a booster is frozen")
    _legend(figure, handles, labels)
    save(figure, path)


def _legend(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """Below the axes, where no data can be under it."""
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=2)


def save(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all, in the kind that the file's name says."""
    kind = path.suffix.lstrip(".").lower() or "png"
    FigureCanvasAgg(figure)
    write_atomically(path, lambda work: figure.savefig(work, dpi=130, format=kind))
