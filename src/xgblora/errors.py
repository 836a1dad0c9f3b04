"""The errors a user can mend. The command line prints them as one line; the library raises them."""


class XgbloraError(ValueError):
    """Wrong input: one line that says what was wrong, where, and what to do."""


class DivergedError(XgbloraError):
    """The loss became NaN or infinite. The step was not applied."""
