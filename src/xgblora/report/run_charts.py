"""Charts of one trained model: which layers changed, how sure it is, what it mistakes for what."""

from xgblora.report.answers import Answer, calibration, calibration_error, confusion
from xgblora.report.chart import COLOURS, GREY, Chart, axis
from xgblora.report.layers import block_norms
from xgblora.report.view import RunView


def layer_chart(run: RunView, name: str) -> Chart | None:
    """How much every booster changes the weights of each decoder layer."""
    blocks = block_norms(run.norms)
    what = "booster" if run.result.boosters else "pair"
    if not blocks:
        return None
    names = [block.name for block in blocks]
    count = len(blocks[0].norms)
    trace = {
        "type": "heatmap",
        "z": [[float(f"{value:.4g}") for value in block.norms] for block in blocks],
        "x": [str(number + 1) for number in range(count)],
        "y": names,
        "customdata": [[parts] * count for parts in (block.parts for block in blocks)],
        "colorscale": "Viridis",
        "colorbar": {"title": {"text": "norm"}},
        "hovertemplate": f"%{{y}}, {what} %{{x}}: %{{z:.4g}}<br>in all: %{{customdata}}<extra></extra>",
    }
    layout = {
        "xaxis": axis(what, type="category"),
        "yaxis": {"automargin": True, "type": "category", "autorange": "reversed"},
        "small": 150 + 17 * len(blocks),
    }
    most = max(blocks, key=lambda block: block.total)
    says = (
        f"{most.name.capitalize()} changes most. Frobenius norm of what a {what} adds to the weights, by decoder layer."
    )
    rows = [(block.name, *(f"{value:.3g}" for value in block.norms)) for block in blocks]
    header = ("layer", *(f"{what} {number + 1}" for number in range(count)))
    return Chart(name, f"How much each {what} changes which layer", says, [trace], layout, table=(header, rows))


def calibration_chart(run: RunView, name: str) -> Chart | None:
    """How often answers are right, by how sure the model is of them, before and after."""
    if not run.answers or run.answers[0].trained.probability is None:
        return None
    diagonal = {"color": GREY, "dash": "dash", "width": 1.5}
    even = {
        "type": "scatter",
        "mode": "lines",
        "x": [0, 100],
        "y": [0, 100],
        "line": diagonal,
        "name": "as sure as right",
    }
    traces, rows, errors = [even | {"hoverinfo": "skip"}], [], []
    for who, answers in _before_and_after(run):
        bins = calibration(answers)
        errors.append(f"{who} is off by {100 * calibration_error(bins):.1f} points")
        style = {"color": GREY if who == "base" else COLOURS[0], "width": 2}
        traces.append(
            {
                **{"type": "scatter", "mode": "lines+markers", "line": style, "name": who},
                **{"x": [round(100 * one.sure, 2) for one in bins], "y": [round(100 * one.right, 2) for one in bins]},
                **{"customdata": [one.rows for one in bins]},
                "hovertemplate": f"{who}: %{{x:.0f}} % sure, %{{y:.0f}} % right (%{{customdata}} rows)<extra></extra>",
            }
        )
        rows += [(who, f"{100 * one.sure:.1f}", f"{100 * one.right:.1f}", f"{one.rows:,}") for one in bins]
    layout = {
        "xaxis": axis("how sure (%)", range=[0, 102]),
        "yaxis": axis("how often right (%)", range=[0, 102]),
    }
    says = f"In the mean, {'; '.join(errors)}."
    header = ("model", "sure, %", "right, %", "rows")
    return Chart(name, "Is it as right as it is sure?", says, traces, layout, table=(header, rows))


def _before_and_after(run: RunView) -> list[tuple[str, list[Answer]]]:
    after = "trained", [row.trained for row in run.answers]
    return [("base", [row.base for row in run.answers]), after]


def confusion_chart(run: RunView, name: str) -> Chart | None:
    """What was answered where each option is right, by the trained model."""
    made = confusion(run.answers)
    if made is None:
        return None
    names, counts = made
    trace = {
        **{"type": "heatmap", "z": counts, "x": names, "y": names, "text": counts, "texttemplate": "%{text}"},
        **{"colorscale": [[0, "#dfe7ee"], [1, "#15568f"]], "showscale": False},
        "hovertemplate": "right: %{y}<br>answered: %{x}<br>%{z} rows<extra></extra>",
    }
    layout = {
        "xaxis": axis("answered", type="category"),
        "yaxis": axis("right", type="category", autorange="reversed"),
        "small": 210 + 34 * len(names),
    }
    hits = sum(counts[place][place] for place in range(len(names)))
    says = f"{hits:,} of {sum(map(sum, counts)):,} rows are on the diagonal, which is right."
    rows = [(names[place], *map(str, line)) for place, line in enumerate(counts)]
    return Chart(name, "What is taken for what", says, [trace], layout, table=(("right", *names), rows))
