"""The verbs that take a finished run."""

from rich.table import Table

from xgblora import group
from xgblora.cli.output import print_table, set_up_output
from xgblora.cli.parsing import parse_of_run
from xgblora.errors import XgbloraError
from xgblora.report import stages_closing, wilson
from xgblora.runs.export import ExportConfig
from xgblora.runs.export import export as write_export
from xgblora.runs.html_report import ReportConfig, report_of
from xgblora.runs.push import PushConfig
from xgblora.runs.push import push as upload
from xgblora.runs.replay import ReplayConfig
from xgblora.runs.replay import replay as take_steps_again
from xgblora.runs.stages import StagesConfig
from xgblora.runs.stages import stages as evaluate_stages


def stages(verb: str, argv: list[str]) -> int:
    """Accuracy and loss of the first boosters."""
    set_up_output()
    run, texts, config = parse_of_run(StagesConfig, verb, argv)
    _no_texts(texts)
    scored, files = evaluate_stages(run, config)
    if not group.first():
        return 0
    table = Table(title=f"{run}: the first boosters alone")
    for column in ("boosters", "test accuracy %", "95 %", "test loss", "dev accuracy %", "dev loss"):
        table.add_column(column, justify="right")
    for stage in scored:
        dev = ("", "")
        if stage.dev_accuracy is not None:
            dev = (f"{100 * stage.dev_accuracy:.1f}", f"{stage.dev_loss:.4f}")
        low, high = (100 * end for end in wilson(round(stage.accuracy * stage.rows), stage.rows))
        interval = f"{low:.1f}-{high:.1f}"
        table.add_row(str(stage.boosters), f"{100 * stage.accuracy:.1f}", interval, f"{stage.loss:.4f}", *dev)
    print(stages_closing({stage.boosters: stage.dev_loss for stage in scored if stage.dev_loss is not None}, run))
    print_table(table, files)
    return 0


def report(verb: str, argv: list[str]) -> int:
    """A page with charts."""
    set_up_output()
    run, texts, config = parse_of_run(ReportConfig, verb, argv)
    _no_texts(texts)
    print(report_of(run, config))
    return 0


def replay(verb: str, argv: list[str]) -> int:
    """The adapter after a step."""
    set_up_output()
    run, texts, config = parse_of_run(ReplayConfig, verb, argv)
    _no_texts(texts)
    replayed = take_steps_again(run, config)
    print(replayed.sentence())
    print(replayed.folder)
    return 0


def export(verb: str, argv: list[str]) -> int:
    """A run in another tool's format."""
    set_up_output()
    run, texts, config = parse_of_run(ExportConfig, verb, argv)
    _no_texts(texts)
    print(write_export(run, config))
    return 0


def push(verb: str, argv: list[str]) -> int:
    """A run on the hub."""
    set_up_output()
    run, texts, config = parse_of_run(PushConfig, verb, argv)
    if len(texts) != 1:
        raise XgbloraError(f"say where to: xgblora push {run} OWNER/NAME")
    print(upload(run, texts[0], config))
    return 0


def _no_texts(texts: list[str]) -> None:
    if texts:
        raise XgbloraError(f"unknown argument {texts[0]!r}: one run is enough")
