"""What people look at: typed results, figures and tables of finished runs."""

from xgblora.report.answers import (
    ANSWERS,
    Answer,
    AnsweredRow,
    calibration,
    calibration_error,
    read_answers,
    write_answers,
)
from xgblora.report.closing import closing, short, stages_closing
from xgblora.report.figures import draw_eval, draw_loss, draw_merge_eval, draw_stages, draw_summary
from xgblora.report.intervals import wilson
from xgblora.report.page import REPORT, write_report
from xgblora.report.result import METRICS, Curves, RunResult, read_curves
from xgblora.report.table import results_table, summarise
from xgblora.report.tuning import TrialResult, Trials, draw_trials, trials_table
from xgblora.report.view import RunView

__all__ = [
    "ANSWERS",
    "METRICS",
    "REPORT",
    "Answer",
    "AnsweredRow",
    "Curves",
    "RunResult",
    "RunView",
    "TrialResult",
    "Trials",
    "calibration",
    "calibration_error",
    "closing",
    "draw_eval",
    "draw_loss",
    "draw_merge_eval",
    "draw_stages",
    "draw_summary",
    "draw_trials",
    "read_answers",
    "read_curves",
    "results_table",
    "short",
    "stages_closing",
    "summarise",
    "trials_table",
    "wilson",
    "write_answers",
    "write_report",
]
