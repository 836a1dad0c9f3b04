"""A conversation with the model of a run, its answers written as they come."""

from dataclasses import dataclass
from typing import TextIO

import torch
from transformers import TextStreamer

from xgblora.config import flag
from xgblora.errors import XgbloraError
from xgblora.learn.generation import GREEDY
from xgblora.runs.finished import RunPredictor, UseConfig
from xgblora.tasks import Chat


@dataclass
class ChatConfig(UseConfig):
    """The flags of ``chat``."""

    system: str | None = flag(None, "What the model is told before the conversation.")
    max_new_tokens: int = flag(256, "Tokens of an answer, at most.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise XgbloraError(f"--max_new_tokens must be at least 1, got {self.max_new_tokens}")


class Conversation:
    """What was said so far, and the model that answers.

    Args:
        predictor: Of a run that learned conversations.
        task: Its task, which lays messages out.
        config: The system's message, and how long answers may be.
    """

    def __init__(self, predictor: RunPredictor, task: Chat, config: ChatConfig) -> None:
        self.predictor = predictor
        self.task = task
        self.most = config.max_new_tokens
        self.messages = [] if config.system is None else [{"role": "system", "content": config.system}]

    @torch.inference_mode()
    def say(self, text: str, stream: TextIO) -> str:
        """Say something; the answer goes to ``stream`` token by token, and is returned.

        The oldest turns are forgotten where all of them are longer than the model takes. Raises
        :class:`XgbloraError` where the model's chat template refuses the turn.
        """
        tokenizer, base = self.predictor.tokenizer, self.predictor.base
        self.messages.append({"role": "user", "content": text})
        room = self.predictor.max_length - self.most
        if room < 1:
            raise XgbloraError(f"--max_new_tokens {self.most} leaves no room for what was said: lower it")
        prompt = torch.tensor([self.task.open_turn(tokenizer, self.messages)[-room:]], device=base.device)
        written = base.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=self.most,
            **GREEDY,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            streamer=_Streamer(tokenizer, stream),
        )
        answer: str = tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True).strip()
        self.messages.append({"role": "assistant", "content": answer or "..."})
        return answer


class _Streamer(TextStreamer):
    """transformers' streamer into any stream."""

    def __init__(self, tokenizer: object, stream: TextIO) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stream = stream

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.stream.write(text + ("\n" if stream_end else ""))
        self.stream.flush()
