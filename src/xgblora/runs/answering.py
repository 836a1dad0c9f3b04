"""What the base and the trained model answer to every row of an evaluation, as text."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from xgblora.data.batch import Example
from xgblora.learn.evaluate import Evaluation, right
from xgblora.report import Answer, AnsweredRow


def answered(rows: Sequence[Example], before: Evaluation, after: Evaluation, tokenizer: Tokenizer) -> list[AnsweredRow]:
    """Each row with the answers of two evaluations of it.

    Args:
        rows: That were evaluated.
        before: By the base.
        after: By the trained model, or by whatever the run is about.
        tokenizer: Of the base.
    """
    answers = [answers_of(rows, evaluation, tokenizer) for evaluation in (before, after)]
    return [
        AnsweredRow(tokenizer.decode(row.prompt, skip_special_tokens=True), row.references, base, trained)
        for row, base, trained in zip(rows, *answers, strict=True)
    ]


def answers_of(rows: Sequence[Example], evaluation: Evaluation, tokenizer: Tokenizer) -> list[Answer]:
    """What an evaluation says of each row that was evaluated."""
    hits = right(rows, evaluation)
    if evaluation.texts is not None:
        return [Answer(text, hit) for text, hit in zip(evaluation.texts, hits, strict=True)]
    likely: Sequence[Tensor | None] = evaluation.probabilities or [None] * len(rows)
    return [
        Answer(
            tokenizer.decode(row.options[chosen]).strip(),
            hit,
            None if sure is None else round(float(sure[chosen]), 6),
            None if sure is None else round(float(sure[row.label]), 6),
        )
        for row, chosen, hit, sure in zip(rows, evaluation.predictions, hits, likely, strict=True)
    ]
