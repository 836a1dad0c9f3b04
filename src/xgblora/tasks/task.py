"""What a task is: where its rows come from, how a row becomes a question, and which answers are right."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from xgblora.errors import XgbloraError
from xgblora.tasks.sandbox import printed, shown
from xgblora.tasks.templates import Compiled, columns_of, columns_of_expression, columns_seen

SPLITS = ("train", "validation", "test")
"""Names of data files in a ``--data_dir``, without their ending."""

Metric = Literal["accuracy", "f1", "macro_f1", "rouge_l"]


@dataclass(frozen=True)
class Hub:
    """A data set of the Hugging Face hub, and what its splits with labels are called there."""

    path: str
    name: str | None
    revision: str | None
    splits: Mapping[str, str]


Source = Hub | Mapping[str, Path] | Callable[[], Mapping[str, Dataset]]
"""Where rows come from: the hub, a file for each split, or a function."""


@dataclass(frozen=True)
class Generation:
    """How an answer is written: greedily, until ``stop``, the model's own end of a text or ``max_new_tokens``."""

    max_new_tokens: int = 50
    stop: str = "\n"


@dataclass(frozen=True)
class Question:
    """One row as a model sees it.

    ``options``: the candidate answers as they continue ``prompt``, each with the space or line break before it; where
    answers are written, the first right one and what ends it. ``correct``: places of the right ones among them, the one
    to train on first. ``references``: all right answers where they are written. ``null_prompt``: what stands in the
    prompt's place where options are weighed by themselves.
    """

    prompt: str
    options: tuple[str, ...]
    correct: tuple[int, ...]
    references: tuple[str, ...] = ()
    null_prompt: str = ""

    @property
    def right(self) -> tuple[str, ...]:
        """The texts of all right answers."""
        return self.references or tuple(self.options[place].strip() for place in self.correct)

    @property
    def answered(self) -> str:
        """The prompt with its first correct option."""
        return (self.prompt + self.options[self.correct[0]]).rstrip()


@dataclass(frozen=True)
class Task:
    """A task by prompt: the model chooses one of several options as the prompt's continuation, or writes one."""

    name: str
    prompt: str
    """Jinja template over the row's columns, e.g. ``{{ sentence | trim }} It was``."""
    options: tuple[str, ...] | str
    """Jinja templates of the options; or an expression whose value is a row's list of them, e.g. its column; none where
    answers are written."""
    answer: str
    """Jinja expression: the correct option's number, or its text, or a list of either where several are correct."""
    source: Source
    """The task's own splits: train, and validation or test with labels."""
    labels: tuple[str, ...] = ()
    """What ``answer`` gives for each option in turn, where that is neither its number nor its text."""
    option: str = "{{ option }}"
    """Jinja template around each option."""
    metric: Metric = "accuracy"
    """What is reported beside accuracy. f1: of the last of two options, or of the words of written answers; macro_f1:
    the mean over options; rouge_l: of the longest common subsequence of written answers' words."""
    classification: bool = True
    """Trains by default on the cross-entropy over options, else as a language model on the correct one."""
    num_dev: int = 500
    """Development rows by default."""
    generation: Generation | None = None
    """How answers are written, where they are."""
    beginning: str = ""
    """What stands in front of every prompt, as it is: no template."""
    null_prompt: str = ""
    """Jinja template of a prompt that asks nothing, for calibrated scores (Holtzman et al. 2021, arXiv 2104.08315)."""

    def __post_init__(self) -> None:
        """Raise :class:`XgbloraError` where templates or options cannot work, whatever the rows are."""
        _ = self._compiled
        if self.generation is not None:
            if self.options or self.labels or self.classification or self.metric == "macro_f1":
                raise XgbloraError(
                    f"{self.name} writes its answers: it has no options or labels, trains as a language model and is "
                    "measured by accuracy, f1 or rouge_l"
                )
            return
        if self.metric == "rouge_l":
            raise XgbloraError(f"metric rouge_l is for written answers: {self.name} has options")
        if isinstance(self.options, tuple) and len(self.options) < 2:
            raise XgbloraError(f"a question needs at least 2 options, got {len(self.options)}")
        if self.metric != "accuracy" and isinstance(self.options, str):
            raise XgbloraError(f"metric {self.metric} is for options that are the same for all rows: use accuracy")
        if self.metric == "f1" and len(self.options) != 2:
            raise XgbloraError(f"metric f1 is for 2 options, {self.name} has {len(self.options)}: use macro_f1")

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns of a row that its prompt, options and answer are made of."""
        return tuple(sorted({*self.asking, *columns_of_expression(self.answer)}))

    @cached_property
    def asking(self) -> tuple[str, ...]:
        """Those of the prompt and the options."""
        columns = set().union(*map(columns_of, (self.prompt, self.null_prompt, self.option))) - {"option"}
        if isinstance(self.options, str):
            return tuple(sorted(columns | columns_of_expression(self.options)))
        return tuple(sorted(columns.union(*map(columns_of, self.options))))

    @property
    def has_same_options(self) -> bool:
        """Whether every row has the same options."""
        return isinstance(self.options, tuple) and bool(self.options) and not any(map(columns_of, self.options))

    def asked(self, row: Mapping[str, Any] | str) -> Mapping[str, Any]:
        """``row``, or the row that a text stands for."""
        if isinstance(row, Mapping):
            return row
        if not isinstance(row, str):
            raise XgbloraError(f"a row is a text or a mapping from columns to values, not {shown(row)}")
        if len(self.asking) != 1:
            raise XgbloraError(f"{self.name} asks by several columns ({', '.join(self.asking)}): give rows")
        return dict.fromkeys(self.asking, row)

    @cached_property
    def _compiled(self) -> dict[str, Callable[[Mapping[str, Any]], Any]]:
        """Each template and expression as a function of a row's columns. Raises :class:`XgbloraError` for bad ones."""
        compiled: dict[str, Callable[[Mapping[str, Any]], Any]] = {
            field: Compiled(field, self.name, text)
            for field, text in (("prompt", self.prompt), ("option", self.option), ("null_prompt", self.null_prompt))
        }
        compiled["answer"] = Compiled("answer", self.name, self.answer, expression=True)
        if isinstance(self.options, str):
            compiled["options"] = Compiled("options", self.name, self.options, expression=True)
        else:
            templates = [Compiled("options", self.name, text) for text in self.options]
            compiled["options"] = lambda columns: [template(columns) for template in templates]
            if self.has_same_options:
                fixed = cache(lambda: tuple(template({}) for template in templates))
                compiled["options"] = lambda columns: fixed()
        if columns_of(self.option) == {"option"}:
            made = compiled["option"]
            around = lru_cache(maxsize=100_000)(lambda text: made({"option": text}))
            compiled["option"] = lambda columns: (
                around(columns["option"]) if isinstance(columns["option"], str) else made(columns)
            )
        return compiled

    def check(self, row: Mapping[str, Any], answered: bool = True) -> None:
        """Raise :class:`XgbloraError` for a row that makes no question."""
        self.question(row, answered)

    def question(self, row: Mapping[str, Any], answered: bool = True) -> Question:
        """A row as the model sees it; with ``answered`` False ``correct`` is empty, and the row needs no answer.

        Raises :class:`XgbloraError` for a row that makes no question.
        """
        values, made = columns_seen(row, self.columns), self._compiled
        prompt = made["prompt"](values)
        if not prompt.strip():
            raise XgbloraError("the prompt is empty")
        prompt = prompt.rstrip(" ")
        between = "" if prompt[-1].isspace() else " "
        prompt = _clean(prompt, "the prompt")
        if self.generation is not None:
            if not answered:
                return Question(prompt, (), ())
            return self._written(prompt, between, made["answer"](values))
        given = made["options"](values)
        if not isinstance(given, (list, tuple)):
            raise XgbloraError(f"its options are no list, but {shown(given)}")
        texts = [_text(made["option"](values | {"option": text}), "an option") for text in given]
        if len(texts) < 2:
            raise XgbloraError(f"a question needs at least 2 options, got {len(texts)}")
        if len(set(texts)) < len(texts):
            twice = next(text for place, text in enumerate(texts) if text in texts[:place])
            raise XgbloraError(f"the option {twice!r} is there twice")
        correct = self._correct(made["answer"](values), given, texts) if answered else ()
        null_prompt = made["null_prompt"](values).rstrip(" ")
        return Question(prompt, tuple(between + text for text in texts), correct, null_prompt=null_prompt)

    def _written(self, prompt: str, between: str, answer: Any) -> Question:
        assert self.generation is not None
        given = answer if isinstance(answer, (list, tuple)) else [answer]
        texts = [_text(str(printed(one)), "an answer") for one in given]
        if not texts:
            raise XgbloraError("there is no right answer")
        return Question(prompt, (between + texts[0] + self.generation.stop,), (0,), tuple(texts))

    def _correct(self, answer: Any, given: Any, texts: list[str]) -> tuple[int, ...]:
        """Places of the correct options, by label, number, or text before or after ``option`` was put around it."""
        answers = answer if isinstance(answer, (list, tuple)) else [answer]
        if not answers:
            raise XgbloraError("no option is correct")
        return tuple(dict.fromkeys(self._place(one, given, texts) for one in answers))

    def _place(self, answer: Any, given: Any, texts: list[str]) -> int:
        known: Any
        if self.labels:
            answer, known, what = str(answer), self.labels, "the labels"
        elif isinstance(answer, int) and not isinstance(answer, bool):
            known, what = range(len(texts)), f"0 to {len(texts) - 1}, the options"
        elif answer in given:
            known, what = given, "the options"
        else:
            answer, known, what = answer.strip() if isinstance(answer, str) else answer, texts, "the options"
        if answer not in known:
            choices = ", ".join(repr(text) for text in (self.labels or texts))
            raise XgbloraError(f"the answer {shown(answer)} is not one of {what} {choices}")
        return list(known).index(answer)


def _text(value: str, what: str) -> str:
    text = value.strip()
    if not text:
        raise XgbloraError(f"{what} is empty")
    return _clean(text, what)


def _clean(text: str, what: str) -> str:
    if "\0" in text:
        raise XgbloraError(f"{what} holds a NUL byte")
    return text
