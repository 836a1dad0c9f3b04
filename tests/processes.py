"""Commands in processes of their own, to be killed, stopped and started at once; and small disks for them."""

import multiprocessing
import os
import socket
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


def _command(argv: list[str], log: str, environment: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    with Path(log).open("a", encoding="utf-8", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        sys.exit(main(argv))


def start(argv: list[str], log: Path, **environment: str) -> Any:
    """The command in a process of its own, what it says in ``log``."""
    process = CONTEXT.Process(target=_command, args=(argv, str(log), environment))
    process.start()
    return process


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def place(number: int, size: int, port: int, agent: bool = False) -> dict[str, str]:
    """What torchrun tells the ``number``-th of so many processes; ``agent``: it is there, and keeps their store."""
    numbers = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    places = {name: str(value) for name, value in numbers.items()}
    if agent:
        places |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return places | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def start_together(argv: list[str], log: Path, size: int) -> list[Any]:
    """So many processes that share a command, what they say in ``log``. What they meet at is kept here, by torchrun's
    part in it, until the last of them is gone."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [start(argv, log, **place(number, size, store.port, agent=True)) for number in range(size)]
    processes[0].store = store
    return processes


def finish_together(argv: list[str], log: Path, size: int) -> None:
    processes = start_together(argv, log, size)
    for process in processes:
        process.join(120)
        assert process.exitcode == 0, log.read_text(encoding="utf-8")


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
