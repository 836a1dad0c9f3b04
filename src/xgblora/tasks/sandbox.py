"""The Jinja that task files are written in: no access to Python, and bounds on time and on what comes out.

A task file is data: whoever runs one that somebody else wrote must lose nothing but the run. No single operation makes
a text or a list larger than LARGEST, and a template is stopped after MOST_STEPS or MOST_SECONDS.
"""

import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from types import FrameType
from typing import Any

from jinja2 import StrictUndefined, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.filters import FILTERS
from jinja2.sandbox import ImmutableSandboxedEnvironment

from xgblora.errors import XgbloraError

LARGEST = 2_000_000
"""Characters of a text, or entries of a list with all that is in it, that a template may make."""

MOST_BITS = 13_000
"""Of a whole number that a template makes: about 4,000 digits. Python refuses to print one of 4,301."""

MOST_STEPS = 1_000_000
"""Lines of a template that may run for one row."""

MOST_SECONDS = 3.0
"""How long it may run."""

MOST_BRACKETS = 5000
"""Of the kind {, in a template: two for each expression, which take Jinja's compiler a fifth of a millisecond each."""

TEXT_FILTERS = frozenset(
    {
        *("capitalize", "center", "e", "escape", "forceescape", "format", "indent", "lower", "replace", "safe"),
        *("string", "striptags", "title", "trim", "truncate", "upper", "urlencode", "urlize", "wordcount", "wordwrap"),
    }
)
"""Filters of texts. They would take a list, and print it."""

FORBIDDEN = frozenset({"encode", "translate", "random"})
"""Methods whose results have no bound, and a filter that gives another text each time."""

WIDE = re.compile(r"[%{][^%{}]*\d{7,}|[%{][^%{}a-z]*\*")
"""A width in a format string that no text has, or that another value gives."""


class Parts(list[Any]):
    """A list in a template. It knows how much is in it, all the way down, and cannot be printed by mistake."""

    def __init__(self, parts: Iterable[Any] = ()) -> None:
        super().__init__(parts)
        self.size = 1 + sum(getattr(part, "size", 1) for part in self)
        _require_small(self.size)

    def __repr__(self) -> str:
        raise XgbloraError(f"a template prints {shown(list(self))}, which is no text")

    __str__ = __repr__


class Fixed(tuple[Any, ...]):
    """The same of a list that stands in round brackets."""

    size: int

    def __new__(cls, parts: Iterable[Any]) -> "Fixed":
        made = super().__new__(cls, parts)
        made.size = 1 + sum(getattr(part, "size", 1) for part in made)
        _require_small(made.size)
        return made


class Entries(dict[Any, Any]):
    """The same of an object."""

    def __init__(self, entries: Mapping[Any, Any]) -> None:
        super().__init__(entries)
        self.size = 1 + sum(getattr(part, "size", 1) for part in self.values())
        _require_small(self.size)

    def __repr__(self) -> str:
        raise XgbloraError(f"a template prints {shown(dict(self))}, which is no text")

    __str__ = __repr__


def seen(value: Any) -> Any:
    """A value with what is in it, as templates see it."""
    if isinstance(value, (list, tuple)):
        return Parts(map(seen, value))
    if isinstance(value, dict):
        return Entries({name: seen(inner) for name, inner in value.items()})
    return value


def printed(value: Any) -> Any:
    """What a template may print: a list or an object is a column in another shape than its author believes."""
    if isinstance(value, (list, tuple, dict)):
        raise XgbloraError(f"a template prints {shown(value)}, which is no text")
    if isinstance(value, str) and (made := _made.get()) is not None:
        made[0] += len(value)
        _require_small(made[0])
    return value


def shown(value: Any) -> str:
    """A value in a message: of a list or an object, which may be a very large one, the beginning."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name!r:.20}: {shown(inner)}" for name, inner in list(value.items())[:2]) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(shown, value[:2])) + (", ...]" if len(value) > 2 else "]")
    return f"{value!r:.60}"


_made: ContextVar[list[int] | None] = ContextVar("_made", default=None)
"""Characters that the template in progress has printed."""


@contextmanager
def bounded() -> Iterator[None]:
    """Stop a template that runs inside the block for too long."""
    steps, end = 0, time.monotonic() + MOST_SECONDS

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > MOST_STEPS or time.monotonic() > end:
            raise XgbloraError(f"a template takes more than {MOST_STEPS:,} steps, or {MOST_SECONDS:g} seconds")
        return count

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        return count if frame.f_code.co_filename.startswith("<") else None  # a template's own lines

    before, made = sys.gettrace(), _made.set([0])
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)
        _made.reset(made)


class _Generator(CodeGenerator):
    """Jinja's compiler, which lets texts be joined and lists be made by the sandbox."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self._made_by("environment.joined", node.nodes, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._made_by("environment.listed", node.items, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._made_by("environment.fixed", node.items, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self.write("environment.entries(")
        super().visit_Dict(node, frame)
        self.write(")")

    def _made_by(self, function: str, parts: Iterable[nodes.Node], frame: Frame) -> None:
        self.write(f"{function}((")
        for part in parts:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's own sandbox with bounds on each operation that can make a text or a list larger."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined, keep_trailing_newline=True, finalize=printed)
        self.globals = {"range": self.globals["range"], "namespace": self.globals["namespace"]}
        self.filters = {
            name: _bounded_filter(name, function) for name, function in FILTERS.items() if name not in FORBIDDEN
        }

    def joined(self, parts: tuple[Any, ...]) -> str:
        """What ``~`` makes."""
        for part in parts:
            if isinstance(part, (list, tuple, dict)):
                printed(part)
        text = [str(part) for part in parts]
        _require_small(sum(map(len, text)))
        return "".join(text)

    def listed(self, parts: tuple[Any, ...]) -> Parts:
        """What square brackets make."""
        return Parts(parts)

    def fixed(self, parts: tuple[Any, ...]) -> Fixed:
        """What round brackets make."""
        return Fixed(parts)

    def entries(self, entries: dict[Any, Any]) -> Entries:
        """What curly brackets make."""
        return Entries(entries)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Jinja's own formatting, to widths that a text has."""
        if isinstance(text := getattr(value, "__self__", None), str) and value.__name__ in ("format", "format_map"):
            _require_narrow(text)
        return super().wrap_str_format(value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """``left operator right``, where what comes out is not too large."""
        if operator == "*":
            _require_small(_product(left, right))
        elif operator == "**":
            _require_small(_bits(left) * abs(right) if isinstance(right, int) else 0)
        elif operator == "+" and isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
            _require_small(len(left) + len(right))
        elif operator == "%" and isinstance(left, str):
            _require_narrow(left)
        return _sized(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __object: Any, *args: Any, **named: Any) -> Any:
        """Call a function or a method, where what comes out is not too large."""
        text, name = getattr(__object, "__self__", None), getattr(__object, "__name__", "")
        if name in FORBIDDEN:
            raise XgbloraError(f"templates have no {name}")
        if isinstance(text, (str, int, float)):
            if name == "join":
                args = (_require_joined(str(text), args[0] if args else ()),)
            _require_growth(name, text, args, named)
        return _sized(super().call(__context, __object, *args, **named))


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # the environment or the like comes first

    @wraps(function)
    def checked(*args: Any, **named: Any) -> Any:
        first, (value, *others) = args[:skipped], args[skipped:] or (None,)
        if name in TEXT_FILTERS:
            printed(value)
        if name == "join":
            value = _require_joined(str(others[0] if others else named.get("d", "")), value)
        _require_growth(name, value, others, named)
        return _sized(function(*first, value, *others, **named))

    return checked


def _sized(value: Any) -> Any:
    """``value``, which knows its size where it is a list. Numbers are as long as Python prints."""
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise XgbloraError("a template makes a number of more than 4,000 digits")
    kinds: dict[type, Callable[[Any], Any]] = {list: Parts, tuple: Fixed, dict: Entries}
    return kinds[type(value)](value) if type(value) in kinds else value


def _require_joined(separator: str, parts: Any) -> list[Any]:
    """The parts of a text to be, which is not too long."""
    there = list(parts)
    _require_small(len(there) * len(separator) + sum(len(part) for part in there if isinstance(part, str)))
    return there


def _require_growth(name: str, value: Any, args: Iterable[Any], named: Mapping[str, Any]) -> None:
    """Refuse a filter or a method that would make ``value`` too long, or that counts to a very large number."""
    others = [*args, *named.values()]
    if not isinstance(value, str):
        times = 1
    elif name in ("format", "format_map"):
        _require_narrow(value)
        times = 1
    elif name == "replace" and len(others) >= 2:
        times = value.count(str(others[0]))
    else:
        times = {"indent": value.count("\n") + 1, "expandtabs": value.count("\t"), "wordwrap": len(value)}.get(name, 1)
    for other in others:
        if isinstance(other, (int, float)):
            _require_small(abs(other) * (1 if name == "wordwrap" else times))
        elif isinstance(other, str):
            _require_small(len(other) * times)


def _require_narrow(text: str) -> None:
    if WIDE.search(text):
        raise XgbloraError("a template formats to a width that no text has")


def _require_small(size: float) -> None:
    if not size <= LARGEST:
        raise XgbloraError(f"a template makes more than {LARGEST:,} characters or entries")


def _product(left: Any, right: Any) -> float:
    """How large a text, a list or a number ``left * right`` is."""
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, (str, list, tuple)) and isinstance(count, int):
            return (getattr(sequence, "size", None) or len(sequence)) * count
    return _bits(left) + _bits(right)


def _bits(number: Any) -> int:
    return number.bit_length() if isinstance(number, int) else 0
