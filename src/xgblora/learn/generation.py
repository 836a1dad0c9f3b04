"""Answers that a model writes, in batches, and how near they come to the right ones."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from xgblora.base import Base
from xgblora.data.batch import Example
from xgblora.group import gather_parts, mine
from xgblora.progress import Progress
from xgblora.tasks import Generation

BATCH = 32
"""Prompts that are continued together at most."""

GREEDY = {"do_sample": False}
DRAWN = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
"""How transformers continues a prompt. Draws follow the model's own probabilities, whatever its ``generation_config``
says: a score function's gradient is right for these alone."""


@dataclass(frozen=True)
class Writer:
    """What turns a model's tokens into answers: its tokenizer, and when an answer ends."""

    tokenizer: Tokenizer
    ends: Generation

    @torch.inference_mode()
    def write(self, base: Base, examples: Sequence[Example], progress: str | None = None) -> list[str]:
        """The answer that the model writes to the prompt of each example, greedily, up to the text that ends one.

        The key-value cache is transformers'; adapters act as they do in any forward. Processes that share the run write
        a batch each in turn.

        Args:
            base: The model, with its adapters.
            examples: Whose prompts are continued.
            progress: Name of a progress bar.
        """
        batches = list(_batches(examples))
        ours = [batches[place] for place in mine(len(batches))]
        written = []
        with Progress(sum(map(len, ours)), progress) as shown:
            for numbers in ours:
                answers = self.continuations(base, [examples[number].prompt for number in numbers])
                written.append([self.text(ids) for [ids] in answers])
                shown.add(len(numbers))
        texts = [""] * len(examples)
        for numbers, of_batch in zip(batches, gather_parts(written, len(batches)), strict=True):
            for number, text in zip(numbers, of_batch, strict=True):
                texts[number] = text
        return texts

    def text(self, ids: Sequence[int]) -> str:
        """The answer that tokens say: what comes before the text that ends one."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return (text.split(self.ends.stop, 1)[0] if self.ends.stop else text).strip()

    @torch.inference_mode()
    def continuations(
        self, base: Base, prompts: Sequence[Sequence[int]], draws: int | None = None
    ) -> list[list[list[int]]]:
        """Token ids that the model writes after each prompt, what ended them included.

        All prompts go through the model together, a row each in their order (and a row for each draw of them).

        Args:
            base: The model, with its adapters.
            prompts: Token ids.
            draws: How many answers are drawn for each prompt, from the model's own probabilities; by default there is
                one, the greedy answer.

        Returns:
            For each prompt its answers.
        """
        tokenizer = self.tokenizer
        filler = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        filler = filler or 0
        longest = max(map(len, prompts))
        rows = [[filler] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        seen = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        written: Tensor = base.model.generate(
            input_ids=torch.tensor(rows, device=base.device),
            attention_mask=torch.tensor(seen, device=base.device),
            max_new_tokens=self.ends.max_new_tokens,
            num_beams=1,
            **(GREEDY if draws is None else DRAWN | {"num_return_sequences": draws}),
            stop_strings=[self.ends.stop] if self.ends.stop else None,
            tokenizer=tokenizer,
            pad_token_id=filler,
        )
        new = [self._ended(ids, filler) for ids in written[:, longest:].tolist()]
        return [new[start : start + (draws or 1)] for start in range(0, len(new), draws or 1)]

    def _ended(self, ids: list[int], filler: int) -> list[int]:
        """A row without what fills it up behind its end, which may be a token like the filler."""
        end = len(ids)
        while end and ids[end - 1] == filler:
            end -= 1
        if end < len(ids) and not (self.ends.stop and self.ends.stop in self.tokenizer.decode(ids[:end])):
            end += filler == self.tokenizer.eos_token_id  # that token ended it
        return ids[: max(end, 1)]


def _batches(examples: Sequence[Example]) -> Iterator[list[int]]:
    """Numbers of examples, shortest prompts first: what a batch pads is little."""
    order = sorted(range(len(examples)), key=lambda number: len(examples[number].prompt))
    for start in range(0, len(order), BATCH):
        yield order[start : start + BATCH]


def rouge_l(examples: Sequence[Example], texts: Sequence[str]) -> float:
    """Mean F-measure of the longest common subsequence of words with the nearest reference (ROUGE-L, Lin 2004)."""
    from torchmetrics.functional.text import rouge_score  # slow to import

    scores = rouge_score(list(texts), [list(example.references) for example in examples], rouge_keys="rougeL")
    return float(scores["rougeL_fmeasure"])


def exact_match_and_f1(examples: Sequence[Example], texts: Sequence[str]) -> tuple[float, float]:
    """Shares, in [0, 1], of answers that are right and of right words: SQuAD's two metrics, the best reference counts.

    Both after SQuAD's own normalisation: lower case, without punctuation and articles (Rajpurkar et al. 2016).
    """
    from torchmetrics.functional.text import squad  # slow to import

    answers = [{"prediction_text": text, "id": str(number)} for number, text in enumerate(texts)]
    right: list[Any] = [
        {
            "answers": {"text": list(example.references), "answer_start": [0] * len(example.references)},
            "id": str(number),
        }
        for number, example in enumerate(examples)
    ]
    scores = squad(answers, right)
    return scores["exact_match"].item() / 100, scores["f1"].item() / 100
