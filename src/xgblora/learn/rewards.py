"""Rewards: what an answer is worth, and the loss that raises it, whether or not it has a gradient."""

import importlib
import importlib.util
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from xgblora.base import Base
from xgblora.data.batch import Batch, Example, build_batch
from xgblora.errors import XgbloraError
from xgblora.learn import generation
from xgblora.learn.generation import BATCH, Writer, exact_match_and_f1
from xgblora.learn.losses import Loss, OptionLoss

RewardFunction = Callable[[str, str, Example], float]
"""(prompt, completion, example) -> what the completion is worth; ``example.row`` has the row's columns, and
``example.references`` the texts of its right answers."""


def accuracy(prompt: str, completion: str, example: Example) -> float:
    """1 for a right answer, word for word."""
    return float(completion in example.references)


def exact_match(prompt: str, completion: str, example: Example) -> float:
    """1 for a right answer after SQuAD's normalisation."""
    return exact_match_and_f1([example], [completion])[0]


def f1(prompt: str, completion: str, example: Example) -> float:
    """F1 of its words against those of the nearest right answer, after SQuAD's normalisation."""
    return exact_match_and_f1([example], [completion])[1]


def rouge_l(prompt: str, completion: str, example: Example) -> float:
    """F-measure of the longest common subsequence of words with the nearest right answer (ROUGE-L, Lin 2004)."""
    return generation.rouge_l([example], [completion])


READY: dict[str, RewardFunction] = {"accuracy": accuracy, "exact_match": exact_match, "f1": f1, "rouge_l": rouge_l}
"""Rewards by name."""


def length_penalised(function: RewardFunction, per_word: float) -> RewardFunction:
    """Subtract something from a reward for every word of the completion.

    Args:
        function: The reward.
        per_word: What a word costs.

    Examples:
        >>> length_penalised(lambda prompt, completion, example: 1.0, 0.1)("", "two words", Example([1], [[2]], 0))
        0.8
    """

    def penalised(prompt: str, completion: str, example: Example) -> float:
        return function(prompt, completion, example) - per_word * len(completion.split())

    return penalised


def load_reward(name: str, per_word: float = 0.0) -> RewardFunction:
    """Load a ready reward by its name, or ``module:function``, also from the working directory.

    Args:
        name: accuracy, exact_match, f1, rouge_l or ``module:function``.
        per_word: Subtracted for every word of the completion.

    Raises:
        XgbloraError: There is no such reward.

    Examples:
        >>> load_reward("accuracy", per_word=0.1)("", "great film", Example([1], [[2]], 0, references=("great film",)))
        0.8
    """
    function = READY[name] if name in READY else _imported(name)
    return length_penalised(function, per_word) if per_word else function


def reward_file(name: str) -> Path | None:
    """The file that a reward of one's own comes from; None for a ready one, or where there is no such file."""
    if name in READY:
        return None
    _look_here()
    try:
        spec = importlib.util.find_spec(name.partition(":")[0])
    except (Exception, SystemExit):  # a package runs its own code when it is looked into
        return None
    return Path(spec.origin) if spec and spec.has_location and spec.origin else None


def _look_here() -> None:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)


def _imported(name: str) -> RewardFunction:
    module, _, function = name.partition(":")
    if not module or not function:
        raise XgbloraError(f"--reward {name!r} is neither one of {', '.join(READY)} nor of the form module:function")
    _look_here()
    try:
        value = vars(importlib.import_module(module)).get(function)
    except (Exception, SystemExit) as error:  # whatever somebody's module raises when it is imported
        raise XgbloraError(f"--reward {name}: cannot import {module}: {_summary(error)}") from error
    if not callable(value):
        what = f"has no {function}" if value is None else f"means no function by {function}, but {type(value).__name__}"
        raise XgbloraError(f"--reward {name}: the module {module} {what}")
    return value  # type: ignore[no-any-return]


@dataclass
class Reward(Loss):
    """A loss that is minus what the model's answers are worth.

    A completion is one of an example's options, or what the model writes, with a ``writer``.

    Raises:
        XgbloraError: The function fails or gives no finite number.

    Example::

        def brief(prompt: str, completion: str, example: Example) -> float:
            return float(completion in example.references) - 0.01 * len(completion)

        Trainer(model, config, adapters, rows, objective=Reward(brief, tokenizer)).train()
    """

    function: RewardFunction
    """Judges completions: texts without the spaces around them."""
    tokenizer: Tokenizer
    writer: Writer | None = None
    completions: Literal["greedy", "expected"] = "greedy"
    """Whose worth counts.

    - ``greedy``: that of the answer that the model gives. It has no gradient, and needs none for a zeroth-order
      estimate: with a direction for each example that is evolution strategies (Salimans et al. 2017, arXiv 1703.03864)
      with a population of rank-1 changes.
    - ``expected``: the mean over answers, each as often as the model gives it. Exact over options; over ``samples``
      drawn ones where they are written, with the score function's gradient and the mean of the others as baseline
      (REINFORCE leave-one-out, Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740).
    """
    samples: int = 4
    tokens: int = field(default=0, init=False)

    @property
    def writes(self) -> bool:  # type: ignore[override]
        """Whether the model writes its answers."""
        return self.writer is not None

    def losses(self, base: Base, batch: Batch) -> Tensor:
        """Losses (segments,) float32; their gradient is that of the expected loss."""
        if self.writer is not None:
            return self._of_written(base, batch, self.writer)
        scores = OptionLoss().scores(base, batch)
        if self.completions == "greedy":
            chosen = zip(batch.examples, scores.argmax(1).tolist(), strict=True)
            worth = [self.worth(example, self._text(example.options[place])) for example, place in chosen]
            return -torch.tensor(worth, device=scores.device)
        worth_of = [torch.tensor(self.of_options(example)) for example in batch.examples]
        table = torch.nn.utils.rnn.pad_sequence(worth_of, batch_first=True)
        return -(scores.softmax(1) * table.to(scores.device)).sum(1)

    def of_options(self, example: Example) -> list[float]:
        """What each of an example's options is worth."""
        return [self.worth(example, self._text(option)) for option in example.options]

    def of_written(self, base: Base, examples: Sequence[Example]) -> list[tuple[list[list[int]], list[float]]]:
        """``samples`` answers that the model writes to each example's prompt, as token ids, and what each is worth."""
        assert self.writer is not None  # whoever asks knows that answers are written
        judged, together = [], max(1, BATCH // self.samples)
        for start in range(0, len(examples), together):
            group = examples[start : start + together]
            written = self.writer.continuations(base, [example.prompt for example in group], self.samples)
            for example, draws in zip(group, written, strict=True):
                judged.append((draws, [self.worth(example, self.writer.text(ids)) for ids in draws]))
        return judged

    def _of_written(self, base: Base, batch: Batch, writer: Writer) -> Tensor:
        prompts = [example.prompt for example in batch.examples]
        greedy = self.completions == "greedy"
        written = writer.continuations(base, prompts, draws=None if greedy else self.samples)
        self.tokens += sum(len(p) + len(ids) - 1 for p, draws in zip(prompts, written, strict=True) for ids in draws)
        worth = torch.tensor(
            [
                [self.worth(example, writer.text(ids)) for ids in draws]
                for example, draws in zip(batch.examples, written, strict=True)
            ],
            device=batch.label.device,
        )
        if not torch.is_grad_enabled() or greedy:
            return -worth.mean(1)
        drawn = [Example(prompt, draws, 0) for prompt, draws in zip(prompts, written, strict=True)]
        self.tokens += sum(example.tokens for example in drawn)
        lengths = torch.tensor([[len(ids) for ids in draws] for draws in written], device=worth.device)
        as_options = build_batch(drawn, batch.packed).to(worth.device)
        scores = OptionLoss().scores(base, as_options, normalised=True)
        advantage = (worth - worth.mean(1, keepdim=True)) * self.samples / (self.samples - 1)
        surrogate = (advantage * scores * lengths).mean(1)
        return -worth.mean(1) - (surrogate - surrogate.detach())  # its value is the reward's, its gradient the score's

    def mean(self, examples: Sequence[Example], predictions: Sequence[int], texts: Sequence[str] | None) -> float:
        """The mean reward of options chosen, or of texts written."""
        if texts is None:
            chosen = zip(examples, predictions, strict=True)
            texts = [self._text(example.options[place]) for example, place in chosen]
        return statistics.fmean(self.worth(example, text) for example, text in zip(examples, texts, strict=True))

    def worth(self, example: Example, completion: str) -> float:
        """What a completion is worth."""
        try:
            value = float(self.function(self._text(example.prompt), completion, example))
        except (Exception, SystemExit) as error:  # somebody else's function may raise anything
            raise XgbloraError(f"the reward fails for the completion {completion[:60]!r}: {_summary(error)}") from error
        if not math.isfinite(value):
            raise XgbloraError(f"the reward of the completion {completion[:60]!r} is {value}: it must be finite")
        return value

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.strip()


def _summary(error: BaseException) -> str:
    """The kind and the beginning of an exception's message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
