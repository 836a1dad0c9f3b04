"""Conversations: the model learns to write each of an assistant's turns from all that came before it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase as Tokenizer

from xgblora.data.batch import Example
from xgblora.errors import XgbloraError, naming
from xgblora.tasks.sandbox import shown
from xgblora.tasks.task import Generation, Metric, Source
from xgblora.tasks.templates import Compiled, columns_of_expression, columns_seen

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Chat:
    """Rows of messages, ``[{"role": "user", "content": ...}, ...]``, laid out by the model's own chat template.

    The loss is on the assistant's turns alone, each an example of its own: what it says and what ends it.
    """

    name: str
    messages: str
    """Jinja expression whose value is a row's messages, such as the name of their column."""
    source: Source
    metric: Metric = "f1"
    num_dev: int = 100
    generation: Generation = Generation(max_new_tokens=100, stop="")
    classification: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Raise :class:`XgbloraError` for an expression that is none, or a metric of options."""
        _ = self._compiled
        if self.metric == "macro_f1":
            raise XgbloraError("what an assistant writes is measured by accuracy, f1 or rouge_l")

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns that messages are made of."""
        return tuple(sorted(columns_of_expression(self.messages)))

    @cached_property
    def _compiled(self) -> Compiled:
        return Compiled("messages", self.name, self.messages, expression=True)

    @property
    def asking(self) -> tuple[str, ...]:
        """The same: what is said next is asked by what was said before."""
        return self.columns

    def check(self, row: Mapping[str, Any], answered: bool = True) -> None:
        """Raise :class:`XgbloraError` for a row that is no conversation, or that has no assistant's turn to learn."""
        if not any(message["role"] == "assistant" for message in self._turns(row)) and answered:
            raise XgbloraError("no message is the assistant's")

    def asked(self, row: Mapping[str, Any] | str) -> Mapping[str, Any]:
        """``row``, or that of a user who says a text."""
        if isinstance(row, Mapping):
            return row
        if not isinstance(row, str):
            raise XgbloraError(f"a row is a text or a mapping from columns to values, not {shown(row)}")
        return {self.columns[0]: [{"role": "user", "content": row}]}

    def _turns(self, row: Mapping[str, Any]) -> list[dict[str, str]]:
        messages = self._compiled(columns_seen(row, self.columns))
        if not isinstance(messages, (list, tuple)) or not messages:
            raise XgbloraError(f"its messages are no list of messages, but {shown(messages)}")
        for place, message in enumerate(messages, start=1):
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise XgbloraError(f"message {place} has no role and content, but is {shown(message)}")
            if message["role"] not in ROLES:
                raise XgbloraError(f"message {place} is of role {shown(message['role'])}, not of {', '.join(ROLES)}")
            if not isinstance(message["content"], str) or not message["content"].strip():
                raise XgbloraError(f"message {place} says nothing")
        return [{"role": message["role"], "content": message["content"]} for message in messages]

    def open_turn(self, tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation that the assistant goes on with. Raises :class:`XgbloraError` for a model that
        was not trained to chat, or that refuses it."""
        _require_template(tokenizer)
        return _ids(tokenizer, messages, True)

    def encode(
        self,
        rows: Iterable[Mapping[str, Any]],
        tokenizer: Tokenizer,
        max_length: int,
        score_prompt: bool = False,
        answered: bool = True,
    ) -> list[Example]:
        """An example for each of the assistant's turns; with ``answered`` False one for what it is to say next.

        Conversations lose their beginning where they are longer than ``max_length`` tokens. Raises
        :class:`XgbloraError` for a model without a chat template, for rows that are no conversations, and for turns
        that leave no room for what came before them; it names the row, counted from 1.
        """
        _require_template(tokenizer)
        examples = []
        for number, row in enumerate(rows, start=1):
            with naming(f"{self.name}, row {number}"):
                turns = self._turns(row)
                if not answered:
                    room = max_length - self.generation.max_new_tokens
                    if room < 1:
                        raise XgbloraError(f"what is to be said leaves no room for a prompt within {max_length}")
                    examples.append(Example(_ids(tokenizer, turns, True)[-room:], [], 0, row=row))
                for place, turn in enumerate(turns):
                    if answered and turn["role"] == "assistant":
                        prompt, turn_ids = _turn(tokenizer, turns[: place + 1])
                        room = max_length - max(len(turn_ids), self.generation.max_new_tokens)
                        if room < 1:
                            raise XgbloraError(f"message {place + 1} leaves no room for a prompt within {max_length}")
                        reference = (turn["content"].strip(),)
                        examples.append(
                            Example(prompt[-room:], [turn_ids], 0, score_prompt, references=reference, row=row)
                        )
        return examples


def _require_template(tokenizer: Tokenizer) -> None:
    if not tokenizer.chat_template:
        raise XgbloraError("the model's tokenizer has no chat template: take a model that was trained to chat")


def _turn(tokenizer: Tokenizer, turns: Sequence[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids of what comes before the last of ``turns``, and of that one."""
    prompt, whole = _ids(tokenizer, turns[:-1], True), _ids(tokenizer, turns, False)
    if whole[: len(prompt)] != prompt:
        raise XgbloraError("the model's chat template writes the beginning of a turn in another way when it is over")
    return prompt, whole[len(prompt) :]


def _ids(tokenizer: Tokenizer, turns: Sequence[dict[str, str]], open_turn: bool) -> list[int]:
    try:
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=open_turn, return_dict=False))
    except Exception as error:  # templates raise what they like, for roles in a wrong order for example
        raise XgbloraError(f"the model's chat template refuses it: {' '.join(str(error).split())[:200]}") from error
