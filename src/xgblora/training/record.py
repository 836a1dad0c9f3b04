"""What a run leaves behind: the lines of its curves, its time and its memory."""

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from xgblora.adapters.boosters import Ledger
from xgblora.config import RunConfig
from xgblora.errors import XgbloraError
from xgblora.files import write_atomically

TRAINING_LOSS = "training_loss.jsonl"
EVAL_LOSS = "eval_loss.jsonl"
REPLAY = "replay.jsonl"
"""What forwards said in every step of a zeroth-order run: with the seed, its adapter follows from that."""
LOGGED = (
    "learning_rate",
    "projected_gradient_mean",
    "projected_gradient_std",
    "zero_differences",
    "update_norm",
    "skipped_steps",
)
"""What a line of the training loss holds beside step, loss and epoch, where the run has it."""


class CurveRecorder(TrainerCallback):
    """Appends every logged training loss and every evaluation to the run's JSONL files, and times the steps."""

    def __init__(self, folder: Path, ledger: Ledger) -> None:
        self.folder = folder
        self.ledger = ledger
        self.step_seconds: list[float] = []
        self.seconds = 0.0
        """Of all steps so far, those before a resumption included: a checkpoint keeps them."""
        self._started = 0.0
        self._rows = 0

    def on_train_begin(self, args: RunConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # A resumed run takes up its curves at the checkpoint: no step may stand in a file twice.
        self._rows = len(kwargs["train_dataloader"].dataset)
        there = [REPLAY] if (self.folder / REPLAY).is_file() else []  # it is made with the first line
        for name in (TRAINING_LOSS, EVAL_LOSS, *there):
            path = self.folder / name
            kept = [line for line in read_jsonl(path) if line["step"] <= state.global_step] if path.exists() else []
            write_atomically(path, partial(_write_lines, kept))

    def on_losses(self, step: int, tokens: int, losses: Tensor) -> None:
        """Add what forwards said in a micro-batch of ``step``, (places,) float32, and the tokens that it took."""
        shortest = [float(str(value)) for value in losses.cpu().numpy()]  # float32 to the last bit in few digits
        with (self.folder / REPLAY).open("a", encoding="utf-8", newline="\n") as file:
            if not file.tell():
                file.write(_line({"step": 0, "rows": self._rows}))
            file.write(_line({"step": step, "tokens": tokens, "losses": shortest}))

    def on_step_begin(self, args: RunConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: RunConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.step_seconds.append(time.perf_counter() - self._started)
        self.seconds += self.step_seconds[-1]
        if state.global_step == state.max_steps and args.logging_strategy != "no":
            control.should_log = True  # of a short run, too, something is seen

    def on_log(
        self, args: RunConfig, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        entry = {"step": state.global_step, "loss": logs["loss"], "epoch": state.epoch}
        idle = {"learning_rate"} if args.fits_boosters else set()
        self._append(TRAINING_LOSS, entry | {name: logs[name] for name in LOGGED if name in logs and name not in idle})

    def on_dev_evaluation(self, state: TrainerState, evaluation: Mapping[str, float]) -> None:
        """Add a line to the evaluations on the development rows."""
        boosters = self.ledger.boosters
        entry = {
            "step": state.global_step,
            **evaluation,
            "epoch": state.epoch,
            "boosters": len(boosters),
            "merge": bool(boosters) and boosters[-1].step == state.global_step,
        }
        self._append(EVAL_LOSS, entry)

    def _append(self, name: str, entry: dict[str, Any]) -> None:
        path = self.folder / name
        try:
            file = path.open("r+", encoding="utf-8", newline="\n")  # "a" would begin a file that is gone anew
        except FileNotFoundError as error:
            raise XgbloraError(f"{path} was removed while the run was at work: the last checkpoint is kept") from error
        with file:
            file.seek(0, os.SEEK_END)
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())  # a checkpoint that follows counts on it


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The entries of a JSONL file. A last line that a killed run left unfinished is dropped.

    Raises :class:`XgbloraError` with the number of a line that is damaged.
    """
    entries = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            entries.append(json.loads(line))
            entries[-1]["step"] + 0  # every line has the number of a step
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise XgbloraError(f"{path}, line {number} is damaged ({error}): remove the line") from error
    return entries


def _write_lines(entries: Sequence[dict[str, Any]], path: Path) -> None:
    path.write_text("".join(map(_line, entries)), encoding="utf-8", newline="\n")


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"


class PeakMemory:
    """Peak memory of a part of this process, in MB: of the GPU where one is used, else resident.

    Linux can start its count anew; elsewhere the figure is the process's peak so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif (reset := Path("/proc/self/clear_refs")).exists():
            with contextlib.suppress(OSError):
                reset.write_text("5", encoding="ascii")

    def read(self) -> float:
        """Megabytes (2^20 bytes) at the peak since this object was made."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        status = Path("/proc/self/status")
        if status.exists():
            for line in status.read_text(encoding="ascii").splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 1024
        memory = psutil.Process().memory_info()
        peak: int = getattr(memory, "peak_wset", memory.rss)
        return peak / 2**20
