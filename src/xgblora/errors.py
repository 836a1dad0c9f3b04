"""Errors that a user can mend. The command line prints them as one line; the library raises them."""

import difflib
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LONGEST_MESSAGE = 1000
"""Characters. A message may quote what a file holds."""

NO_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory")
"""How torch's allocators and C++ report exhausted memory in a RuntimeError."""


class XgbloraError(ValueError):
    """Wrong input: one line that says what was wrong, where, and what to do."""

    def __init__(self, message: str) -> None:
        line = " ".join(message.splitlines())
        super().__init__(line if len(line) <= LONGEST_MESSAGE else f"{line[:LONGEST_MESSAGE]}...")


class DivergedError(XgbloraError):
    """The loss became NaN or infinite. The step was not applied."""


class MemoryBudgetError(XgbloraError):
    """A memory budget is too small for any forward: no reason to try another one."""


class Interrupted(BaseException):
    """A signal ended the run. ``code``: the exit code of a process that a signal ends, 128 + its number.

    No :class:`Exception`: whoever catches errors in order to go on must not catch this.
    """

    def __init__(self, number: int, saved: str = "") -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name}{f' after {saved}' if saved else ''}")
        self.code = 128 + number


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """The end of an error about an unknown word: which of ``words`` comes near it; empty where none does.

    Examples:
        >>> did_you_mean("trian", ["train", "tasks"])
        ': did you mean train?'
    """
    near = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f": did you mean {near[0]}?" if near else ""


def one_line(error: BaseException, longest: int = 200) -> str:
    """The message of any exception in one line of at most ``longest`` characters, or its kind where it has none."""
    return " ".join(str(error).split())[:longest] or type(error).__name__


@contextmanager
def within_memory(where: str, advice: str) -> Iterator[None]:
    """Turn every way in which torch and Python report exhausted memory into one :class:`XgbloraError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        import torch  # it is there: nothing else raises such errors

        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and not any(words in str(error) for words in NO_MEMORY):
            raise
        raise XgbloraError(f"out of memory {where}: {advice}") from error


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Put the place in front of the message of any :class:`XgbloraError` raised inside the block."""
    try:
        yield
    except XgbloraError as error:
        raise XgbloraError(f"{place}: {error}") from error
