"""Training: transformers' Trainer with the step replaced.

What a step does is the method's (:mod:`xgblora.learn.methods`), when to merge is the schedule's. The optimizer, its
schedule, logging, callbacks and resuming are transformers'.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from xgblora import agreement, group, hf
from xgblora.adapters.adapters import Adapters
from xgblora.adapters.boosters import Ledger
from xgblora.adapters.files import require_entries
from xgblora.config import RunConfig
from xgblora.data.batch import Batch, Example, build_batch
from xgblora.errors import DivergedError, XgbloraError, within_memory
from xgblora.files import remove_sealed, sealed_folder, verify
from xgblora.learn.cost import Cost
from xgblora.learn.estimators import Key
from xgblora.learn.evaluate import evaluate
from xgblora.learn.losses import Loss, Objective
from xgblora.learn.methods import method
from xgblora.learn.objectives import judges_of, loss_of
from xgblora.learn.rewards import Reward
from xgblora.training.checkpoints import (
    FILES,
    checkpoint_folder,
    last_checkpoint,
    read_random_numbers,
    read_training_state,
    rotate,
    write_training_state,
)
from xgblora.training.diagnosis import diagnose
from xgblora.training.health import Health, Meter
from xgblora.training.merging import Merging
from xgblora.training.record import CurveRecorder
from xgblora.training.steps_shown import StepsShown

logger = logging.getLogger(__name__)

ENTRIES = ("patience", "method", "forward_passes", "forward_sequences", "forward_tokens")
"""What a checkpoint's ledger.json holds beside the boosters."""
PROGRESS = ("health", "bad_steps", "applied", "applied_loss", "seconds", "stopped")
"""What it holds beside optimizer and learning-rate schedule."""


class Trainer(hf.HookedTrainer):
    """transformers' Trainer for adapters.

    The model always runs in eval mode: with dropout, the two probes of a direction would see different noise. A step
    with a NaN or infinite loss or gradient is not applied. Checkpoints are folders that are whole or not there, with a
    SHA-256 of every file.

    Args:
        model: The base model.
        args: Which method, how many steps, when to merge, evaluate and save.
        adapters: From :func:`xgblora.attach` on ``model``; or a :class:`Ledger` of such, with boosters to start from.
        train_dataset: Examples.
        eval_dataset: Development examples. They alone are judged: evaluating other rows changes nothing.
        objective: A loss, a reward, or a function of yours ``(model, batch) -> losses (segments,)``. By default the
            options' cross-entropy, or the text loss with ``args.train_as_classification = False``.
        callbacks: As transformers takes them.

    Raises:
        XgbloraError: The adapters, the loss or the flags do not fit together.
        DivergedError: While training: ``args.max_bad_steps`` steps in a row were not finite.

    Example::

        trainer = Trainer(model, config, attach(model, xgblora=True), rows)
        trainer.train()
        trainer.ledger.save("my_adapter")
    """

    args: RunConfig

    def __init__(
        self,
        model: PreTrainedModel,
        args: RunConfig,
        adapters: Adapters | Ledger,
        train_dataset: Sequence[Example],
        eval_dataset: Sequence[Example] | None = None,
        objective: Objective | Loss | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.ledger = adapters if isinstance(adapters, Ledger) else Ledger(adapters)
        self.adapters = self.ledger.adapters
        if self.adapters.model is not model:
            raise XgbloraError("the adapters belong to another model")
        hf.use_one_device(args)  # DataParallel would split what is one packed row
        if args.world_size > 1:
            raise XgbloraError("accelerate would share out the rows: call xgblora.join() first (docs/scale.md)")
        if args.xgblora and args.recipe == "classic" and self.adapters.rank != 1:
            raise XgbloraError(f"XGBLoRA trains pairs of rank 1, the adapters have rank {self.adapters.rank}")
        if args.objective == "reward" and objective is None:
            raise XgbloraError("--objective reward needs an xgblora.Reward: give it as the objective")
        group.meet(args.ddp_timeout)
        args.output_dir = agreement.own_folder(str(args.output_dir))
        self.loss = loss_of(args, objective)
        self.judge, self.dev_judge = judges_of(args, self.loss)
        model.to(args.device)
        self.method = method(self.adapters, self.loss, args)
        self.meter = Meter()
        self.merging = Merging(self.ledger, self.method, self.meter, judged=bool(eval_dataset))
        self._stopped = False
        self._most_checkpoints = args.save_total_limit
        super().__init__(
            model=model,
            args=args,
            data_collator=_Collator(self.adapters.base.packed),
            train_dataset=self.method.split(train_dataset),
            eval_dataset=eval_dataset,
            callbacks=[self.merging, *(callbacks or [])],
        )
        # Losses go into the progress line and into the record, not onto the console line by line.
        self.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        if not args.disable_tqdm:
            shown = StepsShown(self.merging, self.meter)
            self.add_callback(shown)
            self.method.note = shown.note

    @property
    def cost(self) -> Cost:
        """Work of the run so far."""
        return self.meter.cost

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train as transformers' Trainer does.

        Args:
            resume_from_checkpoint: A folder; True takes the newest whole one.
            kwargs: As transformers' Trainer takes them.

        Raises:
            XgbloraError: A file is missing from the checkpoint, or damaged; the message names it.
        """
        if resume_from_checkpoint is True:
            last = agreement.folder_of_first(last_checkpoint(Path(str(self.args.output_dir))))
            resume_from_checkpoint = str(last or "") or None
        elif resume_from_checkpoint:
            verify(Path(resume_from_checkpoint))  # before anything in it is read
        self._stopped = False
        # With a limit of 1 transformers would end by removing whatever is named like a checkpoint, but for the best.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._most_checkpoints = limit
        try:
            with self.method.without_gradients():
                return super().train(resume_from_checkpoint, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Let the method learn from one micro-batch; returns the share of the step's loss that is its."""
        if self.model.training:  # each time, it would walk over all modules
            self.model.eval()
        batch, meter, micro_batches = Batch(**inputs), self.meter, self.current_gradient_accumulation_steps
        meter.begin()
        with within_memory(
            f"at step {self.state.global_step + 1}, with {batch.segments} examples of {batch.tokens:,} tokens",
            f"lower {self.method.examples_flag} or --max_length, or load the base in bfloat16; the last checkpoint is "
            "kept",
        ):
            key = Key(self.args.seed, self.state.global_step, meter.micro_batch)
            step = self.method.step(batch, key, share=1 / micro_batches)
            if not step.finite:
                self._skip_step(batch, step.loss)
        if step.losses is not None and (recorder := self._recorder) is not None:
            recorder.on_losses(self.state.global_step + 1, step.cost.tokens, step.losses)
        if meter.bad:
            self.adapters.drop_gradient()
        meter.add(step, micro_batches)
        # On the device where transformers keeps the sum.
        return torch.tensor(0.0 if meter.bad else step.loss / micro_batches, device=self.args.device)

    def _skip_step(self, batch: Batch, loss: float) -> None:
        """Mark the step in progress as bad. Raises :class:`DivergedError` where it is one too many."""
        what = "the gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
        place = f"{what} at step {self.state.global_step + 1}, which was not applied"
        names = {id(example): number for number, example in enumerate(self.train_dataset, start=1)}
        reason = diagnose(self.method, batch, self.args, names)
        if self.meter.bad_steps + 1 >= self.args.max_bad_steps:
            raise DivergedError(f"{place}: {reason}; the last checkpoint is kept")
        if not self.meter.bad:
            logger.warning("%s (%d in a row): %s", place, self.meter.bad_steps + 1, reason)
        self.meter.bad = True

    def evaluate(
        self,
        eval_dataset: Sequence[Example] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Accuracy and loss of the model as it is.

        Args:
            eval_dataset: Examples; by default the development examples, whose answers are written only where something
                depends on them, as that takes most of the time. Others are scored and logged, but neither the ledger
                nor the record nor any callback hears of them, so that no decision depends on them.
            ignore_keys: Not used.
            metric_key_prefix: Before the names of the metrics.

        Returns:
            ``<prefix>_loss``, ``<prefix>_accuracy`` where answers are chosen or written and, with a reward,
            ``<prefix>_reward``.
        """
        examples = self.eval_dataset if eval_dataset is None else eval_dataset
        if not examples:
            raise XgbloraError("there are no rows to evaluate: give the trainer an eval_dataset, or rows to evaluate()")
        self.model.eval()
        judge = self.dev_judge if examples is self.eval_dataset else self.judge
        evaluation = evaluate(
            self.adapters.base,
            examples,
            judge,
            self.args.per_device_eval_batch_size,
            progress=None if self.args.disable_tqdm else f"evaluating {len(examples)} examples",
        )
        metrics = {"loss": evaluation.loss}
        if judge is self.judge:
            metrics["accuracy"] = evaluation.accuracy
        if isinstance(self.loss, Reward):
            metrics["reward"] = self.loss.mean(examples, evaluation.predictions, evaluation.texts)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(dict(named))
        if examples is self.eval_dataset:
            self._note({f"eval_{name}": value for name, value in metrics.items()})
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    def _note(self, evaluation: dict[str, float]) -> None:
        """Note an evaluation on the development rows: in the ledger, in the record, and for early stopping."""
        self.ledger.note_evaluation(self.state.global_step, evaluation)
        self.merging.on_dev_evaluation(self.args, self.control)
        if (recorder := self._recorder) is not None:
            recorder.on_dev_evaluation(self.state, evaluation)

    @property
    def _recorder(self) -> CurveRecorder | None:
        """What keeps the curves of a run; a training without a folder of its own has none."""
        return next((one for one in self.callback_handler.callbacks if isinstance(one, CurveRecorder)), None)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log means over exactly the steps since the last line, at the end over all, also where the run was resumed."""
        if "loss" in logs:
            del logs["loss"]
            logs |= self.meter.line()
            if self.args.xgblora:
                logs["booster"] = len(self.ledger.boosters) + 1  # the one in training
        if "train_loss" in logs:  # at the end: transformers knows the steps and the times since the last start alone
            mean = self.meter.mean_loss
            logs = {} if mean is None else {"train_loss": mean}
        super().log(logs, start_time)

    def save_adapters(self, folder: Path) -> None:
        """Write the adapters, with what training needs to go on; never the base."""
        with sealed_folder(folder, self.ledger.fingerprint) as work:
            self._write_adapters(work)

    def _write_adapters(self, folder: Path) -> None:
        cost = {f"forward_{name}": value for name, value in vars(self.cost).items()}
        state = {"patience": self.merging.patience._asdict(), "method": self.method.state()}
        self.ledger.training = state | cost
        self.ledger.write(folder)
        self.merging.write(folder)

    def write_checkpoint(self) -> None:
        """Write a checkpoint that is whole or not there, sealed, in safetensors and JSON alone."""
        state, root = self.state, Path(str(self.args.output_dir))
        folder = checkpoint_folder(root, state.global_step)
        if state.best_global_step:
            best = checkpoint_folder(root, state.best_global_step)
            if best == folder or best.is_dir():
                state.best_model_checkpoint = str(best)
        self.store_flos()
        remove_sealed(folder, FILES)  # one that was damaged, and is now made again
        agreement.require_same(lambda: {f"pair at step {state.global_step}": self.adapters.pair_digest()})
        with sealed_folder(folder, self.ledger.fingerprint) as work:
            self._write_adapters(work)
            meter = self.meter
            progress = {"health": meter.health.state(), "bad_steps": meter.bad_steps}
            progress |= {"applied": meter.applied, "applied_loss": meter.applied_loss}
            progress["seconds"] = self._recorder.seconds if self._recorder else 0.0
            progress["stopped"] = self.control.should_training_stop and state.global_step < state.max_steps
            write_training_state(work, self.optimizer, self.lr_scheduler, progress)
            for callback in (*self.callback_handler.callbacks, self.control):
                if isinstance(callback, ExportableState):
                    state.stateful_callbacks[type(callback).__name__] = callback.state()
            state.save_to_json(str(work / TRAINER_STATE_NAME))
        best_folder = state.best_model_checkpoint and Path(state.best_model_checkpoint)
        rotate(root, state.global_step, self._most_checkpoints, best_folder or None)
        self.method.after_checkpoint()

    def load_adapters(self, checkpoint: Path) -> None:
        """Read the adapters, and how far training had come."""
        self._load(checkpoint)
        self.meter.cost = Cost(**{name: self.ledger.training[f"forward_{name}"] for name in vars(Cost())})

    def load_training_state(self, checkpoint: Path) -> None:
        progress = read_training_state(checkpoint, self.optimizer, self.lr_scheduler)
        require_entries(checkpoint, progress, PROGRESS)
        self.meter.health, self.meter.bad_steps = Health(**progress["health"]), progress["bad_steps"]
        self.meter.applied, self.meter.applied_loss = progress["applied"], progress["applied_loss"]
        self._stopped = progress["stopped"]
        if self._recorder is not None:
            self._recorder.seconds = progress["seconds"]

    def load_random_numbers(self, checkpoint: Path) -> None:
        read_random_numbers(checkpoint)

    def load_best(self, checkpoint: Path) -> None:
        """Go back to the best adapters. What was done since was done: the cost stays."""
        self._load(agreement.folder_of_first(checkpoint if group.first() else None) or checkpoint)

    def _load(self, checkpoint: Path) -> None:
        self.ledger.load(checkpoint)
        require_entries(checkpoint, self.ledger.training, ENTRIES)
        self.merging.load(checkpoint, self.ledger.training["patience"])
        self.method.restore(self.ledger.training["method"])

    def is_over(self) -> bool:
        """Whether the checkpoint was the last of its training; transformers knows nothing of a stop before the end."""
        over = self._stopped or self.state.global_step >= self.state.max_steps
        if over:
            logger.info("No step is left after step %d", self.state.global_step)
        return bool(over)


class _Collator:
    """Examples to the tensors of a :class:`Batch`, as the plain dict that data loaders move about."""

    def __init__(self, packed: bool) -> None:
        self.packed = packed

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        return dict(vars(build_batch(examples, self.packed)))
