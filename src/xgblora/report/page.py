"""A report as one HTML file that needs no network: what it says, its charts, and the script that draws them."""

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from xgblora.files import write_atomically
from xgblora.report.chart import UNITS, Chart
from xgblora.report.sections import Content, content, tail
from xgblora.report.view import RunView

REPORT = "report.html"
ASSETS = files("xgblora.report") / "assets"


def write_report(runs: Sequence[RunView], file: Path) -> None:
    """Write the report of one run, or of several that are compared.

    Args:
        runs: At least one, of the same model and task.
        file: Where it goes; a former one is replaced.

    Example::

        write_report([read_view(Path("runs/mine"))], Path("report.html"))
    """
    text = page(content(runs))
    write_atomically(file, lambda work: work.write_text(text, encoding="utf-8", newline="\n"))


def page(of: Content) -> str:
    """The HTML text of a report."""
    made = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters["tail"] = tail
    charts: list[Chart] = [*of.charts, *(chart for part in of.parts for chart in part.charts.values())]
    return made.from_string(_asset("page.html.j2")).render(
        of=of,
        units=UNITS,
        css=Markup(_asset("page.css")),
        script=Markup(_asset("page.js")),
        plotly=Markup((files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")),
        drawings=_within_script({chart.name: chart.drawing() for chart in charts}),
        metrics=_within_script([part.run.result.metrics() for part in of.parts]),
    )


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _within_script(value: object) -> Markup:
    """JSON that no text in it can break out of its element with."""
    return Markup(json.dumps(value, ensure_ascii=False).replace("<", "\\u003c"))
