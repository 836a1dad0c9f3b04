"""The callback that merges where the schedule says so, and nowhere else; and stops where boosters no longer help."""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from xgblora.adapters.boosters import Ledger
from xgblora.adapters.files import pair_tensors, read_tensors, restore_pair
from xgblora.config import RunConfig
from xgblora.learn.method import Method
from xgblora.learn.schedule import PatienceState, Schedule, resolve
from xgblora.training.health import Meter

logger = logging.getLogger(__name__)

BEST_PAIR = "best_pair.safetensors"


def boosters(count: int) -> str:
    """So many boosters, in words."""
    return f"{count} booster{'' if count == 1 else 's'}"


class Merging(TrainerCallback):
    """Turns the pair in training into a booster after the steps that the schedule names."""

    def __init__(self, ledger: Ledger, method: Method, meter: Meter, judged: bool = True) -> None:
        self.judged = judged
        """There are dev rows; without any, boosters are stopped for only where somebody asked for it."""
        self.ledger = ledger
        self.method = method
        self.meter = meter
        self.schedule = Schedule(total_steps=1)
        self.patience = PatienceState()
        """State of an adaptive schedule."""
        self.best_pair: dict[str, Tensor] | None = None
        """Adaptive merges: the pair in training where its smoothed loss was lowest."""
        self._measured: dict[str, Tensor] | None = None
        self._before: list[Tensor] = []

    def on_train_begin(self, args: RunConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        batches = len(kwargs["train_dataloader"])
        steps_per_epoch = max(-(-batches // args.gradient_accumulation_steps), 1)
        self.schedule = resolve(args, state.max_steps, steps_per_epoch)
        if args.method == "xgblora":
            expected = self.schedule.expected_merges
            logger.info(
                "Merge schedule: %s; expected merges: %s",
                self.schedule.describe(),
                "decided by the loss" if expected is None else f"{expected} ({boosters(expected + 1)})",
            )

    def on_step_begin(self, args: RunConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.schedule.patience is not None:
            self._measured = pair_tensors(self.ledger.adapters)  # what the step's loss is the loss of

    def on_pre_optimizer_step(
        self, args: RunConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._before = [parameter.detach().clone() for parameter in self.ledger.adapters.parameters()]

    def on_optimizer_step(self, args: RunConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.method.moves and not self.meter.bad:
            after = self.ledger.adapters.parameters()
            moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(after, self._before, strict=True)])
            self.meter.health.moved(moved.norm().item())

    def on_step_end(self, args: RunConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step, bad = state.global_step, self.meter.bad
        loss = None if bad else self.meter.loss
        self.patience, reason = self.schedule.observe(self.patience, step, loss)
        if self.schedule.patience is not None:
            if reason and self.best_pair is not None:
                restore_pair(self.ledger.adapters, self.best_pair)
            elif not reason and self.patience.stale == 0 and not bad:
                self.best_pair = self._measured
        if not reason:
            if self._patience(args) and step == state.max_steps:
                control.should_evaluate = True  # the last pair is a booster, too
            return
        self._shrink(args)
        place = self.schedule.place(step)
        logger.info("XGBLoRA: Merging and reinitializing at %s", place)
        self.ledger.merge(step, place, loss, self.schedule.describe(), reason)
        self.best_pair = None
        self.method.after_merge()
        optimizer = kwargs["optimizer"]
        for parameter in self.ledger.adapters.parameters():
            optimizer.state.pop(parameter, None)
        if args.eval_strategy != "no" or self._patience(args):
            control.should_evaluate = True

    def on_dev_evaluation(self, args: RunConfig, control: TrainerControl) -> None:
        """Stop where boosters no longer lower the dev loss. Only finished boosters are judged."""
        if self.ledger.evaluation is not None:
            return
        losses = self.ledger.evaluations()
        since_best = len(losses) - min(losses, key=losses.__getitem__) if losses else 0
        if 0 < self._patience(args) <= since_best:
            logger.info("Stopping: %d boosters have not improved the dev %s", since_best, _judged_by(args))
            control.should_training_stop = True

    def on_train_end(self, args: RunConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._shrink(args)
        losses = self.ledger.evaluations()
        if self._patience(args) and args.method == "xgblora" and losses:
            best = min(losses, key=losses.__getitem__)
            what = _judged_by(args)
            value = losses[best] if what == "loss" else -losses[best]
            logger.info("Keeping the first %d of %d boosters: dev %s %.4f", best, max(losses), what, value)
            if best <= len(self.ledger.boosters):
                self.best_pair = None
            self.ledger.truncate(best)

    def write(self, folder: Path) -> None:
        """Write the best pair, where there is one."""
        if self.best_pair is not None:
            save_file({name: tensor.cpu() for name, tensor in self.best_pair.items()}, folder / BEST_PAIR)

    def load(self, folder: Path, patience: dict[str, Any]) -> None:
        """Read what :meth:`write` wrote; ``patience`` is the schedule's state as JSON values."""
        self.patience = PatienceState(**patience)
        file = folder / BEST_PAIR
        self.best_pair = read_tensors(file) if file.is_file() else None

    def _patience(self, args: RunConfig) -> int:
        """Boosters that may leave the dev loss where it is; 0 where nobody looks."""
        asked = self.judged or args.asked["early_stopping_boosters"] is not None
        return (args.early_stopping_boosters or 0) if asked else 0

    def _shrink(self, args: RunConfig) -> None:
        """Shrink a finished booster; a fitted one was shrunk when its step was taken."""
        if args.method == "xgblora" and not self.method.fits and args.xgblora_shrinkage < 1:
            self.ledger.adapters.scale_pair(args.xgblora_shrinkage)


def _judged_by(args: RunConfig) -> str:
    """What the dev rows say of boosters; a reward is better the higher it is."""
    return "reward" if args.objective == "reward" else "loss"
