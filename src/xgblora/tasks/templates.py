"""Jinja over the columns of a row: templates give text, expressions give values; both fail in one line."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2 import TemplateError, Undefined, meta

from xgblora.errors import XgbloraError, one_line
from xgblora.tasks.sandbox import MOST_BRACKETS, Sandbox, bounded, seen


class _Empty(Undefined):
    """What a row's None or blank text is to a template: false in a condition, an error where it would be printed."""

    def __str__(self) -> str:
        raise XgbloraError(f"column {self._undefined_name!r} is empty")


_ENVIRONMENT = Sandbox()


def columns_of(template: str) -> set[str]:
    """The columns that a template is made of."""
    return set() if is_plain(template) else meta.find_undeclared_variables(_ENVIRONMENT.parse(template))


def is_plain(template: str) -> bool:
    """Whether a template is the text that it makes: most options are, and there may be thousands of them."""
    return "{" not in template and "\r" not in template


def columns_of_expression(text: str) -> set[str]:
    """The columns that an expression is made of."""
    return columns_of("{{ " + text + " }}")


class Compiled:
    """A template or an expression, as a function of a row's columns.

    ``field`` of ``task`` is what it is called in messages. Raises :class:`XgbloraError` where it is not Jinja.
    """

    def __init__(self, field: str, task: str, text: str, expression: bool = False) -> None:
        self.field = field
        self._call: Callable[..., Any]
        if not expression and is_plain(text):
            self._call = lambda **columns: text
            return
        if text.count("{") > MOST_BRACKETS:
            raise XgbloraError(f"{field} of task {task} has more than {MOST_BRACKETS:,} brackets")
        try:
            self._call = (
                _ENVIRONMENT.compile_expression(text, undefined_to_none=False)
                if expression
                else _ENVIRONMENT.from_string(text).render
            )
        except (TemplateError, ValueError) as error:  # of numbers that are too long, too
            raise XgbloraError(f"{field} of task {task} is not a Jinja template: {error} (in {text!r:.200})") from error

    def __call__(self, columns: Mapping[str, Any]) -> Any:
        """Its value for :func:`columns_seen` of a row. Raises :class:`XgbloraError` where it has none."""
        try:
            with bounded():
                value = self._call(**columns)
            for one in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(one, Undefined):
                    str(one)  # an expression's own value is not looked at by Jinja; this raises, and names what it is
            return value
        except XgbloraError:
            raise
        except Exception as error:  # a template may fail in any way that Python can
            raise XgbloraError(f"{self.field} cannot be made: {one_line(error)}") from error


def columns_seen(row: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those columns of a row that are there, as templates see them."""
    return {name: _Empty(name=name) if _is_empty(row[name]) else seen(row[name]) for name in names if name in row}


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())
