"""Scoring rows: loss, and accuracy of options or of written answers, in batches of equally many tokens."""

import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from xgblora.adapters.adapters import Adapters
from xgblora.base import Base
from xgblora.base.prefix import Prefix
from xgblora.data.batch import Batch, Example, shared_beginning, split_by_tokens
from xgblora.errors import XgbloraError, within_memory
from xgblora.group import gather, mine
from xgblora.learn.generation import exact_match_and_f1, rouge_l
from xgblora.learn.losses import AnswerLoss, OptionLoss
from xgblora.progress import Progress
from xgblora.tasks import Metric

STAGE_CACHE_BYTES = 10**9
"""For what lies below the layers that train, while one batch passes through all stages."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation says, with the predictions in the order of the rows."""

    accuracy: float
    """In [0, 1]; where answers are written, the share of exact matches."""
    loss: float
    """Mean over the rows, in nats."""
    predictions: list[int]
    """The option chosen for each row."""
    texts: list[str] | None = None
    """The answers, where the model writes them."""
    probabilities: list[Tensor] = field(default_factory=list, compare=False, repr=False)
    """Of the options (options,) of each row, float32: the softmax of their scores."""


def evaluate(
    model: PreTrainedModel | Base,
    examples: Sequence[Example],
    loss: AnswerLoss | None = None,
    batch_size: int = 8,
    progress: str | None = None,
    calibrated: bool = False,
) -> Evaluation:
    """Choose the best option of every example, or write its answer.

    Args:
        model: With its adapters. A :class:`Base` need not measure again whether it runs packed batches.
        examples: At least one.
        loss: Cross-entropy over the options (the default), or a :class:`TextLoss`, whose writer writes the answers.
            Tokens of the prompt never count.
        batch_size: A batch holds as many tokens as so many examples of average length.
        progress: Name of a progress bar.
        calibrated: Score an option by what the prompt adds to it, log p(option | prompt) - log p(option | null prompt)
            per token (Holtzman et al. 2021, arXiv 2104.08315): none is chosen for being a likely text by itself.

    Raises:
        XgbloraError: There are no examples, memory runs out, or calibrated scores lack a null prompt.

    Examples:
        >>> from xgblora.base.load import tiny_model
        >>> evaluate(tiny_model(), [Example([1, 2, 3], [[4], [5]], label=0)]).predictions
        [1]
    """
    return evaluate_together(Base.of(model), [examples], loss, batch_size, progress, calibrated)[0]


def evaluate_together(
    base: Base,
    sets: Sequence[Sequence[Example]],
    loss: AnswerLoss | None = None,
    batch_size: int = 8,
    progress: str | None = None,
    calibrated: bool = False,
) -> list[Evaluation]:
    """Evaluate several sets of examples, each with the numbers of :func:`evaluate`, in as few readings of the model.

    Args:
        base: With its adapters.
        sets: At least one example each.
        loss: As in :func:`evaluate`, and so are the others.

    Raises:
        XgbloraError: As in :func:`evaluate`.
    """
    scoring = _Scoring(base, loss or OptionLoss(), batch_size, progress)
    for examples in sets:
        _require_rows(examples)
    every = [example for examples in sets for example in examples]
    nulls = null_scores(base, every, batch_size) if calibrated else None
    return scoring.run(sets, [nullcontext], nulls=nulls)[0]


def evaluate_stages(
    adapters: Adapters,
    examples: Sequence[Example],
    loss: AnswerLoss | None = None,
    batch_size: int = 8,
    progress: str | None = None,
) -> list[Evaluation]:
    """Evaluate the base with its first 0, 1, ... boosters and with all (the last is the pair in training), in one pass.

    What lies below the lowest layer that trains is computed once for all stages, where no booster adds to it.

    Args:
        adapters: With their boosters.
        examples: At least one.
        loss: As in :func:`evaluate`.
        batch_size: As in :func:`evaluate`.
        progress: As in :func:`evaluate`.

    Example::

        [stage.accuracy for stage in evaluate_stages(ledger.adapters, rows)]
    """
    _require_rows(examples)
    stages = [partial(adapters.first, count) for count in range(adapters.boosters + 2)]
    scoring = _Scoring(adapters.base, loss or OptionLoss(), batch_size, progress)
    layer = adapters.lowest_layer if adapters.bare_below else None
    return [of_stage for (of_stage,) in scoring.run([examples], stages, layer)]


def _require_rows(examples: Sequence[Example]) -> None:
    if not examples:
        raise XgbloraError("there are no rows to evaluate")


@dataclass(frozen=True)
class _Scoring:
    """How examples are scored."""

    base: Base
    loss: AnswerLoss
    batch_size: int
    progress: str | None

    @torch.inference_mode()
    def run(
        self,
        sets: Sequence[Sequence[Example]],
        stages: Sequence[Callable[[], AbstractContextManager[None]]],
        layer: str | None = None,
        nulls: Mapping[Hashable, Tensor] | None = None,
    ) -> list[list[Evaluation]]:
        """For every stage, which is a context for forwards, an evaluation of each set of examples.

        Processes that share the run forward a batch each in turn. All stages compute the same below ``layer``.
        ``nulls``: to subtract from scores, by :func:`_null`.
        """
        base, several = self.base, len(stages) > 1
        results = [[_Scores.of(examples) for examples in sets] for _ in stages]
        prefix = Prefix(base.model, STAGE_CACHE_BYTES) if several else None
        every = [(number, numbers) for number, rows in enumerate(sets) for numbers in by_tokens(rows, self.batch_size)]
        groups = [every[place] for place in mine(len(every))]
        scored: list[list[Tensor]] = [[] for _ in stages]

        def batch_of(number: int, chosen: list[int]) -> Batch:
            rows = [replace(sets[number][i], score_prompt=False) for i in chosen]
            with _within_memory(rows):
                return base.batch(rows, share=not several).filled()

        normalised = None if nulls is None else True
        total = sum(len(chosen) for _, chosen in groups)
        with base.without_gradients(), Progress(total, self.progress) as progress:
            for wave in base.waves(itertools.starmap(batch_of, groups)):
                rows = [row for batch in wave for row in batch.examples]
                for stage, scores_of in zip(stages, scored, strict=True):
                    with _within_memory(rows), stage(), base.skipping(prefix, layer):
                        scores_of.extend(self.loss.all_scores(base, wave, normalised))
                if prefix is not None:
                    prefix.clear()
                progress.add(len(rows))
        shapes = [(len(chosen), max(len(sets[number][i].options) for i in chosen)) for number, chosen in every]
        for of_mine, of_stage in zip(scored, results, strict=True):
            for (number, chosen), of_batch in zip(every, gather(of_mine, shapes, base.device), strict=True):
                scores = of_batch
                if nulls is not None:
                    of_rows = [nulls[_null(sets[number][i])] for i in chosen]
                    scores = scores - nn.utils.rnn.pad_sequence(of_rows, batch_first=True)
                label = torch.tensor([sets[number][i].label for i in chosen], device=base.device)
                of_stage[number].add(chosen, scores, self.loss.of_scores(scores, label))
        writer = self.loss.writer
        if writer is None:
            return [[scores.evaluation() for scores in of_stage] for of_stage in results]
        evaluations = []
        for stage, of_stage in zip(stages, results, strict=True):
            with stage():
                told = self.progress and f"{self.progress}, writing"
                texts = [writer.write(base, examples, told) for examples in sets]
            evaluations.append([scores.evaluation(written) for scores, written in zip(of_stage, texts, strict=True)])
        return evaluations


@dataclass(frozen=True)
class _Scores:
    """What becomes known of some examples, a batch at a time."""

    examples: Sequence[Example]
    predictions: list[int]
    probabilities: list[Tensor]
    losses: list[Tensor]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "_Scores":
        return cls(examples, [0] * len(examples), [torch.empty(0)] * len(examples), [])

    def add(self, group: Sequence[int], scores: Tensor, losses: Tensor) -> None:
        """Take the scores (examples, options) and losses (examples,) of the examples with the numbers ``group``."""
        self.losses.append(losses)
        likely = scores.softmax(1).float().cpu()
        for i, prediction, row in zip(group, scores.argmax(1).tolist(), likely, strict=True):
            self.predictions[i] = prediction
            self.probabilities[i] = row[: len(self.examples[i].options)]

    def evaluation(self, texts: list[str] | None = None) -> Evaluation:
        """What they come to, where the model wrote ``texts``."""
        loss = torch.cat(self.losses).double().mean().item()
        if texts is not None:
            return Evaluation(exact_match_and_f1(self.examples, texts)[0], loss, self.predictions, texts)
        right = accuracy(self.examples, self.predictions)
        return Evaluation(right, loss, self.predictions, probabilities=self.probabilities)


def _within_memory(rows: Sequence[Example]) -> AbstractContextManager[None]:
    return within_memory(
        f"evaluating {len(rows)} examples of {sum(row.tokens for row in rows):,} tokens",
        "lower --per_device_eval_batch_size or --max_length, or load the base in bfloat16",
    )


@torch.inference_mode()
def null_scores(base: Base, examples: Sequence[Example], batch_size: int) -> dict[Hashable, Tensor]:
    """Mean token log-probabilities (options,) of every example's options after its null prompt, by :func:`_null`.

    Raises :class:`XgbloraError` where an example has no null prompt.
    """
    if not all(example.null_prompt for example in examples):
        raise XgbloraError("calibrated scores need a prompt that asks nothing: give the task a null_prompt")
    bare = {_null(e): Example(e.null_prompt, e.options, 0) for e in examples}
    keys, rows = list(bare), list(bare.values())
    scores_of: dict[Hashable, Tensor] = {}
    groups = list(by_tokens(rows, batch_size))
    batches = (base.batch([rows[i] for i in chosen]).filled() for chosen in groups)
    for chosen, group in zip(groups, OptionLoss().all_scores(base, batches, normalised=True), strict=True):
        for i, scores in zip(chosen, group, strict=True):
            scores_of[keys[i]] = scores[: len(rows[i].options)]
    return scores_of


def _null(example: Example) -> Hashable:
    """What an example's scores without its prompt depend on."""
    return example.null_prompt, tuple(map(tuple, example.options))


def by_tokens(examples: Sequence[Example], batch_size: int) -> Iterator[list[int]]:
    """Numbers of examples, shortest first, in batches of at most ``batch_size`` times the mean token count.

    What all prompts begin with is not counted.
    """
    shared = shared_beginning(examples)
    room = batch_size * (sum(e.tokens for e in examples) / len(examples) - shared)
    order = iter(sorted(range(len(examples)), key=lambda number: examples[number].tokens))
    for group in split_by_tokens(sorted(examples, key=lambda e: e.tokens), room, shared):
        yield list(itertools.islice(order, len(group)))


def score(metric: Metric, examples: Sequence[Example], evaluation: Evaluation) -> float:
    """A task's metric of what a model chose or wrote, in [0, 1]."""
    from torchmetrics.functional.classification import binary_f1_score, multiclass_f1_score  # slow to import

    if metric == "accuracy":
        return evaluation.accuracy
    if evaluation.texts is not None:
        if metric == "rouge_l":
            return rouge_l(examples, evaluation.texts)
        return exact_match_and_f1(examples, evaluation.texts)[1]
    chosen, labels = torch.tensor(evaluation.predictions), torch.tensor([example.label for example in examples])
    if metric == "macro_f1":
        options = max(len(example.options) for example in examples)
        return float(multiclass_f1_score(chosen, labels, num_classes=options, average="macro"))
    return float(binary_f1_score(chosen, labels))


def accuracy(examples: Sequence[Example], predictions: Sequence[int]) -> float:
    """Share of examples whose chosen option is a correct one."""
    return sum(_correct(e, p) for e, p in zip(examples, predictions, strict=True)) / len(examples)


def right(examples: Sequence[Example], evaluation: Evaluation) -> list[bool]:
    """Whether each example's chosen option is a correct one, or its written answer an exact match."""
    if evaluation.texts is None:
        return [_correct(e, p) for e, p in zip(examples, evaluation.predictions, strict=True)]
    return [exact_match_and_f1([e], [text])[0] == 1 for e, text in zip(examples, evaluation.texts, strict=True)]


def _correct(example: Example, option: int) -> bool:
    return option == example.label or option in example.also_correct
