"""The errors a user can mend. The command line prints them as one line; the library raises them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

LONGEST = 1000
"""Characters of a message at most: what a file holds may be quoted in it."""


class XgbloraError(ValueError):
    """Wrong input: one line that says what was wrong, where, and what to do."""

    def __init__(self, message: str) -> None:
        line = " ".join(message.splitlines())
        super().__init__(line if len(line) <= LONGEST else f"{line[:LONGEST]}...")


class DivergedError(XgbloraError):
    """The loss became NaN or infinite. The step was not applied."""


NO_MEMORY = ("can't allocate memory", "bad_alloc")
"""What torch says in a RuntimeError, of its allocator on a CPU and of C++'s."""


@contextmanager
def within_memory(where: str, advice: str) -> Iterator[None]:
    """One :class:`XgbloraError` for all the ways in which torch and Python say that memory has run out."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and not any(words in str(error) for words in NO_MEMORY):
            raise
        raise XgbloraError(f"out of memory {where}: {advice}") from error


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Put where it happened in front of an :class:`XgbloraError` that is raised inside."""
    try:
        yield
    except XgbloraError as error:
        raise XgbloraError(f"{place}: {error}") from error
