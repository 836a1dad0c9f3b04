"""Rows to token ids: prompt and options, within the length that fits."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from xgblora.errors import XgbloraError
from xgblora.packing import Example
from xgblora.tasks.task import Task

logger = logging.getLogger(__name__)


def encode(
    task: Task,
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Tokenizer,
    max_length: int,
    score_prompt: bool = False,
) -> list[Example]:
    """Tokenise rows of ``task`` to examples of at most ``max_length`` tokens, prompt and longest option together.

    Longer prompts lose tokens on the left (special first tokens stay), and one warning counts them. Raises
    :class:`XgbloraError` for options that have no tokens, that are equal, or that leave no room for a prompt.
    """
    rows = list(rows)
    if not rows:
        return []
    prompts = [task.render(row) for row in rows]
    # Options are taken from the encoding of prompt + option, where a tokenizer may treat the seam in its own way.
    encoded = tokenizer(prompts)["input_ids"]
    joined = tokenizer([prompts[0] + option for option in task.options])["input_ids"]
    seam = len(encoded[0])
    options = [
        ids[seam:] if ids[:seam] == encoded[0] else tokenizer(option, add_special_tokens=False)["input_ids"]
        for option, ids in zip(task.options, joined, strict=True)
    ]
    _check_options(task, options)
    room = max_length - max(len(option) for option in options)
    first = len(tokenizer("")["input_ids"])  # special tokens that open every text (BOS)
    if room < 1 + first:
        raise XgbloraError(
            f"the options of {task.name} need {max_length - room} tokens, which leaves no room for a prompt within "
            f"{max_length}: raise --max_length or take a model with a longer context"
        )
    cut = 0
    examples = []
    for row, ids in zip(rows, encoded, strict=True):
        prompt = ids
        if len(ids) > room:
            prompt = [*ids[:first], *ids[len(ids) - room + first :]]
            cut += 1
        examples.append(Example(prompt, options, int(row[task.label_column]), score_prompt))
    if cut:
        logger.warning("%d of %d prompts were longer than %d tokens and lost their beginning", cut, len(rows), room)
    return examples


def _check_options(task: Task, options: list[list[int]]) -> None:
    for option, ids in zip(task.options, options, strict=True):
        if not ids:
            raise XgbloraError(f"the option {option!r} of {task.name} has no tokens in this model's vocabulary")
    for i, one in enumerate(options):
        for j in range(i):
            if one == options[j]:
                raise XgbloraError(
                    f"the options {task.options[j]!r} and {task.options[i]!r} of {task.name} have equal tokens"
                )
