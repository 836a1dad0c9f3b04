"""What each second and each megabyte buys: a panel for each task and model, a point for each finished run.

    python benchmarks/quality_chart.py docs/quality.png runs/boost runs/lora ...

Folders of runs of ``xgblora train`` or of the other benchmarks, whose order is that of the panels. Up is better: the
accuracy of chosen answers, and how far the loss of written ones fell.
"""

import argparse
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from xgblora.report import RunResult
from xgblora.report.figures import COLOURS

MEASURES = {"training_seconds": (1.0, "seconds of training"), "peak_memory_mb": (1e-3, "peak memory of training (GB)")}
"""Metric, factor and name of what a run costs."""


def reached(result: RunResult) -> tuple[float, str]:
    """How good a run is, and the unit of that."""
    if result.metric in (None, "macro_f1"):
        return 100 * result.accuracy, "test accuracy (%)"
    return result.zero_shot_loss - result.eval_loss, "fall of the test loss\n(nats a token)"


def zero_shot(result: RunResult) -> float:
    """What :func:`reached` says of the model as it is."""
    return 100 * result.zero_shot_accuracy if result.metric in (None, "macro_f1") else 0.0


def named(result: RunResult) -> str:
    """The method in words."""
    return result.label if result.method in ("boost", "probe", "centroid") else f"{result.label}, r = {result.rank}"


def draw(results: list[RunResult], path: Path) -> None:
    """Write the chart."""
    panels = list(dict.fromkeys((result.model, result.task) for result in results))
    methods = sorted({named(result) for result in results})
    figure = Figure(figsize=(11, 0.8 + 2.9 * len(panels)), layout="constrained")
    rows = figure.subplots(len(panels), 2, squeeze=False)
    for axes, (model, task) in zip(rows, panels, strict=True):
        of_panel = [result for result in results if (result.model, result.task) == (model, task)]
        for place, (metric, (factor, name)) in zip(axes, MEASURES.items(), strict=True):
            _panel(place, of_panel, methods, metric, factor)
            place.set(title=f"{task}, {Path(model).stem}", xlabel=name, ylabel=reached(of_panel[0])[1])
    handles = {
        text: handle for place in rows.flat for handle, text in zip(*place.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=120)


def _panel(axes: Axes, results: list[RunResult], methods: list[str], metric: str, factor: float) -> None:
    for result in results:
        cost, (good, _) = factor * (getattr(result, metric) or 0.0), reached(result)
        number = methods.index(named(result))
        axes.plot(cost, good, "os^Dv"[number % 5], color=COLOURS[number % 4], markersize=9, label=named(result))
        axes.annotate(named(result), (cost, good), (8, -4), textcoords="offset points", fontsize="small")
    axes.axhline(zero_shot(results[0]), color="grey", linestyle="--", linewidth=1, label="zero-shot")
    axes.set_xlim(left=0, right=1.7 * max(factor * (getattr(result, metric) or 0.0) for result in results))
    axes.grid(alpha=0.3)


def main() -> None:
    """Read the runs and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    asked = parser.parse_args()
    draw([RunResult.read(folder) for folder in asked.runs], asked.figure)


if __name__ == "__main__":
    main()
