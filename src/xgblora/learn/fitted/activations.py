"""Forward passes that keep what a fit needs: what layers see, and the loss as a function of what leaves the last."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress, islice

import torch
import torch.nn.functional as F
from torch import Tensor

from xgblora.adapters.adapters import Adapters
from xgblora.base import Observation
from xgblora.base.layer_major import Turn, no_turn
from xgblora.base.prefix import Prefix
from xgblora.data.batch import Batch, Example, build_batch, split_by_tokens
from xgblora.learn.fitted.recipe import no_note
from xgblora.learn.fitted.short_head import LIKELIEST, ShortHead
from xgblora.learn.fitted.tail import Tail
from xgblora.learn.fitted.writers import bias, turned_down
from xgblora.learn.losses import AnswerLoss, divergences

PART_TOKENS = 1024
"""Tokens of one forward."""

GROUP_READS = 256
"""Predicting positions whose options are scored at once, where that takes the whole vocabulary."""

WORTHWHILE = 4
"""How many times as many words a vocabulary must have as would be listed of it."""


@dataclass(frozen=True)
class Observed:
    """Activations where something is predicted: T of them, in the order of the batches' ``read``."""

    batches: list[Batch]
    """What was forwarded."""
    inputs: list[Tensor]
    """(T, in) for each layer that is fitted, as in :class:`Observation`."""
    written: Tensor | None
    """(T, hidden) float32, what the layers that are only turned down write together, without their biases."""
    hidden: Tensor
    """(T, hidden) float32, as the last decoder layer leaves it."""

    @property
    def examples(self) -> list[Example]:
        """What was forwarded, in the order of the batches."""
        return [example for batch in self.batches for example in batch.examples]


class Forwards:
    """Forwards of the base with its boosters and the pair as they are, counted.

    Args:
        adapters: Whose base it is.
        loss: Says how options are scored.
        prefix: Computes what lies below the lowest layer that trains.
    """

    def __init__(self, adapters: Adapters, loss: AnswerLoss, prefix: Prefix | None = None) -> None:
        self.adapters = adapters
        self.base = adapters.base
        self.loss = loss
        self.prefix = prefix
        self.tail = Tail(adapters.base)
        self.tokens = 0
        self.note: Callable[[str], None] = no_note
        """Told what is being done."""

    def observe(self, *groups: Sequence[Example], most: int) -> list[Observed]:
        """One forward over as many of each group's examples as predict no more than ``most`` tokens."""
        layers = [layer for layer, _, _ in self.adapters.slices]
        down = turned_down(self.adapters)
        fitted = list(compress(layers, (not only for only in down)))
        writers = list(compress(layers, down))
        of_groups = [
            [batch.to(self.base.device) for batch in parts(_within(group, most), self.base.packed)] for group in groups
        ]
        with self.base.skipping(self.prefix, self.adapters.lowest_layer):
            filled = (batch.filled() for batches in of_groups for batch in batches)
            with self.base.held():
                biases = {writer.base_layer: bias(writer, self.base.dtype) for writer in writers}
            seen = self.base.observe(filled, fitted, biases)
            return [self._observed(batches, seen, len(fitted)) for batches in of_groups]

    def _observed(self, batches: list[Batch], seen: Iterator[Observation], layers: int) -> Observed:
        """What the next observations say, which are those of ``batches``."""
        inputs: list[list[Tensor]] = [[] for _ in range(layers)]
        written: list[Tensor] = []
        hidden: list[Tensor] = []
        for observation in islice(seen, len(batches)):
            for rows, x in zip(inputs, observation.inputs, strict=True):
                rows.append(x)
            if observation.written is not None:
                written.append(observation.written)
            hidden.append(observation.last.float())
        self.tokens += sum(batch.tokens for batch in batches)
        together = torch.cat(written) if written else None
        return Observed(batches, [torch.cat(rows) for rows in inputs], together, torch.cat(hidden))

    def scores(self, batches: Sequence[Batch], turn: Turn = no_turn) -> Iterator[tuple[Batch, Tensor]]:
        """Each of ``batches`` with its option scores (examples, options); ``turn`` as in :meth:`Base.hidden`."""
        filled = [batch.to(self.base.device).filled() for batch in batches]
        self.tokens += sum(batch.tokens for batch in batches)
        with self.base.skipping(self.prefix, self.adapters.lowest_layer):
            yield from zip(filled, self.loss.all_scores(self.base, filled, turn=turn), strict=True)


class TailLoss:
    """The loss as a function of the hidden states behind the last decoder layer, all else as it was observed.

    Args:
        forwards: Whose tail and loss are taken.
        seen: What was observed.
        targets: Probabilities (examples, options) to come close to, in place of the examples' labels.
    """

    def __init__(self, forwards: Forwards, seen: Observed, targets: Tensor | None = None) -> None:
        self.tail = forwards.tail
        self.loss = forwards.loss
        batches = list(self._grouped(seen))
        self.parts: list[tuple[Batch, slice]] = []
        self.heads: list[ShortHead | None] = [None] * len(batches)
        start = 0
        for batch in batches:
            stop = start + batch.read.numel()
            self.parts.append((batch, slice(start, stop)))
            start = stop
        self.targets: list[Tensor | None] = [None] * len(batches)
        if targets is not None:
            split = targets.split([batch.segments for batch in batches])
            self.targets = [rows[:, : batch.max_options] for rows, batch in zip(split, batches, strict=True)]

    def _grouped(self, seen: Observed) -> Iterator[Batch]:
        """What was forwarded in fewer batches: few words of the head are asked for, so one call may score many."""
        packed, device = seen.batches[0].packed, seen.hidden.device
        single = not self.loss.normalised and all(batch.single_token for batch in seen.batches)
        group: list[Example] = []
        reads = 0
        for batch in seen.batches:
            if group and not single and reads + batch.read.numel() > GROUP_READS:
                yield build_batch(group, packed).to(device)
                group, reads = [], 0
            group += batch.examples
            reads += batch.read.numel()
        yield build_batch(group, packed).to(device)

    def expand(self, hidden: Tensor | None) -> None:
        """Take a part of the vocabulary from now on, close to ``hidden`` (T, hidden); None: all of it again."""
        self.heads = [None] * len(self.parts)
        if hidden is None:
            return
        base = self.tail.base[0]
        for number, (batch, reads) in enumerate(self.parts):
            if self.loss.normalised or not batch.single_token:
                words = torch.unique(batch.target)
                if (len(words) + LIKELIEST * (reads.stop - reads.start)) * WORTHWHILE < base.vocabulary:
                    self.heads[number] = ShortHead(base, self.tail(hidden[reads]), words)

    @property
    def whole(self) -> bool:
        """Whether it takes all of the vocabulary that the loss asks for."""
        return not any(self.heads)

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (examples,) of ``hidden`` (T, hidden), and the gradient of their sum, (T, hidden)."""
        gradient = torch.empty_like(hidden)
        losses = []
        for (batch, reads), head, targets in zip(self.parts, self.heads, self.targets, strict=True):
            part = hidden[reads].detach().requires_grad_()
            with torch.enable_grad():
                scores = self.tail.scores(part, batch, self.loss.normalised, head)
                of_part = scored(self.loss, scores, batch, targets)
                (gradient[reads],) = torch.autograd.grad(of_part.sum(), part)
            losses.append(of_part.detach())
        return torch.cat(losses), gradient

    def probabilities(self, hidden: Tensor) -> Tensor:
        """What the options' probabilities (examples, options) are with ``hidden`` (T, hidden)."""
        rows = [self.tail.scores(hidden[reads], batch, False).softmax(1) for batch, reads in self.parts]
        most = max(row.shape[1] for row in rows)
        return torch.cat([F.pad(row, (0, most - row.shape[1])) for row in rows])

    def curvature(self, hidden: Tensor, direction: Tensor) -> float:
        """Mean second derivative of an example's loss along ``direction`` (hidden,), as the loss takes it."""
        step = 0.01 * hidden.square().mean().sqrt() * hidden.shape[1] ** 0.5
        bends = []
        for (batch, reads), head in zip(self.parts, self.heads, strict=True):
            near = None if self.loss.normalised else head  # a part of the vocabulary has all slopes, not all curvature
            ahead, here, behind = (
                self.tail.scores(hidden[reads] + sign * step * direction, batch, self.loss.normalised, near)
                for sign in (1, 0, -1)
            )
            bends.append(self.loss.curvature((ahead, here, behind), step, batch.label))
        return max(torch.cat(bends).mean().item(), torch.finfo(torch.float32).tiny)


def scored(loss: AnswerLoss, scores: Tensor, batch: Batch, targets: Tensor | None) -> Tensor:
    """Losses (examples,) of scores (examples, options): the divergence from ``targets``, else that of the labels."""
    return loss.of_scores(scores, batch.label) if targets is None else divergences(scores, targets)


def _within(examples: Sequence[Example], reads: int) -> list[Example]:
    """The first examples that predict at most ``reads`` tokens together, shortest first."""
    chosen: list[Example] = []
    for example in examples:
        reads -= 1 + sum(len(option) - 1 for option in example.options)
        reads -= len(example.prompt) - 1 if example.score_prompt else 0
        if reads < 0 and chosen:
            break
        chosen.append(example)
    return sorted(chosen, key=lambda e: len(e.prompt))


def parts(examples: Sequence[Example], packed: bool) -> Iterator[Batch]:
    """Batches of consecutive examples of about PART_TOKENS tokens."""
    return (build_batch(group, packed) for group in split_by_tokens(examples, PART_TOKENS))
