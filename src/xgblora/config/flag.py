"""How a flag is declared: its default and help, which values it takes, and where it has an effect.

A flag is declared once, by :func:`flag`. Range checks, notes on flags without effect, refusals, the identity of a run
and the arms of a comparison all follow from that.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers.hf_argparser import HfArg


@dataclass(frozen=True)
class Check:
    """A condition on a flag's value. ``wants`` finishes the sentence "--flag must be ..."."""

    holds: Callable[[Any], bool]
    wants: str


def is_size(text: str) -> bool:
    """Whether a text is a size of memory."""
    return bool(re.fullmatch(r"\d+(\.\d+)? ?[MG]B", text.strip(), re.IGNORECASE))


def bytes_of(size: str) -> int:
    """A size of memory in bytes.

    Examples:
        >>> bytes_of("1.5 GB")
        1500000000
    """
    number, unit = size.strip()[:-2], size.strip()[-2:].upper()
    return int(float(number) * {"MB": 1e6, "GB": 1e9}[unit])


POSITIVE = Check(lambda value: math.isfinite(value) and value > 0, "a positive number")
NOT_NEGATIVE = Check(lambda value: math.isfinite(value) and value >= 0, "0 or more")
SHARE = Check(lambda value: 0 < value <= 1, "above 0 and at most 1")
SIZE = Check(is_size, "a size like 3GB or 800MB")


def at_least(least: int) -> Check:
    """The value is ``least`` or more."""
    return Check(lambda value: value >= least, f"at least {least}")


@dataclass(frozen=True)
class Applies:
    """Where a flag has an effect.

    ``holds`` takes the settings of a run, as a :class:`RunConfig` or as read back from its ``config.json``. Elsewhere
    the flag is noted as ``--flag has no effect <otherwise>``; ``otherwise`` may name settings in braces.
    """

    holds: Callable[[Any], bool]
    otherwise: str

    def message(self, name: str, settings: Any) -> str:
        """What to tell somebody who gave the flag where it has no effect."""
        return f"--{name} has no effect {self.otherwise.format_map(vars(settings))}"


@dataclass(frozen=True)
class Needs(Applies):
    """The same for a flag that is refused elsewhere: ``--flag <otherwise>``."""

    def message(self, name: str, settings: Any) -> str:
        return f"--{name} {self.otherwise}"


class Flag:
    """What is declared of a flag beside its type, default and help.

    Args:
        rules: Which values it takes, and where it has an effect.
        identity: Whether it decides what a run computes: two runs that differ in such a flag are two runs.
    """

    def __init__(self, *rules: Check | Applies, identity: bool = True) -> None:
        self.checks = [rule for rule in rules if isinstance(rule, Check)]
        self.applies = [rule for rule in rules if isinstance(rule, Applies)]
        self.identity = identity

    def idle(self, settings: Any) -> Applies | None:
        """The condition that keeps this flag from having an effect; None where it has one."""
        return next((where for where in self.applies if not where.holds(settings)), None)


DECLARED: dict[dataclasses.Field[Any], Flag] = {}
"""Beside the fields, not in their metadata: transformers' parser passes all of that on to argparse."""


def flag(
    default: Any,
    help: str,
    *rules: Check | Applies,
    identity: bool = True,
    aliases: tuple[str, ...] = (),
    bare: bool = False,
) -> Any:
    """Declare a flag as a dataclass field.

    Args:
        default: Its default, or a function that makes it (for lists).
        help: One sentence for ``--help``.
        rules: Which values it takes (None is never checked, the choices of a ``Literal`` always), and where it has an
            effect (by default everywhere).
        identity: Whether it decides what a run computes.
        aliases: Further spellings.
        bare: A yes/no flag whose default is "not given" may stand without a value.

    Examples:
        >>> @dataclasses.dataclass
        ... class Config:
        ...     zo_eps: float = flag(1e-3, "Length of a probe.", POSITIVE)
        >>> Config().zo_eps
        0.001
    """
    metadata = {"nargs": "?", "const": True} if bare else {}
    kind = "default_factory" if callable(default) else "default"
    field = HfArg(help=help, aliases=list(aliases), metadata=metadata, **{kind: default})
    DECLARED[field] = Flag(*rules, identity=identity)
    return field


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a dataclass field."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
