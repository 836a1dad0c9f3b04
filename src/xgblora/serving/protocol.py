"""What clients send and get: the part of OpenAI's protocol that is spoken here."""

import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

MOST_TOKENS = 4096


class Message(BaseModel):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = Field(min_length=1)

    @field_validator("content", mode="before")
    @classmethod
    def join(cls, content: Any) -> Any:
        """Some clients send a text in parts."""
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            return "".join(str(part.get("text", "")) for part in content)
        return content


class Asking(BaseModel):
    """What both kinds of requests may say. What is not known is not looked at, as other servers do."""

    model_config = ConfigDict(extra="ignore")
    model: str | None = None
    temperature: float = Field(0.0, ge=0, le=2)
    stream: bool = False
    n: Literal[1] = 1


class ChatRequest(Asking):
    """``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)


class CompletionRequest(Asking):
    """``/v1/completions``."""

    prompt: str = Field(min_length=1)
    max_tokens: int = Field(16, ge=1, le=MOST_TOKENS)
    stop: str | list[str] | None = None


class StagesRequest(BaseModel):
    """``/api/stages``: a row, asked of the base and of the first 1, 2, ... boosters."""

    row: dict[str, Any] | str


def identity(kind: str) -> str:
    """A name for an answer, as clients expect one."""
    return f"{kind}-{uuid.uuid4().hex}"


def chat_answer(model: str, text: str, reason: str, used: tuple[int, int], more: dict[str, Any]) -> dict[str, Any]:
    """A whole answer to ``/v1/chat/completions``.

    Args:
        model: Who answers.
        text: The answer.
        reason: ``stop`` or ``length``.
        used: Tokens of the prompt and of the answer.
        more: What this server says beside it, such as ``probabilities``.
    """
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason, "logprobs": None}
    return _answer("chat.completion", "chatcmpl", model, choice | more) | {"usage": usage(*used)}


def chat_piece(name: str, model: str, text: str, reason: str | None = None) -> dict[str, Any]:
    """A piece of a streamed answer to ``/v1/chat/completions``; the last one has a ``reason``."""
    delta = {} if reason else {"role": "assistant", "content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return _answer("chat.completion.chunk", "chatcmpl", model, choice) | {"id": name}


def completion_answer(model: str, text: str, reason: str, used: tuple[int, int]) -> dict[str, Any]:
    """A whole answer to ``/v1/completions``; the rest as in :func:`chat_answer`."""
    choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
    return _answer("text_completion", "cmpl", model, choice) | {"usage": usage(*used)}


def completion_piece(name: str, model: str, text: str, reason: str | None = None) -> dict[str, Any]:
    """A piece of a streamed answer to ``/v1/completions``; the last one has a ``reason``."""
    choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
    return _answer("text_completion", "cmpl", model, choice) | {"id": name}


def usage(prompt: int, answer: int) -> dict[str, int]:
    """Tokens that were read and written."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def problem(message: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """An error, as clients show it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _answer(kind: str, name: str, model: str, choice: dict[str, Any]) -> dict[str, Any]:
    return {"id": identity(name), "object": kind, "created": int(time.time()), "model": model, "choices": [choice]}
