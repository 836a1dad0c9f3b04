"""Charts over the course of training: losses, evaluations, boosters."""

from collections.abc import Mapping, Sequence
from typing import Any

from xgblora.report.chart import COLOURS, DASHES, UNITS, Chart, axis
from xgblora.report.view import Line, RunView, by_label, first_unit, over_work, smoothed


def loss_chart(runs: Sequence[RunView]) -> Chart | None:
    """Training loss: every run thin, its running mean bold, merges as ticks on the axis."""
    runs = [run for run in runs if run.curves.loss]
    if not runs:
        return None
    rewarded = runs[0].result.reward is not None
    what, sign = ("reward in training", -1) if rewarded else ("training loss (nats)", 1)
    traces, over = [], []
    for number, (label, group) in enumerate(by_label(runs).items()):
        colour = COLOURS[number % len(COLOURS)]
        for place, run in enumerate(group):
            # The loss of a fitted booster is that before it.
            shift = 1 if run.result.method == "boost" else 0
            steps = [line["step"] - shift for line in run.curves.loss]
            losses = [sign * line["loss"] for line in run.curves.loss]
            same = {"legendgroup": label, "name": f"{label}, seed {run.result.seed}"}
            few = len(losses) < 40  # nothing to smooth
            thin = _line(over_work(run, steps, losses), colour, 1 if not few else 2.5, 0.35 if not few else 1)
            traces.append(thin[0] | same | {"showlegend": False, "mode": "lines+markers" if few else "lines"})
            over.append(thin[1])
            bold = _line(smoothed(run, steps, losses), colour, 2.5, 1, DASHES[number % len(DASHES)])
            mean = {"showlegend": not place, "name": label, "hovertext": same["name"]}
            traces.append(bold[0] | same | mean)
            over.append(bold[1])
            if run.result.merge_steps:
                ticks = over_work(run, run.result.merge_steps, [0.0] * len(run.result.merge_steps))
                first = not any(trace.get("legendgroup") == "merges" for trace in traces)
                traces.append(_ticks(ticks, colour, first) | {"legendgroup": "merges"})
                over.append(ticks.x)
    title = "Reward in training" if rewarded else "Training loss"
    groups = by_label(runs)
    ends = "; ".join(f"{label} from {_ends(group, sign)}" for label, group in groups.items())
    seeds = max(map(len, groups.values()))
    means = "" if seeds == 1 else f" Means of {seeds} seeds at first and at last:"
    layout = {"xaxis": axis(UNITS["steps"], rangemode="tozero"), "yaxis": axis(what)} | _tick_axis()
    return Chart(
        "loss", title, f"Thin: as logged; bold: running means.{means} {ends}.", traces, layout, over, first_unit(runs)
    )


def _ends(runs: Sequence[RunView], sign: int) -> str:
    first, last = (sign * sum(run.curves.loss[place]["loss"] for run in runs) / len(runs) for place in (0, -1))
    return f"{first:.3f} to {last:.3f}"


def _ticks(ticks: Line, colour: str, legend: bool) -> dict[str, Any]:
    marker = {"symbol": "line-ns-open", "size": 9, "color": colour, "line": {"width": 2}}
    return {
        **{"type": "scatter", "mode": "markers", "x": ticks.x["steps"], "y": ticks.y, "yaxis": "y2"},
        **{"marker": marker, "name": "merge: a booster is frozen", "showlegend": legend},
        "hovertemplate": "merge at %{x}<extra></extra>",
    }


def _tick_axis() -> dict[str, Any]:
    """A second y axis that holds the ticks of merges at its bottom."""
    return {"yaxis2": {"overlaying": "y", "range": [-0.02, 1], "visible": False, "fixedrange": True}}


def _line(
    line: Line, colour: str, width: float, opacity: float, dash: str = "solid"
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    style = {"color": colour, "width": width, "dash": dash}
    hover = "%{fullData.name}: %{y:.4f} at %{x:,}<extra></extra>"
    trace = {"type": "scatter", "mode": "lines", "x": line.x["steps"], "y": line.y, "line": style, "opacity": opacity}
    return trace | {"hovertemplate": hover}, line.x


def dev_chart(runs: Sequence[RunView]) -> Chart | None:
    """Accuracy (reward; loss) on the dev rows over the work, from the base on."""
    runs = [run for run in runs if run.curves.evals]
    if not runs:
        return None
    column, factor, what = _dev_measure(runs)
    traces, over, rows = [], [], []
    for number, (label, group) in enumerate(by_label(runs).items()):
        for place, run in enumerate(group):
            steps = [line["step"] for line in run.curves.evals]
            values = [factor * line[column] for line in run.curves.evals]
            merged = [line["merge"] for line in run.curves.evals]
            before = run.result.before_on_dev(column)
            if before is not None:
                steps, values, merged = [0, *steps], [factor * before, *values], [False, *merged]
            rows += [(run.name, f"{s:,}", f"{v:.4g}") for s, v in zip(steps, values, strict=True)]
            line, x = _line(over_work(run, steps, values), COLOURS[number % len(COLOURS)], 2, 0.9)
            shapes = ["diamond" if merge else "circle" for merge in merged]
            marker = {"symbol": shapes if len(shapes) == len(line["y"]) else "circle", "size": 8}
            names = {"name": label, "legendgroup": label, "showlegend": not place}
            traces.append(line | names | {"mode": "lines+markers", "marker": marker})
            over.append(x)
    title = f"{what.split(' (')[0].capitalize()} on {runs[0].result.rows['dev']:,} dev rows"
    layout = {"xaxis": axis(UNITS["steps"], rangemode="tozero"), "yaxis": axis(what)}
    says = f"{title} as training goes on; a diamond is a merge."
    return Chart("dev", title, says, traces, layout, over, first_unit(runs), (("run", "step", what), rows))


def _dev_measure(runs: Sequence[RunView]) -> tuple[str, int, str]:
    """Column of an evaluation, factor and name."""
    if runs[0].result.reward is not None:
        return "eval_reward", 1, "reward"
    if all("eval_accuracy" in line for run in runs for line in run.curves.evals):
        return "eval_accuracy", 100, "accuracy (%)"
    return "eval_loss", 1, "loss (nats)"


def booster_charts(runs: Sequence[RunView]) -> list[Chart]:
    """Dev loss and, where it was measured, accuracy with the first boosters; LoRA's as lines across."""
    judged = [run for run in runs if run.curves.evals]
    boosted = [run for run in judged if (run.result.boosters or 0) > 1 and any(e["merge"] for e in run.curves.evals)]
    if not boosted:
        return []
    charts = [_of_boosters(judged, boosted, ("eval_loss", 1, ".4f", "dev loss (nats)"))]
    if all("eval_accuracy" in line for run in judged for line in run.curves.evals):
        charts.append(_of_boosters(judged, boosted, ("eval_accuracy", 100, ".1f", "dev accuracy (%)")))
    return charts


def _of_boosters(judged: Sequence[RunView], boosted: list[RunView], measure: tuple[str, int, str, str]) -> Chart:
    column, factor, form, unit = measure
    traces, rows = [], []
    most = max(max(_by_boosters(run)) for run in boosted)
    for number, (label, group) in enumerate(by_label(judged).items()):
        for place, run in enumerate(group):
            values = {k: factor * e[column] for k, e in _by_boosters(run).items() if column in e}
            if run in boosted:
                rows += [(run.name, str(k), f"{value:{form}}") for k, value in values.items()]
            else:
                values = dict.fromkeys((0, most), factor * run.curves.evals[-1][column])
            line, _ = _line(over_work(run, list(values), list(values.values())), COLOURS[number % len(COLOURS)], 2, 0.9)
            line |= {"mode": "lines+markers", "name": label, "legendgroup": label, "showlegend": not place}
            if run not in boosted:
                line |= {"mode": "lines", "line": line["line"] | {"dash": "dash"}, "name": f"{label} (no boosters)"}
            traces.append(line)
    layout = {"xaxis": axis("boosters", rangemode="tozero"), "yaxis": axis(unit)}
    what = unit.partition(" (")[0]
    return Chart(
        name=f"boosters-{what.rpartition(' ')[2]}",
        title=f"{what.capitalize()} with the first boosters alone",
        says=_added(boosted[0], column, factor, form),
        traces=traces,
        layout=layout,
        table=(("run", "boosters", unit), rows),
    )


def _by_boosters(run: RunView) -> dict[int, Mapping[str, float]]:
    """Evaluations by how many boosters there were; 0 is the base."""
    points = [line for line in run.curves.evals if line["merge"] or line is run.curves.evals[-1]]
    start = {name: before for name in points[0] if (before := run.result.before_on_dev(name)) is not None}
    # At a merge all boosters are frozen; else the pair in training is one more.
    judged: dict[int, Mapping[str, float]] = {0: start} if start else {}
    # At a merge all boosters are frozen; else the pair in training is one more.
    return judged | {line["boosters"] + (not line["merge"]): line for line in points}


def _added(run: RunView, column: str, factor: int, form: str) -> str:
    """What each booster of a run did, in words."""
    values = {k: factor * e[column] for k, e in _by_boosters(run).items() if column in e}
    steps = [f"booster {k} {values[k] - values[k - 1]:+{form}}" for k in values if k - 1 in values]
    shown = ", ".join(steps[:6]) + (f", and {len(steps) - 6} more" if len(steps) > 6 else "")
    count = run.result.boosters or 0
    kept = f" The run kept {count} of {max(values)}." if count < max(values) else ""
    return f"{run.name}: {shown}.{kept}"
