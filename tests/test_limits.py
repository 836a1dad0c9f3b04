"""Inputs made to hang, or to fill the memory: each takes at most 5 seconds and 500 MB, in a process of its own."""

import sys
from pathlib import Path

import pytest

from odd_inputs import KINDS, REFUSED, TAKEN, attempt, child
from processes import CONTEXT
from xgblora import XgbloraError

EACH = 50
"""Inputs of a test; the first of 30 tests of each of 7 kinds takes 6: 10,192 of them."""


@pytest.mark.skipif(sys.platform == "win32", reason="the system sets the bounds in POSIX's way")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [pytest.param(n, marks=pytest.mark.soak if n else ()) for n in range(30)])
def test_no_input_takes_five_seconds_or_half_a_gigabyte(kind: str, part: int, tmp_path: Path) -> None:
    for seed in range(part * EACH, part * EACH + (EACH if part else 6)):
        folder = tmp_path / str(seed)
        folder.mkdir()
        process = CONTEXT.Process(target=child, args=(kind, seed, str(folder)))
        process.start()
        process.join()
        trace = folder / "traceback"
        seen = trace.read_text(encoding="utf-8") if trace.exists() else f"exit code {process.exitcode}"
        assert process.exitcode in (TAKEN, REFUSED), f"{kind} {seed}: {seen}"


def test_the_inputs_are_of_both_kinds(tmp_path: Path) -> None:
    """Neither are all of them refused, nor none."""
    refused = 0
    for seed in range(20):
        folder = tmp_path / str(seed)
        folder.mkdir()
        try:
            attempt("jsonl", seed, folder)()
        except XgbloraError:
            refused += 1
    assert 3 < refused < 18
