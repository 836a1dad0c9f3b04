"""Commands in processes of their own, to be killed, stopped and started at once; and small disks for them."""

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

import conftest  # noqa: F401  (what it sets holds in these processes, too)
from xgblora.cli import main

STEPS = 40
EVERY_STEP = f"--max_steps {STEPS} --save_steps 3 --eval_steps 4 --logging_steps 2 --learning_rate 1e-2 --zo_eps 1e-2"

CONTEXT = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
if sys.platform != "win32":
    CONTEXT.set_forkserver_preload(
        ["xgblora.cli.new_runs", "xgblora.cli.finished_runs", "conftest", "pyarrow.parquet"]
    )  # imported once: what is killed is a run, not an import


def _command(argv: list[str], log: str) -> None:
    torch.set_num_threads(1)
    with Path(log).open("a", encoding="utf-8", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        sys.exit(main(argv))


def start(argv: list[str], log: Path) -> Any:
    """The command in a process of its own, what it says in ``log``."""
    process = CONTEXT.Process(target=_command, args=(argv, str(log)))
    process.start()
    return process


def finish(argv: list[str], log: Path) -> None:
    process = start(argv, log)
    process.join(120)
    assert process.exitcode == 0, log.read_text(encoding="utf-8")


def wait_for(process: Any, log: Path, text: str) -> None:
    """Wait until the process has said it."""
    for _ in range(12_000):
        if log.is_file() and text in log.read_text(encoding="utf-8"):
            return
        assert process.is_alive(), log.read_text(encoding="utf-8")
        time.sleep(0.005)
    raise AssertionError(f"{text!r} was never said")


@contextmanager
def limited(folder: Path, bytes_: int) -> Iterator[None]:
    """A disk of so many bytes at ``folder``."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={bytes_}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs rights that are missing here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
