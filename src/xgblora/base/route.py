"""Whether a model runs packed batches: measured."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from xgblora.base.layer_major import Turn, no_turn
from xgblora.data.batch import Batch, Example
from xgblora.errors import MemoryBudgetError, XgbloraError, one_line

logger = logging.getLogger(__name__)


class Forwarding(Protocol):
    """What of a :class:`~xgblora.base.Base` is asked here."""

    model: PreTrainedModel

    @property
    def device(self) -> torch.device:
        """Where the model is."""

    @property
    def dtype(self) -> torch.dtype:
        """Its precision."""

    def batch(self, examples: Sequence[Example]) -> Batch:
        """A batch of the examples, as it runs them."""

    def hidden(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        """Final hidden states."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of final hidden states."""

    def run(self, forwards: Sequence[Callable[[], None]], turn: Turn) -> None:
        """Carry out forwards."""


@torch.no_grad()
def measure_route(bases: Mapping[bool, Forwarding]) -> bool:
    """Whether this model runs packed batches.

    Three short sequences go through the model one by one as it ships, and then packed. Where the logits differ by more
    than rounding, padded rows are used, and the log says so. Raises :class:`XgbloraError` where even those differ.

    Args:
        bases: The model as it runs packed batches (True), and padded ones.
    """
    model = bases[False].model
    vocabulary = model.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(vocabulary, (n,), generator=draw).tolist()

    lengths = (5, 1, 1), (12, 3, 2), (8, 1, 4)
    examples = [Example(tokens(n), [tokens(first), tokens(second)], 0) for n, first, second in lengths]
    words = [*examples[1].prompt, *examples[1].options[0]]
    alone = [[*example.prompt, *option[:-1]] for example in examples for option in example.options]
    logits_of = _logits_of(bases[False], [*alone, words[:-1], words])
    starts = [len(example.prompt) - 1 for example in examples for _ in example.options]
    expected = torch.cat([logits[start:] for logits, start in zip(logits_of[:-2], starts, strict=True)])
    tolerance = 1e-3 if bases[False].dtype == torch.float32 else 0.1  # half precision rounds much more
    short, long = (logits[: len(words) - 1] for logits in logits_of[-2:])
    kind = type(model).__name__
    if _difference(short, long) > tolerance:
        raise XgbloraError(f"{kind} is not supported: its words see later ones, so it is no causal model")
    reason = ""
    for packed in (True, False):
        base = bases[packed]
        batch = base.batch(examples)
        try:
            (hidden,) = base.hidden([batch])
            logits = base.logits(hidden)[batch.target_read]
        except MemoryBudgetError:
            raise
        except Exception as error:  # whatever a foreign architecture raises: it cannot take this form
            reason = one_line(error, 100)
            continue
        if (difference := _difference(logits, expected)) <= tolerance:
            if not packed:
                logger.info("%s cannot run packed batches (%s): padded rows are used", kind, reason)
            return packed
        reason = f"logits differ by {difference:.2g} of their spread"
    raise XgbloraError(f"{kind} is not supported: its logits are not head(hidden states) ({reason})")


def _logits_of(base: Forwarding, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits (tokens, vocabulary) float32 of each row, which the model reads alone, as it ships."""
    results: dict[int, Tensor] = {}

    def read(number: int) -> None:
        logits = base.model(input_ids=torch.tensor([rows[number]], device=base.device), use_cache=False).logits
        results[number] = logits[0].float()

    base.run([partial(read, number) for number in range(len(rows))], no_turn)
    return [results[number] for number in range(len(rows))]


def _difference(logits: Tensor, expected: Tensor) -> float:
    """Root mean square over the vocabulary, as a share of its spread, at the worst position.

    A token that sees wrong neighbours is off by about 1.
    """
    return float(((logits - expected).std(dim=1) / expected.std(dim=1)).max())
