"""One chart of a report, as Plotly draws it: plain data, so that nothing has to be imported for it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

COLOURS = ("#2a7fc1", "#d9601a", "#1a9a70", "#b066a0", "#8a7a1f", "#6b7280")
"""Told apart by colour-blind readers, and at least 3 : 1 against white and against the dark page."""
DASHES = ("solid", "dash", "dashdot", "dot")
GREY = "#808790"
UNITS = {"steps": "training steps", "examples": "examples forwarded", "seconds": "seconds of training"}
"""What curves can be drawn over."""


@dataclass(frozen=True)
class Chart:
    """One chart, and the same in words."""

    name: str
    """Of its element on the page."""
    title: str
    says: str
    """What it shows, for whoever does not see it."""
    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    over: list[dict[str, list[float]]] = field(default_factory=list)
    """x of every trace by unit, where there is a choice."""
    unit: str = "steps"
    """What it is drawn over at first, where there is a choice."""
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None
    """Its numbers: header and lines."""

    def drawing(self) -> dict[str, Any]:
        """What the page's script needs of it."""
        return {"traces": self.traces, "layout": self.layout, "over": self.over}


def axis(title: str, **settings: Any) -> dict[str, Any]:
    """An axis with its name."""
    return {"title": {"text": title}, "automargin": True} | settings
