"""What ``--help`` prints: a page of plain text for each verb, its everyday flags in groups."""

from itertools import groupby
from pathlib import Path

from xgblora.cli.verbs import VERBS


def overview() -> str:
    """The page of ``xgblora --help``: every verb in a line."""
    lines = ["usage: xgblora VERB [--flag value ...]", ""]
    lines += ["Adapt a language model by forward passes alone, and ask what it learned.", ""]
    for group, verbs in groupby(VERBS, key=lambda verb: VERBS[verb].group):
        lines += [group, *(f"  {verb:<12}{VERBS[verb].summary}" for verb in verbs), ""]
    return "\n".join([*lines, (Path(__file__).parent / "overview.txt").read_text(encoding="utf-8").rstrip()])


def help_page(verb: str) -> str:
    """The page of ``xgblora VERB --help``."""
    return (Path(__file__).parent / f"{verb}.txt").read_text(encoding="utf-8").rstrip()
