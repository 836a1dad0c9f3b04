"""Rows to token ids: prompt and options, within the length that fits."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from xgblora.data.batch import Example
from xgblora.errors import XgbloraError, naming
from xgblora.tasks.chat import Chat
from xgblora.tasks.task import Question, Task

logger = logging.getLogger(__name__)

MANY = 32
"""So many options of a question are encoded once for all prompts that end alike."""

SEAM = 8
"""Characters that such prompts have in common at their ends."""

OPENING = "\n"
"""In front of prompts, of what was tried the best single token (docs/experiments.md, section 7)."""

BETWEEN = "\n\n"
"""Between demonstrations, and between the last one and the prompt."""


def encode(
    task: Task | Chat,
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Tokenizer,
    max_length: int,
    score_prompt: bool = False,
    answered: bool = True,
    demonstrations: Iterable[Mapping[str, Any]] = (),
) -> list[Example]:
    """Tokenise rows of a task.

    Args:
        task: How a row becomes a question.
        rows: With the columns that the task needs.
        tokenizer: The model's.
        max_length: Tokens of prompt and longest option together, at most. Longer prompts lose tokens on the left
            (special first tokens stay), and one warning counts them.
        score_prompt: Count the prompt's own tokens in losses, too.
        answered: Whether the rows say their answers; without, they get label 0.
        demonstrations: Rows that stand, answered, in front of each prompt, for learning in context (Brown et al. 2020);
            as many of the first of them as fit with it, an empty line after each.

    Returns:
        An example for each row; of conversations one for each of the assistant's turns.

    Raises:
        XgbloraError: A row makes no question, or its options have no tokens, are equal, or leave no room for a prompt.
            The message names the row, counted from 1.

    Example::

        task = get_task("RottenTomatoes")
        encode(task, [{"text": "a warm film", "label": 1}], tokenizer, max_length=256)
    """
    if isinstance(task, Chat):
        if list(demonstrations):
            raise XgbloraError(f"{task.name} is made of conversations, which take no demonstrations: --num_train 0")
        return task.encode(rows, tokenizer, max_length, score_prompt, answered)
    rows = list(rows)
    questions = _questions(task, rows, answered)
    if not questions:
        return []
    if task.generation:
        max_length -= task.generation.max_new_tokens
    first = len(tokenizer(task.beginning)["input_ids"])  # what opens every text (BOS), and every prompt
    if shown := [question.answered + BETWEEN for question in _questions(task, demonstrations, True)]:
        questions = _in_context(questions, shown, tokenizer, max_length - first)
    questions = [_behind_beginning(task.beginning, question) for question in questions]
    prompts = tokenizer([question.prompt for question in questions])["input_ids"]
    options = _options(questions, prompts, tokenizer)
    nulls = {text: tuple(tokenizer(text)["input_ids"]) if text else () for text in {q.null_prompt for q in questions}}
    cut = 0
    examples = []
    for number, (row, question, prompt, ids) in enumerate(zip(rows, questions, prompts, options, strict=True), start=1):
        with naming(f"{task.name}, row {number}"):
            kept = _fitting(prompt, question, ids, max_length, first)
        cut += len(kept) < len(prompt)
        label, *others = question.correct or (0,)
        null = nulls[question.null_prompt]
        examples.append(Example(kept, ids, label, score_prompt, tuple(others), question.right, null, row))
    if cut:
        room = f"{max_length} tokens with their options"
        logger.warning("%d of %d prompts were longer than %s and lost their beginning", cut, len(examples), room)
    return examples


def begun(task: Task | Chat, beginning: str, tokenizer: Tokenizer) -> Task | Chat:
    """A task whose prompts begin with a token that says nothing, where attention goes that has nowhere to go.

    Without one that is a word of the text, which costs points (Xiao et al. 2023, arXiv 2309.17453).

    Args:
        task: As it is stated. Conversations begin as their template says.
        beginning: "none": as stated. "auto": as stated where that, or the tokenizer, has a beginning, else
            OPENING. Another text: that one.
        tokenizer: The model's.

    Raises:
        XgbloraError: A text of one's own is to open conversations.
    """
    if isinstance(task, Chat):
        if beginning not in ("none", "auto"):
            raise XgbloraError(f"{task.name} is made of conversations, which begin as the model's template says")
        return task
    if beginning == "none" or (beginning == "auto" and (task.beginning or tokenizer("")["input_ids"])):
        return task
    if beginning == "auto":
        logger.info("A line break begins every prompt, since the tokenizer adds nothing (--prompt_beginning auto)")
        beginning = OPENING
    return replace(task, beginning=beginning)


def _behind_beginning(beginning: str, question: Question) -> Question:
    null = question.null_prompt and beginning + question.null_prompt
    return replace(question, prompt=beginning + question.prompt, null_prompt=null)


def _questions(task: Task, rows: Iterable[Mapping[str, Any]], answered: bool) -> list[Question]:
    questions = []
    for number, row in enumerate(rows, start=1):
        with naming(f"{task.name}, row {number}"):
            questions.append(task.question(row, answered))
    return questions


def _in_context(questions: list[Question], shown: list[str], tokenizer: Tokenizer, max_length: int) -> list[Question]:
    """Each question after as many of the texts ``shown`` as fit, with a warning where that is not all of them."""
    longest = [question.prompt + max(question.options, key=len, default="") for question in questions]
    ends = list(accumulate(map(len, tokenizer(shown)["input_ids"]), initial=0))
    prompted, least = [], len(shown)
    for question, ids in zip(questions, tokenizer(longest)["input_ids"], strict=True):
        count = max(number for number, end in enumerate(ends) if not number or end + len(ids) <= max_length)
        least = min(least, count)
        prompted.append(replace(question, prompt="".join(shown[:count]) + question.prompt))
    if least < len(shown):
        logger.warning(
            "not all of the %d demonstrations fit within %d tokens: prompts have %d or more of them",
            *(len(shown), max_length, least),
        )
    return prompted


def _options(questions: list[Question], prompts: list[list[int]], tokenizer: Tokenizer) -> list[list[list[int]]]:
    """Token ids of every question's options.

    They are taken from the encoding of prompt + option, where a tokenizer may treat the seam in its own way; alone
    where the prompt's own tokens come out otherwise there. Prompts that end alike share the tokens of an option: each
    of them is encoded whole with its first option only, to see that they do.
    """
    asked = list(zip(questions, prompts, strict=True))
    few = iter(_behind([(q.prompt, ids, q.options) for q, ids in asked if len(q.options) < MANY], tokenizer))
    known: dict[str, dict[str, list[int]]] = {}
    tokens = []
    for question, prompt in asked:
        if len(question.options) < MANY:
            tokens.append(next(few))
            continue
        shared = known.setdefault(question.prompt[-SEAM:], {})
        new = [option for option in question.options if option not in shared] or [question.options[0]]
        (fresh,) = _behind([(question.prompt, prompt, new)], tokenizer)
        if new[0] in shared and fresh != [shared[new[0]]]:  # it comes out otherwise behind this prompt
            tokens += _behind([(question.prompt, prompt, question.options)], tokenizer)
            continue
        shared.update(zip(new, fresh, strict=True))
        tokens.append([shared[option] for option in question.options])
    return tokens


def _behind(parts: Sequence[tuple[str, list[int], Sequence[str]]], tokenizer: Tokenizer) -> list[list[list[int]]]:
    """Tokens of the options of some prompts, which are given as text and as tokens."""
    texts = [prompt + option for prompt, _, options in parts for option in options]
    if not texts:
        return [[] for _ in parts]
    alone = sorted({option for _, _, options in parts for option in options})
    by_itself = dict(zip(alone, tokenizer(alone, add_special_tokens=False)["input_ids"], strict=True))
    joined = iter(tokenizer(texts)["input_ids"])
    return [
        [
            ids[len(prompt) :] if ids[: len(prompt)] == prompt else by_itself[option]
            for option, ids in zip(options, joined, strict=False)
        ]
        for _, prompt, options in parts
    ]


def _fitting(prompt: list[int], question: Question, options: list[list[int]], max_length: int, first: int) -> list[int]:
    """The prompt, or its end where it is too long for its options; the ``first`` tokens stay."""
    places: dict[tuple[int, ...], str] = {}
    for option, ids in zip(question.options, options, strict=True):
        if not ids:
            raise XgbloraError(f"the option {option!r} has no tokens in this model's vocabulary")
        if (other := places.setdefault(tuple(ids), option)) != option:
            raise XgbloraError(f"the options {other!r} and {option!r} have equal tokens")
    longest = max((len(option) for option in options), default=0)
    room = max_length - longest
    if room < 1 + first:
        raise XgbloraError(
            f"the options need {longest} tokens, which leaves no room for a prompt within {max_length}: raise "
            "--max_length or take a model with a longer context"
        )
    return prompt if len(prompt) <= room else [*prompt[:first], *prompt[len(prompt) - room + first :]]
