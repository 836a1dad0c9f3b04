"""What runs share: the base model, the encoded rows, and the scores before any training."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset

from xgblora.base import Base
from xgblora.base.load import load_configured
from xgblora.config import RunConfig, too_few_rows
from xgblora.data.batch import Example
from xgblora.errors import XgbloraError, naming, one_line
from xgblora.learn.evaluate import Evaluation, evaluate_together
from xgblora.learn.forgetting import OWN_TEXTS, encode_texts, own_texts, read_texts, token_loss
from xgblora.learn.generation import Writer
from xgblora.learn.losses import AnswerLoss, OptionLoss, TextLoss
from xgblora.learn.rewards import Reward, RewardFunction, load_reward
from xgblora.randomness import Stream, generator
from xgblora.runs.folder import classifies, contents, task_of
from xgblora.tasks import begun, encode, load_splits, sample

logger = logging.getLogger(__name__)

Scores = tuple[Evaluation, Evaluation | None]
"""Of the evaluation rows and of the dev rows; None where there are none."""


def hide_bars(config: RunConfig) -> None:
    """With ``--disable_tqdm``, hide the bars of the libraries that read data and models, too."""
    if config.disable_tqdm:
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()


class Workspace:
    """The base and the rows of a run, loaded once and shared by runs that want the same.

    Raises:
        XgbloraError: Model, data, task or reward cannot be had, or do not go together. Whatever can be refused
            without the model is refused before it is loaded.

    Example::

        workspace = Workspace(config)
        run(config, workspace)
    """

    def __init__(self, config: RunConfig) -> None:
        hide_bars(config)
        self.task = task_of(config)
        self._contents = contents(config)
        self.num_train = config.train_rows
        self.num_dev = self.task.num_dev if config.num_dev is None else config.num_dev
        self.classification = classifies(config, self.task)
        if self.classification and self.task.generation:
            raise XgbloraError(f"{self.task.name} has no options to classify: leave out --train_as_classification")
        function = _reward_function(config, writes=self.task.generation is not None)
        texts = _texts("other_text", config.other_text)
        _texts("boost_keep", config.keep_file)  # what it refuses, it refuses before a model is read
        splits = load_splits(self.task, config.data_dir)
        self._samples = sample(splits, self.num_train, self.num_dev, config.num_eval, config.train_set_seed)
        self.eval_split = self._samples.eval_split
        if message := too_few_rows(config, len(self._samples.train)):
            raise XgbloraError(message)

        model, self.tokenizer = load_configured(config)
        self.task = begun(self.task, config.beginning, self.tokenizer)
        self.base = Base(model.to(config.device))
        writer = Writer(self.tokenizer, self.task.generation) if self.task.generation else None
        self.loss: AnswerLoss = OptionLoss() if self.classification else TextLoss(writer)
        self.reward = None
        if function is not None:
            assert config.reward_completions is not None  # settled with the objective
            self.reward = Reward(function, self.tokenizer, writer, config.reward_completions, config.reward_samples)
        self._length = min(config.max_length, self.base.context_length or config.max_length)
        self._score_prompt = not (self.classification or config.only_train_option or config.objective == "reward")
        self.train, self.dev, self.eval = (
            self._encode(rows) for rows in (self._samples.train, self._samples.dev, self._samples.eval)
        )
        self.other = self._encode_texts("other_text", texts)
        """Other text, that nothing is trained on."""
        self._zero_shot: Scores | None = None
        self._zero_shot_other: float | None = None

    def _encode(self, rows: Dataset, demonstrations: Sequence[Any] = ()) -> list[Example]:
        task, length, scored = self.task, self._length, self._score_prompt
        examples = encode(task, rows, self.tokenizer, length, scored, demonstrations=demonstrations)
        self.base.require_known(examples)
        return examples

    def contents(self, config: RunConfig) -> dict[str, str]:
        """SHA-256 of the files of a run, as they were when they were read here."""
        return {what: self._contents.get(what, digest) for what, digest in contents(config).items()}

    def keeps(self, config: RunConfig) -> str:
        """What ``--boost_keep`` of a run comes to."""
        if config.recipe != "boost":
            return "none"
        # A base that is read again for every word takes too long to write.
        return config.boost_keep or ("none" if self.classification or self.base.reread else "own")

    def kept(self, config: RunConfig) -> list[Example]:
        """Text that boosters of a run are kept off, with the base as it is.

        Raises:
            XgbloraError: A file holds none; or the model cannot write, and was asked to.
        """
        if self.keeps(config) == "own":
            logger.info("Writing %d texts, which boosters are to change little (--boost_keep own)", OWN_TEXTS)
            try:
                return own_texts(self.base, self.tokenizer, config.seed)
            except Exception as error:  # transformers writes for many architectures, in as many ways
                message = f"{type(self.base.model).__name__} cannot write text by itself ({one_line(error)})"
                if config.given("boost_keep"):
                    raise XgbloraError(f"--boost_keep own: {message}: give a file of text, or none") from error
                logger.warning("%s: boosters are kept off no other text (--boost_keep)", message)
                return []
        return self._encode_texts("boost_keep", _texts("boost_keep", config.keep_file))

    def _encode_texts(self, flag: str, texts: Sequence[str]) -> list[Example]:
        with naming(f"--{flag}"):
            rows = encode_texts(texts, self.tokenizer, self._length) if texts else []
        self.base.require_known(rows)
        return rows

    def require_serves(self, config: RunConfig) -> None:
        """Raise :class:`XgbloraError` where a run wants other training rows than these."""
        wanted = config.train_rows
        if wanted > self.num_train or (config.trainer != "none" and wanted < self.num_train):
            raise XgbloraError(
                f"a workspace of --num_train {self.num_train} does not serve a run of --num_train {wanted}"
            )

    def scores(
        self,
        config: RunConfig,
        what: str,
        rows: tuple[Sequence[Example], Sequence[Example]] | None = None,
        calibrated: bool = False,
    ) -> Scores:
        """Score the model as it is now.

        Args:
            config: Says how many rows at once.
            what: Name of the progress bar.
            rows: In place of the evaluation rows and the dev rows.
            calibrated: As :func:`evaluate` takes it.
        """
        eval_rows, dev_rows = rows or (self.eval, self.dev)
        named = f"{len(eval_rows)} {self.eval_split}" + (f" and {len(dev_rows)} dev rows" if dev_rows else " rows")
        evaluation, *dev = evaluate_together(
            self.base,
            [eval_rows, dev_rows] if dev_rows else [eval_rows],
            self.loss,
            config.per_device_eval_batch_size,
            None if config.disable_tqdm else f"{what}, {named}",
            calibrated,
        )
        return evaluation, dev[0] if dev else None

    def in_context(self, config: RunConfig) -> Scores:
        """Score with as many training rows as the run has, answered, in front of every prompt.

        Its seed draws them, and their order.
        """
        rows = self._samples.train
        drawn = torch.randperm(len(rows), generator=generator(config.seed, Stream.DEMONSTRATIONS)).tolist()
        shown = [rows[number] for number in drawn[: config.train_rows]]
        asked = self._encode(self._samples.eval, shown), self._encode(self._samples.dev, shown)
        return self.scores(config, f"{len(shown)} in context", asked, config.calibrated)

    def zero_shot(self, config: RunConfig) -> Scores:
        """Score before any training, once, not calibrated. Fresh adapters (B = 0) change no bit of it."""
        if self._zero_shot is None:
            self._zero_shot = self.scores(config, "zero-shot")
        return self._zero_shot

    def other_loss(self, config: RunConfig) -> float | None:
        """The loss of other text, of the model as it is; None where there is none."""
        return token_loss(self.base, self.other, config.per_device_eval_batch_size) if self.other else None

    def zero_shot_other_loss(self, config: RunConfig) -> float | None:
        """The same before any training, once."""
        if self._zero_shot_other is None:
            self._zero_shot_other = self.other_loss(config)
        return self._zero_shot_other


def _texts(flag: str, file: str | Path | None) -> list[str]:
    """What the file of a flag holds; nothing where there is none."""
    with naming(f"--{flag}"):
        return read_texts(Path(file)) if file else []


def _reward_function(config: RunConfig, writes: bool) -> RewardFunction | None:
    """The function that ``--reward`` names, if any."""
    if config.reward is None:
        return None
    if writes and config.trainer == "zo" and config.recipe == "classic" and config.reward_completions == "expected":
        raise XgbloraError(
            "--reward_completions expected would compare answers drawn twice, once for each probe, where they are "
            "written: take greedy, or --trainer regular"
        )
    return load_reward(config.reward, config.reward_length_penalty)
