"""Charts that compare methods: what each reached, and how much better it is."""

from collections.abc import Mapping, Sequence

from xgblora.report.chart import COLOURS, GREY, Chart, axis
from xgblora.report.paired import Difference
from xgblora.report.view import RunView, by_label


def accuracy_chart(runs: Sequence[RunView]) -> Chart:
    """Accuracy of each method on the held-out rows: every seed, and the mean; the interval of one seed's rows."""
    first = runs[0].result
    traces, rows = [], []
    for number, (label, group) in enumerate(by_label(runs).items()):
        reached = [100 * run.result.accuracy for run in group]
        mean = sum(reached) / len(reached)
        ends = [100 * end for end in group[0].result.interval]
        bar = {"type": "data", "symmetric": False, "array": [ends[1] - mean], "arrayminus": [mean - ends[0]]}
        shape = {"color": COLOURS[number % len(COLOURS)], "size": 13, "symbol": "diamond"}
        traces.append(
            {
                **{"type": "scatter", "mode": "markers", "x": [mean], "y": [label], "marker": shape},
                **{"name": label, "showlegend": False, "hovertemplate": "%{y}: %{x:.1f} %<extra></extra>"},
                **({"error_x": bar | {"thickness": 2}} if len(group) == 1 else {}),
            }
        )
        if len(group) > 1:
            dots = {"color": COLOURS[number % len(COLOURS)], "size": 8, "opacity": 0.55}
            texts = [f"{run.name}: {value:.1f} %" for run, value in zip(group, reached, strict=True)]
            traces.append(
                {
                    **{"type": "scatter", "mode": "markers", "x": reached, "y": [label] * len(group), "marker": dots},
                    **{"hovertext": texts, "hoverinfo": "text", "showlegend": False},
                }
            )
        rows.append((label, str(len(group)), f"{mean:.1f}", ", ".join(f"{value:.1f}" for value in reached)))
    base = 100 * sum(run.result.zero_shot_accuracy for run in runs) / len(runs)
    note = {"text": f"base {base:.1f} %", "showarrow": False, "x": base, "y": 1, "yref": "paper", "yanchor": "bottom"}
    line = {"type": "line", "x0": base, "x1": base, "yref": "paper", "y0": 0, "y1": 1}
    layout = {
        "xaxis": axis("accuracy (%)"),
        "yaxis": {"automargin": True, "autorange": "reversed", "type": "category"},
        "shapes": [line | {"line": {"dash": "dash", "color": GREY, "width": 1.5}}],
        "annotations": [note],
        "small": 110 + 52 * len(by_label(runs)),
    }
    seeds = max(len(group) for group in by_label(runs).values())
    spread = "bars: 95 % of 1 seed's rows" if seeds == 1 else f"dots: {seeds} seeds; diamonds: their mean"
    title = f"Accuracy on {first.rows['evaluation']:,} {first.evaluation_split} rows ({spread})"
    says = "; ".join(f"{row[0]} {row[2]} %" for row in rows) + f"; the base {base:.1f} %."
    return Chart("accuracy", title, says, traces, layout, table=(("method", "seeds", "mean, %", "each, %"), rows))


def difference_chart(differences: Mapping[str, Difference], reference: str, labels: Sequence[str]) -> Chart | None:
    """How much better every method is than one of them, with its interval.

    Args:
        differences: To the reference, by method.
        reference: The method that the others are compared with.
        labels: All methods, in the order of their colours.
    """
    if not differences:
        return None
    traces, rows = [], []
    for label, of in differences.items():
        bar = {"type": "data", "symmetric": False, "array": [100 * (of.high - of.mean)], "thickness": 2}
        bar["arrayminus"] = [100 * (of.mean - of.low)]
        shape = {"color": COLOURS[labels.index(label) % len(COLOURS)], "size": 13, "symbol": "diamond"}
        traces.append(
            {
                **{"type": "scatter", "mode": "markers", "x": [100 * of.mean], "y": [label], "error_x": bar},
                **{"marker": shape, "showlegend": False},
                "hovertemplate": f"%{{y}}: %{{x:+.1f}} ({100 * of.low:+.1f} to {100 * of.high:+.1f})<extra></extra>",
            }
        )
        of_seeds = ", ".join(f"{100 * value:+.1f}" for value in of.of_seeds.values())
        rows.append((label, f"{100 * of.mean:+.1f}", f"{100 * of.low:+.1f} to {100 * of.high:+.1f}", of_seeds))
    zero = {"type": "line", "x0": 0, "x1": 0, "yref": "paper", "y0": 0, "y1": 1, "line": {"color": GREY, "width": 1.5}}
    layout = {
        "xaxis": axis("points of accuracy", zeroline=False),
        "yaxis": {"automargin": True, "autorange": "reversed", "type": "category"},
        "shapes": [zero],
        "small": 110 + 52 * len(differences),
    }
    seeds = len(next(iter(differences.values())).of_seeds)
    over = "rows of 1 seed" if seeds == 1 else f"rows and {seeds} seeds"
    title = f"Difference to {reference}, with its 95 % interval (bootstrap over {over})"
    says = "; ".join(f"{row[0]} {row[1]} points ({row[2]})" for row in rows) + "."
    header = ("method", "points", "95 %", "each seed")
    return Chart("difference", title, says, traces, layout, table=(header, rows))
