"""One run from configuration to files: model, task, training, evaluation, metrics."""

import dataclasses
import logging
import shutil
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from transformers import PreTrainedModel, set_seed

from xgblora.adapters import Adapters, LayerSubset, attach
from xgblora.boosters import Ledger, start_from
from xgblora.config import RunConfig, banner, identity, notes
from xgblora.errors import XgbloraError
from xgblora.evaluation import Evaluation, evaluate, score
from xgblora.files import PART, digest, read_json, remove_parts, write_atomically, write_json
from xgblora.generation import Writer
from xgblora.interruption import LOCK, StopAtSignal, alone_in
from xgblora.models import context_length, decoder_layers, load_model
from xgblora.packing import Example, choose_route
from xgblora.randomness import generator
from xgblora.record import EVAL_LOSS, TRAINING_LOSS, CurveRecorder, PeakMemory
from xgblora.residual import require_writers, residual_writers
from xgblora.rewards import Reward, load_reward, reward_file
from xgblora.tasks import Chat, Task, data_files, encode, get_task, load_splits, load_task, sample
from xgblora.trainer import Trainer, last_checkpoint

logger = logging.getLogger(__name__)

METRICS = "metrics.json"
CONFIG = "config.json"


def task_of(config: RunConfig) -> Task | Chat:
    """The task of a run: of its file, else of its name."""
    return load_task(config.task_file) if config.task_file else get_task(config.task_name)


def contents(config: RunConfig) -> dict[str, str]:
    """SHA-256 of each local file that decides, beside the settings, what a run computes: task, data, own reward."""
    data = data_files(task_of(config), config.data_dir)
    files = {f"the {split} data ({file.name})": file for split, file in data.items()}
    if config.task_file:
        files["--task_file"] = Path(config.task_file)
    if config.reward and (module := reward_file(config.reward)):
        files["--reward"] = module
    return {what: digest(file) for what, file in files.items() if file.is_file()}


def hide_bars(config: RunConfig) -> None:
    """With ``--disable_tqdm``, the bars of the libraries that read data and models, too."""
    if config.disable_tqdm:
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()


class Workspace:
    """The base model and the tokenised rows, loaded once and shared by runs that want the same."""

    def __init__(self, config: RunConfig) -> None:
        hide_bars(config)
        self.task = task_of(config)
        self.contents = contents(config)
        self.num_train = config.train_rows
        splits = load_splits(self.task, config.data_dir)
        self.num_dev = self.task.num_dev if config.num_dev is None else config.num_dev
        samples = sample(splits, config.train_rows, self.num_dev, config.num_eval, config.train_set_seed)
        self.model, self.tokenizer = load_model(config.model_name, config.dtype, config.trust_remote_code)
        self.model.to(config.device)
        self.packed = choose_route(self.model)
        self.classification = (
            self.task.classification if config.train_as_classification is None else config.train_as_classification
        )
        if self.classification and self.task.generation:
            raise XgbloraError(f"{self.task.name} has no options to classify: leave out --train_as_classification")
        self.writer = Writer(self.tokenizer, self.task.generation) if self.task.generation else None
        length = min(config.max_length, context_length(self.model.config) or config.max_length)
        score_prompt = not self.classification and not config.only_train_option and config.objective != "reward"
        self.reward = self._reward(config) if config.reward else None

        def encoded(rows: Dataset, demonstrations: Sequence[Any] = ()) -> list[Example]:
            return encode(self.task, rows, self.tokenizer, length, score_prompt, demonstrations=demonstrations)

        self.train, self.dev, self.eval = encoded(samples.train), encoded(samples.dev), encoded(samples.eval)
        self.eval_split = samples.eval_split
        self._encoded, self._samples = encoded, samples
        self._zero_shot: tuple[Evaluation, Evaluation | None] | None = None

    def _reward(self, config: RunConfig) -> Reward:
        assert config.reward is not None
        assert config.reward_completions is not None  # settled with the objective
        completions = config.reward_completions
        if self.writer and config.trainer == "zo" and completions == "expected":
            raise XgbloraError(
                "--reward_completions expected would compare answers drawn twice, once for each probe, where they are "
                "written: take greedy, or --trainer regular"
            )
        function = load_reward(config.reward, config.reward_length_penalty)
        return Reward(function, self.tokenizer, self.writer, completions, config.reward_samples)

    def scores(
        self, config: RunConfig, what: str, rows: tuple[list[Example], list[Example]] | None = None
    ) -> tuple[Evaluation, Evaluation | None]:
        """The model as it is now, on the evaluation rows and (None without any) on the dev rows, or on ``rows``."""
        eval_rows, dev_rows = rows or (self.eval, self.dev)

        def score(rows: list[Example], name: str) -> Evaluation:
            progress = None if config.disable_tqdm else f"{what}, {len(rows)} {name} rows"
            size = config.per_device_eval_batch_size
            return evaluate(
                self.model, rows, self.packed, size, self.classification, progress, self.writer, config.calibrated
            )

        return score(eval_rows, self.eval_split), score(dev_rows, "dev") if dev_rows else None

    def in_context(self, config: RunConfig) -> tuple[Evaluation, Evaluation | None]:
        """The scores with as many training rows as the run has, answered, in front of every prompt.

        Its seed draws them, and their order.
        """
        rows = self._samples.train
        drawn = torch.randperm(len(rows), generator=generator(config.seed, "demonstrations")).tolist()
        shown = [rows[number] for number in drawn[: config.train_rows]]
        asked = self._encoded(self._samples.eval, shown), self._encoded(self._samples.dev, shown)
        return self.scores(config, f"{len(shown)} in context", asked)

    def zero_shot(self, config: RunConfig) -> tuple[Evaluation, Evaluation | None]:
        """The scores before any training, taken once. Fresh adapters (B = 0) change no bit of them."""
        if self._zero_shot is None:
            self._zero_shot = self.scores(config, "zero-shot")
        return self._zero_shot


def run(config: RunConfig, workspace: Workspace | None = None) -> dict[str, Any]:
    """Carry out one run, or resume it, or return the metrics it already has; see :func:`prepare_folder`.

    ``workspace``, of a run with the same model and data, saves loading them again. Returns the content of
    ``metrics.json``.

    In the main thread, Ctrl-C or SIGTERM lets the step in progress finish, saves a checkpoint and raises
    :class:`~xgblora.interruption.Interrupted`; a second one raises it at once.
    """
    folder = Path(str(config.output_dir))
    if (finished := finished_metrics(config)) is not None:
        logger.info("%s is complete: nothing to do (--overwrite_output_dir starts again)", folder)
        return finished
    _refuse_other_files(config, folder)
    stop = StopAtSignal()
    with ExitStack() as held:
        held.enter_context(stop.listening())
        if folder.is_dir():  # another one is made once model and data are known to be there
            held.enter_context(alone_in(folder))
        return _run(config, workspace, folder, stop, held)


def _run(
    config: RunConfig, workspace: Workspace | None, folder: Path, stop: StopAtSignal, held: ExitStack
) -> dict[str, Any]:
    """``held``: holds the lock on the folder until the run is over."""
    workspace = workspace or Workspace(config)
    most = workspace.num_train
    if config.train_rows > most or (config.trainer != "none" and config.train_rows < most):
        raise XgbloraError(f"a workspace of --num_train {most} does not serve a run of --num_train {config.train_rows}")
    config.train_as_classification, config.num_dev = workspace.classification, workspace.num_dev
    set_seed(config.seed)
    metrics: dict[str, Any] = {
        "method": _method(config),
        "trainer": config.trainer,
        "seed": config.seed,
        "model": config.model_name,
        "task": workspace.task.name,
        "evaluation_split": workspace.eval_split,
        "rows": {
            "train": min(config.train_rows, len(workspace.train)),
            "dev": len(workspace.dev),
            "evaluation": len(workspace.eval),
        },
    }
    if config.trainer == "none":
        prepare_folder(config, held, workspace.contents)
        final, dev = workspace.in_context(config) if config.train_rows else workspace.zero_shot(config)
        work: dict[str, Any] = {"merges": 0, "merge_steps": [], "steps": 0, "forward_passes": 0}
        work |= {"forward_sequences": 0, "forward_tokens": 0}
    else:
        adapters = _attach(config, workspace.model)  # first of all: it may refuse, and then nothing was written
        try:
            ledger = Ledger(adapters)
            if config.init_adapter:
                count = start_from(ledger, config.init_adapter)
                logger.info("Starting from %s: %d boosters", config.init_adapter, count)
            prepare_folder(config, held, workspace.contents)
            with adapters.first(0):
                workspace.zero_shot(config)
            work = _train(config, workspace, ledger, folder, stop)
            final, dev = workspace.scores(config, "trained")
        finally:
            adapters.detach()
    zero_shot, _ = workspace.zero_shot(config)
    metrics |= {
        "zero_shot_accuracy": zero_shot.accuracy,
        "zero_shot_loss": zero_shot.loss,
        "accuracy": final.accuracy,
        "eval_loss": final.loss,
        "gain": final.accuracy - zero_shot.accuracy,
        "dev_accuracy": dev.accuracy if dev else None,
        "dev_loss": dev.loss if dev else None,
    }
    if (metric := workspace.task.metric) != "accuracy":
        metrics["metric"] = metric
        metrics["score"] = score(metric, workspace.eval, final)
        metrics["zero_shot_score"] = score(metric, workspace.eval, zero_shot)
        metrics["dev_score"] = score(metric, workspace.dev, dev) if dev else None
    if workspace.reward is not None:
        scored = ("reward", workspace.eval, final), ("zero_shot_reward", workspace.eval, zero_shot)
        for name, rows, found in (*scored, ("dev_reward", workspace.dev, dev)):
            metrics[name] = workspace.reward.mean(rows, found.predictions, found.texts) if found else None
    metrics |= work
    write_json(folder / METRICS, metrics)  # last: it is what makes a run complete
    if config.result_file:
        write_json(Path(config.result_file), metrics)
    return metrics


def _method(config: RunConfig) -> str:
    """What the record calls it."""
    if config.trainer == "none":
        return "in-context" if config.train_rows else "zero-shot"
    return "boost" if config.recipe == "boost" else config.method


def _attach(config: RunConfig, model: PreTrainedModel) -> Adapters:
    for line in banner(config):
        logger.info(line)
    for note in notes(config):
        logger.info("Note: %s", note)
    boosted = config.recipe == "boost"
    # The upper half: what a prompt says is there (docs/experiments.md), and the lower half is computed only once.
    count = config.xgblora_layers or (-(-len(decoder_layers(model)) // 2) if boosted else 0)
    adapters = attach(
        model,
        rank=config.rank,
        alpha=config.lora_alpha,
        target_modules=config.lora_target_modules or (residual_writers(model) if boosted else None),
        seed=config.seed,
        xgblora=config.xgblora,
        layers=LayerSubset(count, config.layer_choice) if count else None,
    )
    if boosted:
        try:
            require_writers(adapters)
        except XgbloraError:
            adapters.detach()
            raise
    return adapters


def _train(config: RunConfig, workspace: Workspace, ledger: Ledger, folder: Path, stop: StopAtSignal) -> dict[str, Any]:
    trainer = Trainer(
        model=workspace.model,
        args=config,
        adapters=ledger.adapters,
        train_dataset=workspace.train,
        eval_dataset=workspace.dev,
        objective=workspace.reward,
        packed=workspace.packed,
        ledger=ledger,
        writer=workspace.writer,
    )
    recorder = CurveRecorder(folder, ledger)
    trainer.add_callback(recorder)
    trainer.add_callback(stop)
    checkpoint = config.resume_from_checkpoint or last_checkpoint(folder)
    if checkpoint is not None:
        logger.info("Resuming from %s", checkpoint)
    memory = PeakMemory(config.device)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    peak = memory.read()
    ledger.save(folder / "adapter")
    write_atomically(folder / "trainer_state.json", lambda file: trainer.state.save_to_json(str(file)))
    merges = [booster.step for booster in ledger.boosters if booster.step]  # 0: what the run started from
    return {
        "merges": len(merges),
        "merge_steps": merges,
        "boosters": len(ledger.boosters) + 1 if config.xgblora else 0,
        "steps": trainer.state.global_step,
        "forward_passes": ledger.forward_passes,
        "forward_sequences": ledger.forward_sequences,
        "forward_tokens": ledger.forward_tokens,
        "seconds_per_step": statistics.median(recorder.step_seconds) if recorder.step_seconds else None,
        "training_seconds": recorder.seconds,
        "peak_memory_mb": peak,
        "trainable_parameters": ledger.adapters.size,
    }


def finished_metrics(config: RunConfig) -> dict[str, Any] | None:
    """The metrics of this very run where its folder holds them. Raises as :func:`prepare_folder` does."""
    folder = Path(str(config.output_dir))
    if config.overwrite_output_dir or not (folder / METRICS).is_file():
        return None
    _refuse_other_run(config, folder)
    try:
        return read_json(folder / METRICS)
    except XgbloraError as error:
        raise XgbloraError(f"{error}: remove it to evaluate the run again") from error


def prepare_folder(config: RunConfig, held: ExitStack, contents: Mapping[str, str]) -> None:
    """Make ``output_dir`` ready for this run, hold its lock, and write its ``config.json`` with :func:`contents`.

    A folder that holds an unfinished run of the same configuration is kept, to be resumed. Raises
    :class:`XgbloraError` where it holds a different run or foreign files, unless ``overwrite_output_dir``.
    """
    folder = Path(str(config.output_dir))
    if not folder.is_dir():
        _refuse_other_files(config, folder)
        held.enter_context(alone_in(folder))
    remove_parts(folder)
    if config.overwrite_output_dir:
        for name in (METRICS, CONFIG, TRAINING_LOSS, EVAL_LOSS, "trainer_state.json"):
            (folder / name).unlink(missing_ok=True)
        for old in [folder / "adapter", *folder.glob("checkpoint-*")]:
            shutil.rmtree(old, ignore_errors=True)
    write_json(folder / CONFIG, config.resolved() | {"sha256": dict(contents)})


def _refuse_other_files(config: RunConfig, folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise XgbloraError(f"{folder} is a file: choose another --output_dir")
    if not config.overwrite_output_dir:
        _refuse_other_run(config, folder)


def _refuse_other_run(config: RunConfig, folder: Path) -> None:
    file = folder / CONFIG
    if not file.is_file():
        if folder.is_dir() and any(each.name != LOCK and each.suffix != PART for each in folder.iterdir()):
            raise XgbloraError(f"{folder} holds files of something else: choose another --output_dir")
        return
    try:
        there = identity(read_json(file))
    except XgbloraError as error:
        raise XgbloraError(f"{error}: use --overwrite_output_dir to start again") from error
    ours, their_contents = config.identity(), there.pop("sha256", {})
    for field in dataclasses.fields(RunConfig):  # a run of a version that lacked a flag is one of its default
        if field.name in ours and field.default is not dataclasses.MISSING:
            there.setdefault(field.name, field.default)
    for name in ("train_as_classification", "num_dev"):  # what is left to the task is settled when the run begins
        if ours[name] is None:
            there[name] = None
    different = [name for name in ours.keys() | there.keys() if ours.get(name) != there.get(name)]
    different.sort(key=lambda name: (name != "recipe", name))  # flags of either recipe alone differ with it
    found = [f"{n} {there.get(n)} -> {ours.get(n)}" for n in different[:3]]
    if not different:  # other settings read other files
        now = contents(config)
        found = [f"{what} has changed" for what in now if now[what] != their_contents.get(what, now[what])]
    if found:
        shown = ", ".join(found)
        raise XgbloraError(
            f"{folder} holds a run of another configuration ({shown}): choose another --output_dir, or "
            "--overwrite_output_dir to replace it"
        )
