"""The progress of a training: step, loss, dev accuracy or loss, booster, seconds a step, time left."""

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from xgblora.config import RunConfig
from xgblora.progress import Progress
from xgblora.training.health import Meter
from xgblora.training.merging import Merging

SMOOTHING = 0.9
"""Of the loss that is shown beside the last step's."""


class StepsShown(TrainerCallback):
    """One live line in a terminal, or a line a minute in a log."""

    def __init__(self, merging: Merging, meter: Meter) -> None:
        self.merging = merging
        self.meter = meter
        self._progress = Progress(None, None)
        self._smoothed: float | None = None
        self._dev = ""
        self._started = 0.0
        self._steps = 0

    def on_train_begin(self, args: RunConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        name = "boosters" if args.recipe == "boost" else "steps"
        self._progress = Progress(state.max_steps, "training", name, done=state.global_step)
        self._started, self._steps = time.monotonic(), 0

    def on_step_end(self, args: RunConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = self.meter.loss
        if not self.meter.bad:
            before = loss if self._smoothed is None else self._smoothed
            self._smoothed = SMOOTHING * before + (1 - SMOOTHING) * loss
        self._steps += 1
        self._progress.add()
        self._progress.say(self._state(args, loss))

    def on_evaluate(
        self, args: RunConfig, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        shown = metrics or {}
        if "eval_accuracy" in shown:
            self._dev = f"dev {100 * shown['eval_accuracy']:.1f} %"
        elif "eval_loss" in shown:
            self._dev = f"dev loss {shown['eval_loss']:.3f}"
        self._progress.say(self._state(args, self.meter.loss))

    def on_train_end(self, args: RunConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._progress.close()

    def note(self, state: str) -> None:
        """What a long step is doing."""
        self._progress.say(state)

    def _state(self, args: RunConfig, loss: float) -> str:
        parts = [f"loss {loss:.3f}"]
        if args.recipe != "boost" and self._smoothed is not None:
            parts.append(f"smoothed {self._smoothed:.3f}")
        if self._dev:
            parts.append(self._dev)
        if args.xgblora and args.recipe != "boost":
            expected = self.merging.schedule.expected_merges
            of_all = "" if expected is None else f" of {expected + 1}"
            parts.append(f"booster {len(self.merging.ledger.boosters) + 1}{of_all}")
        if self._steps:
            each_step = (time.monotonic() - self._started) / self._steps
            parts.append(f"{each_step:.2g} s a {'booster' if args.recipe == 'boost' else 'step'}")
        return ", ".join(parts)
