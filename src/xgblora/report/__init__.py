"""What people look at: typed results, figures and tables of finished runs."""

from xgblora.report.closing import closing, short, stages_closing
from xgblora.report.figures import draw_eval, draw_loss, draw_merge_eval, draw_stages, draw_summary
from xgblora.report.intervals import wilson
from xgblora.report.result import METRICS, Curves, RunResult, read_curves
from xgblora.report.table import results_table, summarise

__all__ = [
    "METRICS",
    "Curves",
    "RunResult",
    "closing",
    "draw_eval",
    "draw_loss",
    "draw_merge_eval",
    "draw_stages",
    "draw_summary",
    "read_curves",
    "results_table",
    "short",
    "stages_closing",
    "summarise",
    "wilson",
]
