"""How far long work has come: a live line in a terminal, a line a minute in a log, never a carriage return there."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

SECONDS = 60.0
"""Between two lines in a log."""


def live() -> bool:
    """Whether somebody watches: stderr is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


class Progress:
    """Counts what is done, as a context manager.

    Args:
        total: How many there are; None where nobody knows.
        what: Names the work; None shows nothing.
        unit: Of what is counted.
        done: How many of them are done already.

    Examples:
        >>> with Progress(2, None) as progress:
        ...     progress.add()
        ...     progress.done
        1
    """

    def __init__(self, total: int | None, what: str | None, unit: str = "rows", done: int = 0) -> None:
        self.total = total
        self.what = what
        self.unit = unit
        self.done = self._begin = done
        self._state = ""
        self._started = self._last = time.monotonic()
        self._bar: Any = None
        if what is not None and live():
            self._bar = tqdm(total=total, desc=what, unit=f" {unit}", initial=done, leave=False, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the live line away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def add(self, count: int = 1) -> None:
        """So many more are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        self._tell()

    def say(self, state: str) -> None:
        """How the work stands, in words."""
        self._state = state
        if self._bar is not None:
            self._bar.set_postfix_str(state)
        self._tell()

    def _tell(self) -> None:
        """Log a line where it is time for one."""
        now = time.monotonic()
        if self.what is None or self._bar is not None or now - self._last < SECONDS:
            return
        self._last = now
        logger.info("%s", self.line(now - self._started))

    def line(self, seconds: float) -> str:
        """The same as a line of a log, after so many seconds."""
        count = f"{self.done:,}" if self.total is None else f"{self.done:,} of {self.total:,}"
        parts = [f"{self.what}: {count} {self.unit}", *([self._state] if self._state else [])]
        parts.append(f"{tqdm.format_interval(seconds)} so far")
        fresh = self.done - self._begin
        if self.total is not None and fresh:
            parts.append(f"about {tqdm.format_interval(seconds / fresh * (self.total - self.done))} left")
        return ", ".join(parts)


@contextmanager
def quiet(name: str, level: int = logging.WARNING) -> Iterator[None]:
    """Hold back what a logger says inside the block, but for warnings, or for what is of this level."""
    log = logging.getLogger(name)
    before = log.level
    log.setLevel(level)
    try:
        yield
    finally:
        log.setLevel(before)
