"""The errors a user can mend. The command line prints them as one line; the library raises them."""

from collections.abc import Iterator
from contextlib import contextmanager


class XgbloraError(ValueError):
    """Wrong input: one line that says what was wrong, where, and what to do."""


class DivergedError(XgbloraError):
    """The loss became NaN or infinite. The step was not applied."""


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Put where it happened in front of an :class:`XgbloraError` that is raised inside."""
    try:
        yield
    except XgbloraError as error:
        raise XgbloraError(f"{place}: {error}") from error
