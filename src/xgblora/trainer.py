"""Training: transformers' Trainer with the step replaced, and the one callback that merges.

The whole of a step, batch to update, is :meth:`Trainer.training_step` and what it calls in :mod:`xgblora.zo`; the
optimizer, its schedule, logging, checkpoints, callbacks and resuming are transformers'.
"""

import logging
import shutil
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
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from xgblora.adapters import Adapters
from xgblora.boosters import Ledger
from xgblora.compilation import compiled
from xgblora.config import RunConfig
from xgblora.errors import DivergedError, XgbloraError, within_memory
from xgblora.evaluation import evaluate
from xgblora.files import sealed_folder, verify
from xgblora.generation import Writer
from xgblora.health import Health
from xgblora.inference_layout import inference_layout, return_freed_memory
from xgblora.lower_layers import LowerLayers
from xgblora.objectives import Objective, classification_loss, language_model_loss
from xgblora.packing import Batch, Example, build_batch, choose_route
from xgblora.randomness import generator
from xgblora.residual import Tail, Teacher, boost, teach
from xgblora.rewards import Reward
from xgblora.schedule import Schedule, resolve
from xgblora.training_state import read_random_numbers, read_training_state, write_training_state
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
    A step with a NaN or infinite loss or gradient is not applied; ``args.max_bad_steps`` of them in a row raise
    :class:`DivergedError`. Checkpoints are folders that are whole or not there, with a SHA-256 of every file.
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
        self.ledger.task = args.task_name
        self.classification = args.train_as_classification is not False
        self.objective = objective or (classification_loss if self.classification else language_model_loss)
        self.reward = objective if isinstance(objective, Reward) else None
        self.step_loss = float("nan")
        """Mean loss of the step in progress, over its micro-batches."""
        self.step_is_bad = False
        """Whether a number of the step in progress is not finite, so that it is not applied."""
        self.bad_steps = 0
        """Such steps in a row."""
        self.health = Health()
        self._micro_batch = 0
        self._stopped = False
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
        """Train as transformers' Trainer does, with the frozen base laid out (and compiled) for forwards alone.

        ``resume_from_checkpoint``: True takes the newest whole one. Raises :class:`XgbloraError` with the name of a
        file that is missing from the checkpoint asked for, or damaged.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_checkpoint(Path(str(self.args.output_dir))) or "") or None
        elif resume_from_checkpoint:
            verify(Path(resume_from_checkpoint))  # before anything in it is read
        self._stopped = False
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
        self.model.eval()
        batch = Batch(**inputs)
        flag = "--boost_examples" if self.tail is not None else "--per_device_train_batch_size"
        with within_memory(
            f"at step {self.state.global_step + 1}, with {batch.segments} examples of {batch.tokens:,} tokens",
            f"lower {flag} or --max_length, or load the base in bfloat16; the last checkpoint is kept",
        ):
            if self.tail is not None:
                return self._fit_booster(batch, self.tail)
            return self._measure(batch.to(self.args.device))

    def _measure(self, batch: Batch) -> Tensor:
        """The gradient of one micro-batch, of a step that is not known to be bad yet."""
        args, step = self.args, self.state.global_step
        if self._micro_batch == 0:
            self.step_is_bad, self.step_loss = False, 0.0
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
            if self._sound(batch, loss, found.gradient):
                self.adapters.accumulate_gradient(found.gradient * share)
                self.health.measure(found.projected)
            if batch.input_ids.device.type == "cpu":
                return_freed_memory()  # every batch leaves holes of other sizes, in all a tenth of the memory
            passes = 2 * len(draws)
        else:
            differentiable = self.objective(self.model, batch).mean() * share
            loss = differentiable.detach() / share
            if self._sound(batch, loss):
                self.accelerator.backward(differentiable)
                self.adapters.keep_chosen_gradients()
                self._sound(batch, loss, *(p.grad for p in self.adapters.parameters()))
            passes = 1
        self.ledger.forward_passes += passes
        self.ledger.forward_sequences += passes * batch.segments
        self.ledger.forward_tokens += (
            self.reward.tokens - written if self.reward and self._writes else passes * batch.tokens
        )
        self.step_loss += loss.item() * share
        self._micro_batch = (self._micro_batch + 1) % self.current_gradient_accumulation_steps
        if self._micro_batch == 0:
            self.bad_steps = self.bad_steps + 1 if self.step_is_bad else 0
            if self.step_is_bad:
                self.health.skipped += 1
            else:
                self.health.observe(self.step_loss)
        return torch.zeros_like(loss) if self.step_is_bad else loss * share

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
        if not torch.isfinite(loss):
            raise DivergedError(
                f"the loss is {found.loss} at booster {self.state.global_step + 1}, which was not kept: load the base "
                "in float32 or bfloat16; the last checkpoint is kept"
            )
        self.health.observe(found.loss)
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
            if self.lower_layers is not None and not self._lower_layers_stay:
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

    @property
    def _lower_layers_stay(self) -> bool:
        """Whether no booster lies below the layers that train next, so that kept activations stay right."""
        subset = self.adapters.subset
        return subset is not None and subset.choice == "top"

    def _sound(self, batch: Batch, loss: Tensor, *gradients: Tensor | None) -> bool:
        """Whether the step's numbers are finite so far; if not, it is marked as bad, or the last one to be borne.

        Raises :class:`DivergedError` there.
        """
        finite = all(torch.isfinite(gradient).all() for gradient in gradients if gradient is not None)
        if not torch.isfinite(loss) or not finite:
            what = "the gradient is not finite" if torch.isfinite(loss) else f"the loss is {loss.item()}"
            place = f"{what} at step {self.state.global_step + 1}, which was not applied"
            reason = self._reason(batch)
            if self.bad_steps + 1 >= self.args.max_bad_steps:
                raise DivergedError(f"{place}: {reason}; the last checkpoint is kept")
            if not self.step_is_bad:
                logger.warning("%s (%d in a row): %s", place, self.bad_steps + 1, reason)
            self.step_is_bad = True
        if self.step_is_bad:
            for parameter in self.adapters.parameters():
                parameter.grad = None  # torch's optimizers leave such parameters and their moments alone
        return not self.step_is_bad

    @torch.no_grad()
    def _reason(self, batch: Batch) -> str:
        """Whose numbers are not finite, and why: found by the same batch without probes, and without adapters."""
        args = self.args

        def spoiled() -> list[Example]:
            finite = torch.isfinite(self.objective(self.model, batch)).tolist()
            return [example for example, fine in zip(batch.examples, finite, strict=True) if not fine]

        with self.adapters.first(0):
            bare = spoiled()
        if bare:
            cure = "load the base in bfloat16 or float32" if args.load_float16 else "look at these examples"
            return f"the base alone gives it for {self._names(bare)}: {cure}"
        if grown := spoiled():
            return f"the adapters have grown too far, seen at {self._names(grown)}: lower --learning_rate"
        if args.trainer == "zo":
            return (
                f"only the probes of {self._names(batch.examples)} give it: lower --zo_eps (now {args.zo_eps:g}), or "
                "load the base in float32"
            )
        return f"the gradient of {self._names(batch.examples)} overflows: load the base in float32"

    def _names(self, examples: Sequence[Example]) -> str:
        """Numbers of examples in the sample they were drawn from, counted from 1."""
        places = {id(example): number for number, example in enumerate(self.train_dataset, start=1)}
        numbers = sorted(places[id(example)] for example in examples if id(example) in places)
        shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
        return f"training example(s) {shown}" if shown else f"{len(examples)} training example(s)"

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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log means over exactly the steps since the last line, also where the run was resumed between two lines."""
        if "loss" in logs:
            del logs["loss"]
            logs |= self.health.line()
            self.health = Health()
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the adapters alone, never the base."""
        self.ledger.save(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As transformers' Trainer does, but whole or not at all, sealed, and in safetensors and JSON alone."""
        state = self.state
        root = Path(self._get_output_dir(trial))
        folder = root / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.best_global_step:
            best = root / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
            if best == folder or best.is_dir():
                state.best_model_checkpoint = str(best)
        if folder.exists():
            shutil.rmtree(folder)  # one that was damaged, and is now made again
        with sealed_folder(folder, self.ledger.fingerprint) as work:
            self.ledger.write(work)
            progress = {"health": self.health.state(), "bad_steps": self.bad_steps}
            progress["stopped"] = self.control.should_training_stop and state.global_step < state.max_steps
            write_training_state(work, self.optimizer, self.lr_scheduler, progress)
            for callback in (*self.callback_handler.callbacks, self.control):
                if isinstance(callback, ExportableState):
                    state.stateful_callbacks[type(callback).__name__] = callback.state()
            state.save_to_json(str(work / TRAINER_STATE_NAME))
        rotate_checkpoints(str(root), self.args.save_total_limit, state.best_model_checkpoint, use_mtime=True)
        if self.lower_layers is not None and self.tail is None:
            self.lower_layers.clear()  # a run that is resumed here has none, and other sums round otherwise

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        self.ledger.load(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            progress = read_training_state(Path(checkpoint), self.optimizer, self.lr_scheduler)
            self.health, self.bad_steps = Health(**progress["health"]), progress["bad_steps"]
            self._stopped = progress["stopped"]

    def _run_epoch(self, **kwargs: Any) -> None:
        """One pass over the rows; none where the checkpoint was the last of its training.

        transformers asks only after a step whether it was the last one, and knows nothing of a stop before the end.
        """
        if self._stopped or self.state.global_step >= self.state.max_steps:
            logger.info("No step is left after step %d", self.state.global_step)
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            read_random_numbers(Path(checkpoint))

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
        self.before: list[Tensor] = []

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

    def on_pre_optimizer_step(
        self, args: RunConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.before = [parameter.detach().clone() for parameter in self.trainer.adapters.parameters()]

    def on_optimizer_step(self, args: RunConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.tail is None and not self.trainer.step_is_bad:
            moved = [p.detach() - b for p, b in zip(self.trainer.adapters.parameters(), self.before, strict=True)]
            self.trainer.health.moved(torch.cat([each.flatten() for each in moved]).norm().item())

    def on_step_begin(self, args: RunConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.schedule.patience is not None:
            self.measured = self.trainer.ledger.copy_pair()  # what the step's loss is the loss of

    def on_step_end(self, args: RunConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        ledger, step, bad = self.trainer.ledger, state.global_step, self.trainer.step_is_bad
        loss = None if bad else self.trainer.step_loss
        ledger.patience, reason = self.schedule.observe(ledger.patience, step, loss)
        if self.schedule.patience is not None:
            if reason:
                ledger.roll_back()
            elif ledger.patience.stale == 0 and not bad:
                ledger.best_pair = self.measured
        if not reason:
            if args.early_stopping_boosters and step == state.max_steps:
                control.should_evaluate = True  # the last pair is a booster, too
            return
        self._shrink(args)
        place = self.schedule.place(step)
        logger.info("XGBLoRA: Merging and reinitializing at %s", place)
        ledger.merge(step, place, loss, self.schedule.describe(), reason)
        if self.trainer.lower_layers is not None and not self.trainer._lower_layers_stay:
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
        if ledger.evaluation is not None:
            return  # of a pair in training: a booster is judged when it is finished
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
    """The newest whole checkpoint of a run; None where it has none at all.

    A warning names the file of a newer one that is damaged. Raises :class:`XgbloraError` where no checkpoint is whole.
    """
    found = sorted(output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=_step)
    damage = ""
    for folder in reversed([each for each in found if each.is_dir() and _step(each) >= 0]):
        try:
            verify(folder)
        except XgbloraError as error:
            damage = str(error)
            logger.warning("Not resuming from %s: %s", folder.name, error)
        else:
            return folder
    if damage:
        raise XgbloraError(f"no checkpoint of {output_dir} is whole: {damage}; --overwrite_output_dir starts again")
    return None


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdigit() else -1
