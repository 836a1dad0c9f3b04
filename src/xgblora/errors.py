"""The errors a user can mend. The command line prints them as one line; the library raises them."""

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 1000
"""Characters of a message at most: what a file holds may be quoted in it."""


class XgbloraError(ValueError):
    """Wrong input: one line that says what was wrong, where, and what to do."""

    def __init__(self, message: str) -> None:
        line = " ".join(message.splitlines())
        super().__init__(line if len(line) <= LONGEST else f"{line[:LONGEST]}...")


class DivergedError(XgbloraError):
    """The loss became NaN or infinite. The step was not applied."""


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Put where it happened in front of an :class:`XgbloraError` that is raised inside."""
    try:
        yield
    except XgbloraError as error:
        raise XgbloraError(f"{place}: {error}") from error
