"""Training: transformers' Trainer with the step replaced, and the one callback that merges.

The whole of a step, batch to update, is :meth:`Trainer.training_step` and what it calls in :mod:`xgblora.zo`; the
optimizer, its schedule, logging, checkpoints, callbacks and resuming are transformers'.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from xgblora.adapters import Adapters
from xgblora.boosters import Ledger
from xgblora.compilation import compiled
from xgblora.config import RunConfig
from xgblora.errors import DivergedError, XgbloraError
from xgblora.evaluation import evaluate
from xgblora.generation import Writer
from xgblora.inference_layout import inference_layout, return_freed_memory
from xgblora.lower_layers import LowerLayers
from xgblora.objectives import Objective, classification_loss, language_model_loss
from xgblora.packing import Batch, Example, build_batch, choose_route
from xgblora.randomness import generator
from xgblora.residual import Tail, Teacher, boost, teach
from xgblora.rewards import Reward
from xgblora.schedule import Schedule, resolve
from xgblora.zo import direction_generators, estimate_batch

logger = logging.getLogger(__name__)


class Trainer(transformers.Trainer):
    """transformers' Trainer for adapters: zeroth-order (``args.trainer == "zo"``) or by backpropagation.

    ``adapters`` come from :func:`xgblora.attach` on ``model``; the datasets are sequences of
    :class:`xgblora.Example`. ``objective`` maps (model, batch) to one loss an example (:class:`xgblora.Reward` is
    one); by default it is the options' cross-entropy, or the language-model loss with
    ``args.train_as_classification = False``. ``ledger``: of the same adapters, with the boosters to start from.
    ``writer``: evaluates answers that the model writes.
    The model always runs in eval mode: with dropout, the two probes of a direction would see different noise.
    Raises :class:`DivergedError` at a NaN or infinite loss, before the step is applied.
    """

    args: RunConfig

    def __init__(
        self,
        model: PreTrainedModel,
        args: RunConfig,
        adapters: Adapters,
        train_dataset: Sequence[Example],
        eval_dataset: Sequence[Example] | None = None,
        objective: Objective | None = None,
        callbacks: list[TrainerCallback] | None = None,
        packed: bool | None = None,
        ledger: Ledger | None = None,
        writer: Writer | None = None,
    ) -> None:
        if args.trainer == "none":
            raise XgbloraError("--trainer none does not train: evaluate instead")
        if adapters.model is not model:
            raise XgbloraError("the adapters belong to another model")
        args._n_gpu = min(args.n_gpu, 1)  # DataParallel would split what is one packed row
        if args.world_size > 1:
            raise XgbloraError("training runs in one process: start it without torchrun or accelerate launch")
        if args.xgblora and adapters.rank != 1:
            raise XgbloraError(f"XGBLoRA trains pairs of rank 1, the adapters have rank {adapters.rank}")
        if args.recipe == "boost" and objective is not None:
            raise XgbloraError("--recipe boost fits the options' or the language model's loss: it takes no objective")
        if args.objective == "reward" and objective is None:
            raise XgbloraError("--objective reward needs an xgblora.Reward: give it as the objective")
        self.adapters = adapters
        self.writer = writer
        self.ledger = ledger or Ledger(adapters)
        self.classification = args.train_as_classification is not False
        self.objective = objective or (classification_loss if self.classification else language_model_loss)
        self.reward = objective if isinstance(objective, Reward) else None
        self.step_loss = float("nan")
        """Mean loss of the step in progress, over its micro-batches."""
        self._micro_batch = 0
        self.searched: list[Example] = []
        """Recipe boost: the rows that find every booster's step length; none is ever fitted on them."""
        if args.recipe == "boost":
            train_dataset, self.searched = _set_aside(train_dataset, args)
        self.teacher: Teacher | None = None
        """Recipe boost on options: what every booster follows; fitted in the first step."""
        super().__init__(
            model=model,
            args=args,
            data_collator=_Collator(choose_route(model) if packed is None else packed),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[_Boosting(self), *(callbacks or [])],
        )
        cache_bytes = int(args.activation_cache_gb * 1e9)
        self._writes = self.reward is not None and self.reward.writer is not None
        self.lower_layers = LowerLayers(adapters, cache_bytes) if args.trainer == "zo" and not self._writes else None
        self.tail = Tail(model, self.packed) if args.recipe == "boost" else None
        # Losses go into the bar and into the record, not onto the console line by line.
        self.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        if not args.disable_tqdm:
            self.add_callback(_Progress)

    @property
    def packed(self) -> bool:
        """Whether batches are packed rows (else padded ones)."""
        return bool(self.data_collator.packed)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train as transformers' Trainer does, with the frozen base laid out (and compiled) for forwards alone."""
        with ExitStack() as fast:
            if self.args.trainer == "zo":
                fast.enter_context(inference_layout(self.model))
            if self.args.torch_compile:
                fast.enter_context(compiled(self.model))
            return super().train(resume_from_checkpoint, **kwargs)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Write ``.grad`` of the pairs for one micro-batch; return its mean loss (both probes of it, for zo)."""
        args, step = self.args, self.state.global_step
        self.model.eval()
        batch = Batch(**inputs)
        if self.tail is not None:
            return self._fit_booster(batch, self.tail)
        batch = batch.to(args.device)
        share = 1 / self.current_gradient_accumulation_steps
        written = self.reward.tokens if self.reward else 0
        if args.trainer == "zo":
            draws = direction_generators(args.seed, step, self._micro_batch, args.zo_num_perturbations)
            found = estimate_batch(
                self.adapters,
                self.objective,
                batch,
                draws,
                args.zo_eps,
                args.zo_directions,
                self.lower_layers,
                by_row=self._writes,
            )
            loss = found.loss
            self._check(loss, found.gradient)
            self.adapters.accumulate_gradient(found.gradient * share)
            if batch.input_ids.device.type == "cpu":
                return_freed_memory()  # every batch leaves holes of other sizes, in all a tenth of the memory
            passes = 2 * len(draws)
        else:
            differentiable = self.objective(self.model, batch).mean() * share
            loss = differentiable.detach() / share
            self._check(loss)
            self.accelerator.backward(differentiable)
            self.adapters.keep_chosen_gradients()
            self._check(loss, *(p.grad for p in self.adapters.parameters()))
            passes = 1
        self.ledger.forward_passes += passes
        self.ledger.forward_sequences += passes * batch.segments
        self.ledger.forward_tokens += (
            self.reward.tokens - written if self.reward and self._writes else passes * batch.tokens
        )
        before = self.step_loss if self._micro_batch else 0.0
        self.step_loss = before + loss.item() * share
        self._micro_batch = (self._micro_batch + 1) % self.current_gradient_accumulation_steps
        return loss * share

    def _fit_booster(self, batch: Batch, tail: Tail) -> Tensor:
        """Recipe boost: the pair in training becomes the weak learner of this batch; returns the loss before it."""
        args, ledger = self.args, self.ledger
        teacher = self._teach(tail) if self.classification else None
        found = boost(
            self.adapters,
            batch.examples,
            self.searched,
            tail,
            classification=self.classification,
            packed=self.packed,
            ridge=args.boost_ridge if teacher is None else args.boost_follow_ridge,
            teacher=teacher,
            step_length=ledger.step_length,
            shrinkage=args.xgblora_shrinkage,
            lower_layers=self.lower_layers,
        )
        if found.step_length:
            ledger.step_length = found.step_length
        else:
            logger.info("Booster %d adds nothing: no step along it lowers the loss", len(ledger.boosters) + 1)
        ledger.forward_passes += found.passes
        ledger.forward_sequences += found.sequences
        ledger.forward_tokens += found.tokens
        self.step_loss = found.loss
        loss = torch.tensor(found.loss)
        self._check(loss)
        return loss

    def _teach(self, tail: Tail) -> Teacher:
        """Recipe boost: what the boosters follow, fitted to the model as it was before the first of them."""
        if self.teacher is not None:
            return self.teacher
        args, ledger = self.args, self.ledger
        own = sum(booster.step > 0 for booster in ledger.boosters)  # a resumed run has some already
        with self.adapters.first(len(ledger.boosters) - own):
            self.teacher = teacher = teach(
                self.adapters,
                self.train_dataset,
                self.searched,
                tail,
                packed=self.packed,
                ridge=args.boost_ridge,
                directions=args.boost_boosters,
                opinion=args.boost_opinion,
                lower_layers=self.lower_layers,
            )
        if own:
            if self.lower_layers is not None:
                self.lower_layers.clear()
            return teacher
        ledger.forward_passes += 1
        ledger.forward_sequences += teacher.sequences
        ledger.forward_tokens += teacher.tokens
        losses = ", ".join(
            f"{loss:.4f} {'added to' if kept else 'in place of'} the base's opinion"
            for kept, loss in teacher.losses.items()
        )
        logger.info(
            "Teacher of %d examples, along %d direction(s); held-out loss %s",
            teacher.sequences,
            teacher.directions,
            losses,
        )
        return teacher

    def _check(self, loss: Tensor, *gradients: Tensor | None) -> None:
        finite = all(torch.isfinite(gradient).all() for gradient in gradients if gradient is not None)
        if not torch.isfinite(loss) or not finite:
            what = "the gradient is not finite" if torch.isfinite(loss) else f"the loss is {loss.item()}"
            raise DivergedError(
                f"{what} at step {self.state.global_step + 1}, which was not applied: lower --learning_rate or "
                "--zo_eps, or load the base in float32; the last checkpoint is kept"
            )

    def evaluate(
        self,
        eval_dataset: Sequence[Example] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Accuracy and loss on ``eval_dataset`` (default: the one given at the start)."""
        examples = self.eval_dataset if eval_dataset is None else eval_dataset
        found = evaluate(
            self.model.eval(),
            examples,
            self.packed,
            self.args.per_device_eval_batch_size,
            self.classification,
            progress=None if self.args.disable_tqdm else f"evaluating {len(examples)} examples",
            writer=self.writer,
        )
        metrics = {f"{metric_key_prefix}_loss": found.loss, f"{metric_key_prefix}_accuracy": found.accuracy}
        if self.reward is not None:
            metrics[f"{metric_key_prefix}_reward"] = self.reward.mean(examples, found.predictions, found.texts)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the adapters alone, never the base."""
        self.ledger.save(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        self.ledger.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.ledger.load(self.state.best_model_checkpoint)


class _Collator:
    """Examples to the tensors of a :class:`Batch`, as the plain dict that data loaders move about."""

    def __init__(self, packed: bool) -> None:
        self.packed = packed

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        return dict(vars(build_batch(examples, self.packed)))


def _set_aside(rows: Sequence[Example], args: RunConfig) -> tuple[list[Example], list[Example]]:
    """Recipe boost: the rows to fit boosters on, and those that find their step lengths.

    Were the latter drawn anew for each booster, earlier ones would have been fitted on them, and the search would
    take learning by heart for progress (docs/experiments.md).
    """
    count = max(1, round(min(len(rows), args.boost_examples) * args.boost_search_share))
    order = torch.randperm(len(rows), generator=generator(args.seed, "search")).tolist()
    fitted = order[count : count + args.boost_teacher_examples]
    return [rows[i] for i in sorted(fitted)], [rows[i] for i in order[:count]]


class _Boosting(TrainerCallback):
    """Merges where the schedule says so, and nowhere else."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.schedule = Schedule(total_steps=1)
        self.measured: dict[str, Tensor] | None = None

    def on_train_begin(self, args: RunConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        batches = len(kwargs["train_dataloader"])
        steps_per_epoch = max(-(-batches // args.gradient_accumulation_steps), 1)
        self.schedule = resolve(args, state.max_steps, steps_per_epoch)
        if args.method == "xgblora":
            expected = self.schedule.expected_merges
            logger.info(
                "Merge schedule: %s; expected merges: %s",
                self.schedule.describe(),
                "decided by the loss" if expected is None else expected,
            )

    def on_step_begin(self, args: RunConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.schedule.patience is not None:
            self.measured = self.trainer.ledger.copy_pair()  # what the step's loss is the loss of

    def on_step_end(self, args: RunConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        ledger, step, loss = self.trainer.ledger, state.global_step, self.trainer.step_loss
        ledger.patience, reason = self.schedule.observe(ledger.patience, step, loss)
        if self.schedule.patience is not None:
            if reason:
                ledger.roll_back()
            elif ledger.patience.stale == 0:
                ledger.best_pair = self.measured
        if not reason:
            if args.early_stopping_boosters and step == state.max_steps:
                control.should_evaluate = True  # the last pair is a booster, too
            return
        self._shrink(args)
        place = self.schedule.place(step)
        logger.info("XGBLoRA: Merging and reinitializing at %s", place)
        ledger.merge(step, place, loss, self.schedule.describe(), reason)
        subset = self.trainer.adapters.subset
        if self.trainer.lower_layers is not None and not (subset and subset.choice == "top"):
            self.trainer.lower_layers.clear()  # the new booster may lie below the layers that train next
        optimizer = kwargs["optimizer"]
        for parameter in self.trainer.adapters.parameters():
            optimizer.state.pop(parameter, None)
        if args.eval_strategy != "no" or args.early_stopping_boosters:
            control.should_evaluate = True

    def on_evaluate(
        self, args: RunConfig, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        ledger = self.trainer.ledger
        ledger.evaluated(state.global_step, metrics)
        losses = ledger.evaluations()
        since_best = len(losses) - min(losses, key=losses.__getitem__) if losses else 0
        if 0 < args.early_stopping_boosters <= since_best:
            logger.info("Stopping: %d boosters have not lowered the dev loss", since_best)
            control.should_training_stop = True

    def on_train_end(self, args: RunConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._shrink(args)
        ledger = self.trainer.ledger
        losses = ledger.evaluations()
        if args.early_stopping_boosters and args.method == "xgblora" and losses:
            best = min(losses, key=losses.__getitem__)
            logger.info("Keeping the first %d of %d boosters: dev loss %.4f", best, max(losses), losses[best])
            ledger.truncate(best)

    def _shrink(self, args: RunConfig) -> None:
        """Shrink a finished booster; a fitted one was shrunk when its step was taken."""
        if args.method == "xgblora" and args.recipe == "classic" and args.xgblora_shrinkage < 1:
            self.trainer.adapters.scale_pair(args.xgblora_shrinkage)


class _Progress(ProgressCallback):
    """The progress bar with the latest loss in it, in place of a line for every log."""

    def on_log(
        self, args: RunConfig, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}")


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint folder of a run."""
    found = transformers.trainer_utils.get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
    return Path(found) if found else None
