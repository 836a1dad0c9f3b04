"""What is printed: tables, log lines beside progress bars, on streams that take every character."""

import io
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import datasets
import transformers
from huggingface_hub.utils import disable_progress_bars
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from xgblora import group
from xgblora.progress import live


class _BesideBars(logging.Handler):
    """Log lines that do not tear a progress bar."""

    to_stderr = False

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr if self.to_stderr else sys.stdout)


_HANDLER = _BesideBars()


def set_up_output(log_to_stderr: bool = False) -> None:
    """Log what the package says, and only that.

    Args:
        log_to_stderr: For verbs whose stdout is data that other programs read.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a Windows console may lack a character
    package = logging.getLogger("xgblora")
    package.setLevel(logging.INFO if group.first() else logging.ERROR)
    _HANDLER.to_stderr = log_to_stderr
    if _HANDLER not in package.handlers:
        package.addHandler(_HANDLER)
    package.propagate = False
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of reading weights from a disk
    if not live():  # bars of others would fill a log with carriage returns
        datasets.disable_progress_bars()
        disable_progress_bars()


def console(stream: TextIO) -> Console:
    """What draws on a stream: as wide as the terminal, or 130 columns where it is none."""
    return Console(file=stream, width=None if stream.isatty() else 130, highlight=False)


def print_table(table: Table, files: Sequence[Path] = ()) -> None:
    """Print a table, and the files that it comes from."""
    print()
    console(sys.stdout).print(table)
    for path in files:
        print(path)
