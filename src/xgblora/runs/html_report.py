"""The report of a finished run, or of a comparison, from the files in its folder."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xgblora.adapters.files import delta_norms
from xgblora.config import flag
from xgblora.errors import XgbloraError
from xgblora.files import read_json
from xgblora.report import (
    ANSWERS,
    METRICS,
    REPORT,
    RunView,
    read_answers,
    read_curves,
    write_report,
)
from xgblora.runs.environment import ENVIRONMENT
from xgblora.runs.finished import asking, read_finished
from xgblora.runs.folder import ADAPTER, CONFIG

logger = logging.getLogger(__name__)


@dataclass
class ReportConfig:
    """The flags of ``report``."""

    output: str | None = flag(None, "Where it goes. Default: report.html in the folder.")


def report_of(folder: Path, asked: ReportConfig | None = None) -> Path:
    """Write the report of a run or of a comparison, from its files alone.

    Args:
        folder: With ``metrics.json``, or with folders of runs.
        asked: Where it goes.

    Returns:
        The file.

    Raises:
        XgbloraError: There is no finished run, a file is damaged, or the runs are of several tasks.
    """
    folders = [folder] if (folder / METRICS).is_file() else sorted(file.parent for file in folder.glob(f"*/{METRICS}"))
    if not folders:
        raise XgbloraError(f"{folder} holds no finished run: {folder / METRICS} is missing")
    views = sorted(map(read_view, folders), key=lambda view: view.result.trainer == "none")  # those last
    return _write(views, Path((asked and asked.output) or folder / REPORT))


def report_at_the_end(folders: Sequence[Path], file: Path) -> list[Path]:
    """Write the report of runs that have just ended, where there is room for it: what was trained is kept all the same.

    Args:
        folders: Of the runs, in the order in which they are shown.
        file: Where it goes.

    Returns:
        The file, or nothing.
    """
    try:
        return [_write([read_view(folder) for folder in folders], file)]
    except OSError as error:
        logger.warning("%s was not written (%s): xgblora report %s does", file, error.strerror, file.parent.as_posix())
        return []


def _write(runs: Sequence[RunView], file: Path) -> Path:
    kinds = {(run.result.task, run.result.model) for run in runs}
    if len(kinds) > 1:
        raise XgbloraError(f"runs of several tasks or models are not compared: {sorted(kinds)}")
    write_report(runs, file)
    return file


def read_view(folder: Path) -> RunView:
    """All that a report says of a finished run, from its folder."""
    curves = read_curves(folder)
    adapter = folder / ADAPTER
    return RunView(
        folder=folder.as_posix(),
        curves=curves,
        settings=read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {},
        environment=read_json(folder / ENVIRONMENT) if (folder / ENVIRONMENT).is_file() else {},
        answers=read_answers(folder / ANSWERS) if (folder / ANSWERS).is_file() else [],
        norms=delta_norms(adapter) if adapter.is_dir() else {},
        asks=f"xgblora {asking(read_finished(folder).task, folder)}" if adapter.is_dir() else "",
    )
