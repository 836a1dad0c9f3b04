"""Stopping and being alone: signals that end a run after its step, and the lock on its folder."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import SoftFileLock, Timeout
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from xgblora import group
from xgblora.errors import Interrupted, XgbloraError

LOCK = "run.lock"
LOCK_SECONDS = 3.0
"""How long a lock may look abandoned before that is believed; filelock wants two seconds for a half-written one."""

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
"""Ctrl-C, a polite kill, and Ctrl-Break on Windows."""


class StopAtSignal(TrainerCallback):
    """The first signal lets the step in progress finish and saves a checkpoint, a second one stops at once.

    Where several processes share the run, it is stopped by a signal to any of them, after the step in which all know.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.training = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals inside the block; outside the main thread nothing can, and nothing changes."""
        group.ask_to_stop(0)
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None
        self.received = number
        group.ask_to_stop(number)
        if again or not self.training:
            raise Interrupted(number)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.training = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_save = control.should_save or bool(group.stopping())

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if number := group.stopping():
            raise Interrupted(number, f"step {state.global_step}, which is saved")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.training = False
        if number := group.stopping():
            raise Interrupted(number, f"step {state.global_step}")


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder, which is made where it is missing; one that a dead process left is taken over.

    A folder that was made, and is left empty, goes again. Raises :class:`XgbloraError` with the number of the process
    that holds the lock.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = SoftFileLock(folder / LOCK, timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout as error:
        holder = f"process {lock.pid}" if lock.pid else "another process"
        raise XgbloraError(
            f"{holder} is at work in {folder}: wait for it, choose another --output_dir, or, if it is long gone, "
            f"remove {folder / LOCK}"
        ) from error
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):  # not empty: something was written
            for place in made:
                place.rmdir()
