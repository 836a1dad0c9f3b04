"""Answers that a model writes, in batches, and how near they come to the right ones."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from xgblora.packing import Example
from xgblora.tasks import Generation

BATCH = 32
"""Prompts that are continued together at most."""


@dataclass(frozen=True)
class Writer:
    """What turns a model's tokens into answers: its tokenizer, and when an answer ends."""

    tokenizer: Tokenizer
    ends: Generation

    @torch.inference_mode()
    def write(self, model: PreTrainedModel, examples: Sequence[Example], progress: str | None = None) -> list[str]:
        """The answer that ``model`` writes to the prompt of each example, greedily, up to the text that ends one.

        ``progress`` names a progress bar. The key-value cache is transformers'; adapters act as they do in any forward.
        """
        found, stop = [""] * len(examples), self.ends.stop
        with tqdm(total=len(examples), desc=progress, unit="ex", leave=False, disable=progress is None) as bar:
            for numbers in _batches(examples):
                prompts = [examples[number].prompt for number in numbers]
                for number, text in zip(numbers, self._continue(model, prompts), strict=True):
                    found[number] = (text.split(stop, 1)[0] if stop else text).strip()
                bar.update(len(numbers))
        return found

    def _continue(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[str]:
        tokenizer = self.tokenizer
        filler = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        filler = filler or 0
        longest = max(map(len, prompts))
        rows = [[filler] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        seen = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        written: Tensor = model.generate(
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(seen, device=model.device),
            max_new_tokens=self.ends.max_new_tokens,
            do_sample=False,
            num_beams=1,
            stop_strings=[self.ends.stop] if self.ends.stop else None,
            tokenizer=tokenizer,
            pad_token_id=filler,
        )
        texts: list[str] = tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
        return texts


def _batches(examples: Sequence[Example]) -> Iterator[list[int]]:
    """Numbers of examples, shortest prompts first: what a batch pads is little."""
    order = sorted(range(len(examples)), key=lambda number: len(examples[number].prompt))
    for start in range(0, len(order), BATCH):
        yield order[start : start + BATCH]


def exact_match_and_f1(examples: Sequence[Example], texts: Sequence[str]) -> tuple[float, float]:
    """Shares, in [0, 1], of answers that are right and of right words: SQuAD's two metrics, the best reference counts.

    Both after SQuAD's own normalisation: lower case, without punctuation and articles (Rajpurkar et al. 2016).
    """
    from torchmetrics.functional.text import squad  # slow to import

    said = [{"prediction_text": text, "id": str(number)} for number, text in enumerate(texts)]
    right: list[Any] = [
        {
            "answers": {"text": list(example.references), "answer_start": [0] * len(example.references)},
            "id": str(number),
        }
        for number, example in enumerate(examples)
    ]
    found = squad(said, right)
    return found["exact_match"].item() / 100, found["f1"].item() / 100
