"""One run from configuration to files: model, task, training, evaluation, metrics."""

import logging
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from xgblora import agreement, group
from xgblora.adapters.adapters import Adapters, LayerSubset, attach
from xgblora.adapters.boosters import Ledger, start_from
from xgblora.adapters.files import TASK, require_lora
from xgblora.base import Base
from xgblora.base.packed import budgeted_file
from xgblora.config import RunConfig, banner, notes
from xgblora.data.batch import Example
from xgblora.errors import XgbloraError, naming
from xgblora.files import add_card, require_writable, verify, write_atomically, write_json
from xgblora.learn.base_score import add_base_score, require_same_options
from xgblora.learn.cost import Cost
from xgblora.learn.evaluate import Evaluation, right, score
from xgblora.learn.fitted.tail import Tail
from xgblora.learn.fitted.writers import last_writers, require_writers, residual_writers
from xgblora.learn.readout import fit_readout
from xgblora.randomness import Stream, generator
from xgblora.report import ANSWERS, METRICS, RunResult, write_answers
from xgblora.runs.answering import answered
from xgblora.runs.card import CardFacts, card
from xgblora.runs.environment import ENVIRONMENT, environment
from xgblora.runs.folder import ADAPTER, STATE, finished_result, folder_of, prepare_folder, require_ours
from xgblora.runs.sharing import of_this_process, require_same_inputs
from xgblora.runs.workspace import Scores, Workspace
from xgblora.tasks import Chat, Task, load_task, task_text
from xgblora.training.checkpoints import last_checkpoint
from xgblora.training.interruption import StopAtSignal, alone_in
from xgblora.training.record import EVAL_LOSS, CurveRecorder, PeakMemory
from xgblora.training.trainer import Trainer

logger = logging.getLogger(__name__)


def run(config: RunConfig, workspace: Workspace | None = None, watch: Sequence[TrainerCallback] = ()) -> RunResult:
    """Carry out one run, or resume it, or return the result it already has.

    In the main thread, Ctrl-C or SIGTERM lets the step in progress finish, saves a checkpoint and raises
    :class:`~xgblora.training.interruption.Interrupted`; a second one raises it at once.

    Processes that torchrun started, and that called :func:`xgblora.join`, share it: the first one writes the files.

    Args:
        config: What to run. Its folder is kept where it holds an unfinished run of the same configuration.
        workspace: Of a run with the same model and rows; saves loading them again.
        watch: Called as the trainer calls its callbacks.

    Returns:
        What stands in ``metrics.json``.

    Raises:
        XgbloraError: Anything that a user can mend, before work is wasted.
    """
    config = of_this_process(config)
    folder = folder_of(config)
    stop = StopAtSignal()
    require_ours(config)
    finished = agreement.of_first(lambda: finished_result(config))
    if finished is None:
        with stop.listening(), alone_in(folder):
            require_ours(config)  # again: who held the lock until now may have written something
            finished = agreement.of_first(lambda: finished_result(config))
            if finished is None:
                result = _run(config, workspace, [stop, *watch])
                return agreement.of_first(lambda: result)
    logger.info("%s is complete: nothing to do (--overwrite_output_dir starts again)", folder)
    return finished


def _run(config: RunConfig, workspace: Workspace | None, watch: Sequence[TrainerCallback]) -> RunResult:
    checkpoint = agreement.folder_of_first(_checkpoint(config) if group.first() else None)
    if config.init_adapter and config.trainer != "none":
        require_lora(Path(config.init_adapter))
    if config.result_file:
        require_writable(Path(config.result_file))
    workspace = workspace or Workspace(config)
    workspace.require_serves(config)
    require_same_inputs(workspace.base, lambda: workspace.contents(config))
    config.train_as_classification, config.num_dev = workspace.classification, workspace.num_dev
    config.boost_keep = workspace.keeps(config)
    set_seed(config.seed)
    work: dict[str, Any] = {}
    if config.trainer == "none":
        prepare_folder(config, workspace.contents(config))
        scores, work = _untrained(config, workspace)
    else:
        # First of all: these may refuse, and then nothing was written.
        constant = _base_score_rows(config, workspace) if checkpoint is None else []
        adapters = attach_for(config, workspace.base, workspace.classification)
        try:
            ledger = Ledger(adapters)
            ledger.task, ledger.task_text = config.task_name, task_text(workspace.task)
            if config.init_adapter:
                count = start_from(ledger, config.init_adapter)
                logger.info("Starting from %s: %d boosters", config.init_adapter, count)
                _compare_beginnings(Path(config.init_adapter), workspace.task)
            with adapters.first(0):
                kept = workspace.kept(config)
            if not kept:
                config.boost_keep = "none"
            prepare_folder(config, workspace.contents(config))
            with adapters.first(0):
                workspace.zero_shot(config)
                workspace.zero_shot_other_loss(config)
            work = _train(config, workspace, ledger, kept, constant, watch, checkpoint)
            scores = workspace.scores(config, "trained")
            work["other_text_loss"] = workspace.other_loss(config)
        finally:
            adapters.detach()
    result = RunResult(**_reached(config, workspace, scores) | work)
    if config.trainer != "none":
        facts = CardFacts(workspace.task, config.model_name, work["rank"], config.resolved(), result)
        add_card(folder_of(config) / ADAPTER, card(facts))
    write_json(folder_of(config) / ENVIRONMENT, environment(config.device))
    final, before = scores[0], workspace.zero_shot(config)[0]
    write_answers(answered(workspace.eval, before, final, workspace.tokenizer), folder_of(config) / ANSWERS)
    result.write(folder_of(config) / METRICS)  # last: it is what makes a run complete
    if config.result_file:
        result.write(Path(config.result_file))
    if (file := budgeted_file(workspace.base.model)) is not None:
        times = file.read_bytes / file.size
        logger.info("Weights read: %.2f GB, %.1f times the file (--memory_budget)", file.read_bytes / 1e9, times)
    return result


def _compare_beginnings(adapter: Path, task: Task | Chat) -> None:
    """Warn where an adapter was trained on prompts that begin in another way than those of this run."""
    if not (adapter / TASK).is_file() or isinstance(task, Chat):
        return
    trained = load_task(adapter / TASK, rows=False)
    if isinstance(trained, Task) and trained.beginning != task.beginning:
        logger.warning(
            "%s was trained on prompts that begin with %r, those of this run begin with %r: see --prompt_beginning",
            *(adapter, trained.beginning, task.beginning),
        )


def _untrained(config: RunConfig, workspace: Workspace) -> tuple[Scores, dict[str, Any]]:
    """How good the base is as it is, by the way that a configuration names, and what that took."""
    if config.readout != "words":
        memory, begun = PeakMemory(config.device), time.monotonic()
        what, asked = (None, None) if config.disable_tqdm else (f"fitting the {config.readout}", config.readout)
        readout = fit_readout(workspace.base, config.readout, workspace.train, workspace.dev, what)
        took = {"training_seconds": time.monotonic() - begun, "peak_memory_mb": memory.read()}
        cost = {f"forward_{name}": value for name, value in vars(readout.cost).items()}
        return (readout.evaluate(workspace.eval, asked), readout.on_dev), took | cost
    method = _method(config)
    if method == "in-context":
        return workspace.in_context(config), {}
    if method == "calibrated":
        return workspace.scores(config, method, calibrated=True), {}
    return workspace.zero_shot(config), {}


def _method(config: RunConfig) -> str:
    """What a result calls the method of a configuration."""
    if config.trainer != "none":
        return "boost" if config.recipe == "boost" else config.method
    if config.readout != "words":
        return config.readout
    if config.train_rows:
        return "in-context"
    return "calibrated" if config.calibrated else "zero-shot"


def attach_for(config: RunConfig, base: Base, classification: bool) -> Adapters:
    """Log what a configuration means, and attach the adapters that it asks for.

    ``classification``: as :func:`xgblora.runs.folder.classifies` says.

    Raises:
        XgbloraError: The base has no such layers, or the recipe cannot be trained on it.
    """
    for line in banner(config):
        logger.info(line)
    for note in notes(config):
        logger.info("Note: %s", note)
    boosted = config.fits_boosters
    count, targets = config.xgblora_layers, config.lora_target_modules
    if boosted and not count:
        # The upper half: what a prompt says is there (docs/experiments.md), and the lower half is computed only once.
        count = -(-len(base.layers) // 2) if classification else 1
    if boosted and not targets:
        of_text = not (classification or config.xgblora_layers)
        targets = last_writers(base) if of_text else residual_writers(base)
    adapters = attach(
        base,
        rank=config.rank,
        alpha=config.lora_alpha,
        target_modules=targets,
        seed=config.seed,
        xgblora=config.xgblora,
        layers=LayerSubset(count, config.layer_choice) if count else None,
    )
    logger.info("Initializing LoRA with: r=%d, alpha=%g, xgblora=%s", config.rank, config.lora_alpha, config.xgblora)
    if boosted:
        try:
            require_writers(adapters)
            Tail(base, list(adapters.layers.values()))
        except XgbloraError:
            adapters.detach()
            raise
    return adapters


def _base_score_rows(config: RunConfig, workspace: Workspace) -> list[Example]:
    """The training rows of ``--base_score``. Raises :class:`XgbloraError` where no constant can be fitted to them."""
    if not config.base_score or config.recipe != "classic":
        return []
    if not workspace.classification or (workspace.reward is not None and workspace.reward.writes):
        raise XgbloraError("--base_score makes options likelier, and here answers are written: leave it out")
    rows = workspace.train
    order = torch.randperm(len(rows), generator=generator(config.seed, Stream.BASE_SCORE)).tolist()
    chosen = [rows[place] for place in order[: config.base_score]]
    require_same_options(chosen)
    return chosen


def _checkpoint(config: RunConfig) -> Path | None:
    """Where training goes on; None where it begins. Raises :class:`XgbloraError` where that is no checkpoint."""
    asked, folder = config.resume_from_checkpoint, folder_of(config)
    if config.trainer == "none":
        return None
    if not asked or asked.lower() == "true":
        last = None if config.overwrite_output_dir else last_checkpoint(folder)
        if asked and last is None:
            raise XgbloraError(f"--resume_from_checkpoint: {folder} holds no checkpoint")
        return last
    if config.overwrite_output_dir and Path(asked).resolve().is_relative_to(folder.resolve()):
        raise XgbloraError(f"--overwrite_output_dir would remove {asked}, where --resume_from_checkpoint goes on")
    with naming("--resume_from_checkpoint"):
        verify(Path(asked))
    return Path(asked)


def _train(
    config: RunConfig,
    workspace: Workspace,
    ledger: Ledger,
    kept: Sequence[Example],
    constant: Sequence[Example],
    watch: Sequence[TrainerCallback],
    checkpoint: Path | None,
) -> dict[str, Any]:
    """Train, save the adapter, and say what it took."""
    folder, memory = folder_of(config), PeakMemory(config.device)
    cost, started = Cost(), time.perf_counter()
    if constant:
        worth = None if workspace.reward is None else workspace.reward.of_options
        cost = add_base_score(ledger, constant, worth, config.seed)
    begun = time.perf_counter() - started
    trainer = Trainer(
        model=workspace.base.model,
        args=config,
        adapters=ledger,
        train_dataset=workspace.train,
        eval_dataset=workspace.dev,
        objective=workspace.reward or workspace.loss,
    )
    if kept:
        trainer.method.keep(kept)
    recorder = CurveRecorder(folder, ledger)
    trainer.meter.cost, recorder.seconds = cost, begun
    trainer.add_callback(recorder)
    for callback in watch:
        trainer.add_callback(callback)
    if checkpoint is not None:
        logger.info("Resuming from %s", checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    peak = memory.read()
    if (folder / EVAL_LOSS).stat().st_size == 0:
        (folder / EVAL_LOSS).unlink()  # nothing was evaluated on the way
    trainer.save_adapters(folder / ADAPTER)
    write_atomically(folder / STATE, lambda file: trainer.state.save_to_json(str(file)))
    merges = [booster.step for booster in ledger.boosters if booster.step]  # 0: what the run started from
    return {
        "merges": len(merges),
        "merge_steps": merges,
        "boosters": len(ledger.boosters) + 1 if config.xgblora else 0,
        "rank": ledger.adapters.total_rank,
        "steps": trainer.state.global_step,
        "seconds_per_step": statistics.median(recorder.step_seconds) if recorder.step_seconds else None,
        "training_seconds": recorder.seconds,
        "peak_memory_mb": peak,
        "trainable_parameters": ledger.adapters.size,
    } | {f"forward_{name}": value for name, value in vars(trainer.cost).items()}


def _won_and_lost(rows: Sequence[Example], final: Evaluation, before: Evaluation) -> tuple[int, int]:
    """Rows that are right only after training, and only before it."""
    after, at_first = right(rows, final), right(rows, before)
    won = sum(now and not then for now, then in zip(after, at_first, strict=True))
    return won, sum(then and not now for now, then in zip(after, at_first, strict=True))


def _reached(config: RunConfig, workspace: Workspace, scores: tuple[Evaluation, Evaluation | None]) -> dict[str, Any]:
    """What a run reached, and on what."""
    (final, dev), (zero_shot, dev_before) = scores, workspace.zero_shot(config)
    reached: dict[str, Any] = {
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
        "zero_shot_accuracy": zero_shot.accuracy,
        "zero_shot_loss": zero_shot.loss,
        "accuracy": final.accuracy,
        "eval_loss": final.loss,
        "gain": final.accuracy - zero_shot.accuracy,
        **dict(zip(("rows_won", "rows_lost"), _won_and_lost(workspace.eval, final, zero_shot), strict=True)),
        "dev_accuracy": dev.accuracy if dev else None,
        "dev_loss": dev.loss if dev else None,
        "zero_shot_dev_loss": dev_before.loss if dev_before else None,
        "zero_shot_dev_accuracy": dev_before.accuracy if dev_before else None,
    }
    reached |= dict.fromkeys(("other_text_loss", "zero_shot_other_text_loss"), workspace.zero_shot_other_loss(config))
    evaluations = ("", workspace.eval, final), ("zero_shot_", workspace.eval, zero_shot), ("dev_", workspace.dev, dev)
    if (metric := workspace.task.metric) != "accuracy":
        reached["metric"] = metric
        reached |= {
            f"{name}score": evaluation and score(metric, rows, evaluation) for name, rows, evaluation in evaluations
        }
    if (reward := workspace.reward) is not None:
        for name, rows, evaluation in evaluations:
            reached[f"{name}reward"] = evaluation and reward.mean(rows, evaluation.predictions, evaluation.texts)
    return reached
