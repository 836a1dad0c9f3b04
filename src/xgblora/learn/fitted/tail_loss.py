"""The loss as a function of what leaves the last layer: its value, its slopes and how it bends."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xgblora.base.cpu_layout import return_freed_memory
from xgblora.data.batch import Batch, Example, build_batch
from xgblora.learn.fitted.activations import Forwards, Seen
from xgblora.learn.fitted.short_head import LIKELIEST, ShortHead, listed
from xgblora.learn.losses import AnswerLoss, divergences, option_means, token_scores

GROUP_READS = 256
"""Predicting positions whose options are scored at once, where that takes the whole vocabulary."""

WORTHWHILE = 4
"""How many times as many words a vocabulary must have as would be listed of it."""

MOST_FACTORS = 8
"""Options that show how a loss bends, where an example has more."""

SAMPLED = 4
"""Words that show it for each position of a text."""


@dataclass(frozen=True)
class Bend:
    """A loss near some hidden states, as a quadratic in how far f (T, directions) each of them moves along directions.

    Its second derivative is positive: that of Gauss and Newton (Schraudolph 2002, "Fast curvature matrix-vector
    products for second-order gradient descent").
    """

    losses: Tensor
    """(examples,) where it was taken."""
    slopes: Tensor
    """(T, directions), of the losses' sum."""
    factors: Tensor
    """(T, factors, directions): the second derivative is, for each owner, the sum of their outer products."""
    owner: Tensor
    """(T,) number of what a position belongs to: an example, whose options its positions weigh; in text, itself."""

    @property
    def curvature(self) -> Tensor:
        """Mean second derivative (directions,) of an example's loss where all its positions move along a direction."""
        whole = self.factors.new_zeros(int(self.owner[-1]) + 1, *self.factors.shape[1:])
        return whole.index_add(0, self.owner, self.factors).square().sum((0, 1)) / len(self.losses)

    def curved(self, moved: Tensor) -> Tensor:
        """The second derivative times ``moved`` (T, directions)."""
        along = torch.einsum("tsd,td->ts", self.factors, moved)
        together = along.new_zeros(int(self.owner[-1]) + 1, along.shape[1]).index_add(0, self.owner, along)
        return torch.einsum("tsd,ts->td", self.factors, together[self.owner])


class TailLoss:
    """The loss as a function of the hidden states behind the last decoder layer, all else as it was observed.

    Args:
        forwards: Whose tail and loss are taken.
        seen: What was observed.
        targets: Probabilities (examples, options) to come close to, in place of the examples' labels.
        loss: In place of that of ``forwards``.
    """

    def __init__(
        self, forwards: Forwards, seen: Seen, targets: Tensor | None = None, loss: AnswerLoss | None = None
    ) -> None:
        self.tail = forwards.tail
        self.loss = loss or forwards.loss
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

    def _grouped(self, seen: Seen) -> Iterator[Batch]:
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
        if hidden is None:
            self.heads = [None] * len(self.parts)
            return
        base = self.tail.base[0]
        for number, (batch, reads) in enumerate(self.parts):
            if self.loss.normalised or not batch.single_token:
                if (before := self.heads[number]) is not None:  # what is likely there was likely here
                    self.heads[number] = ShortHead(base, self.tail(hidden[reads]), before.words)
                else:
                    words = torch.unique(batch.target)
                    if (len(words) + LIKELIEST * (reads.stop - reads.start)) * WORTHWHILE < base.vocabulary:
                        final = self.tail(hidden[reads])
                        self.heads[number] = ShortHead(base, final, listed(base, final, words))
                return_freed_memory()  # what is kept of each lies between holes as large as the head's logits

    @property
    def whole(self) -> bool:
        """Whether it takes all of the vocabulary that the loss asks for."""
        return not any(self.heads)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Losses (examples,) of ``hidden`` (T, hidden)."""
        losses = []
        for (batch, reads), head, targets in zip(self.parts, self.heads, self.targets, strict=True):
            scores = self.tail.scores(hidden[reads], batch, self.loss.normalised, head)
            losses.append(scored(self.loss, scores, batch, targets))
        return torch.cat(losses)

    def gradient(self, hidden: Tensor) -> Tensor:
        """Of the losses' sum, (T, hidden)."""
        gradient = torch.empty_like(hidden)
        for (batch, reads), head, targets in zip(self.parts, self.heads, self.targets, strict=True):
            part = hidden[reads].detach().requires_grad_()
            with torch.enable_grad():
                scores = self.tail.scores(part, batch, self.loss.normalised, head)
                (gradient[reads],) = torch.autograd.grad(scored(self.loss, scores, batch, targets).sum(), part)
        return gradient

    def bend(self, hidden: Tensor, outputs: Tensor, draw: torch.Generator, undecided: bool = False) -> Bend:
        """How it bends near ``hidden`` (T, hidden) along the directions ``outputs`` (directions, hidden).

        Args:
            hidden: Where.
            outputs: Along what.
            draw: Of the words or options that show it, where there are many.
            undecided: As if all options of an example were as likely; so it does not shrink as the model grows sure.
        """
        losses, slopes, factors, owners = [], [], [], []
        start = 0
        for (batch, reads), head, targets in zip(self.parts, self.heads, self.targets, strict=True):
            part = hidden[reads].detach().requires_grad_()
            with torch.enable_grad():
                final = self.tail(part)
                scores = token_scores(head or self.tail.base[0], final, batch, self.loss.normalised)
                means = option_means(scores, batch)
                of_part = scored(self.loss, means, batch, targets)

            def along(value: Tensor, part: Tensor = part) -> Tensor:
                (slope,) = torch.autograd.grad(value, part, torch.ones_like(value), retain_graph=True)
                return slope @ outputs.T

            losses.append(of_part.detach())
            slopes.append(along(of_part))
            if self.loss.normalised:
                (weight,) = torch.autograd.grad(of_part, scores, -torch.ones_like(of_part), retain_graph=True)
                owner = torch.arange(start, start + len(part), device=part.device)
                start += len(part)
                share = weight.new_zeros(len(part)).index_add(0, batch.target_read, weight)
                with torch.enable_grad():
                    columns = list(self._words(head, final, draw).unbind(1))
                    factor = torch.stack([along(column) for column in columns], 1)
                factors.append(factor * (share / len(columns)).sqrt()[:, None, None])
            else:
                example = batch.option_cell[batch.target_option] // batch.max_options
                owner = batch.target_read.new_zeros(len(part)).scatter(0, batch.target_read, example) + start
                start += batch.segments
                with torch.enable_grad():
                    columns = _options(means, draw, undecided)
                    factors.append(torch.stack([along(column) for column in columns], 1))
            owners.append(owner)
        most = max(factor.shape[1] for factor in factors)
        padded = [F.pad(factor, (0, 0, 0, most - factor.shape[1])) for factor in factors]
        return Bend(torch.cat(losses), torch.cat(slopes), torch.cat(padded), torch.cat(owners))

    def _words(self, head: ShortHead | None, final: Tensor, draw: torch.Generator) -> Tensor:
        """Log-probabilities (reads, SAMPLED) of words as likely to be drawn as the model finds them."""
        if head is not None:
            words = head.words
            logits = head.logits(final.detach(), words)
        else:
            logits = self.tail.base[0].logits(final.detach())
            words = torch.arange(logits.shape[1], device=logits.device)
        drawn = words.cpu()[torch.multinomial(logits.softmax(1).cpu(), SAMPLED, True, generator=draw)]
        read = torch.arange(len(final)).repeat_interleave(SAMPLED).to(final.device)
        flat = drawn.to(final.device).flatten()
        return (head or self.tail.base[0]).log_probabilities(final, read, flat).view(-1, SAMPLED)

    def probabilities(self, hidden: Tensor) -> Tensor:
        """What the options' probabilities (examples, options) are with ``hidden`` (T, hidden)."""
        rows = [self.tail.scores(hidden[reads], batch, False).softmax(1) for batch, reads in self.parts]
        most = max(row.shape[1] for row in rows)
        return torch.cat([F.pad(row, (0, most - row.shape[1])) for row in rows])


def scored(loss: AnswerLoss, scores: Tensor, batch: Batch, targets: Tensor | None) -> Tensor:
    """Losses (examples,) of scores (examples, options): the divergence from ``targets``, else that of the labels."""
    return loss.of_scores(scores, batch.label) if targets is None else divergences(scores, targets)


def _options(scores: Tensor, draw: torch.Generator, undecided: bool) -> list[Tensor]:
    """Columns (segments,) whose slopes' outer products are the second derivative of a softmax over options.

    sum_o q_o (s_o - sum_p q_p s_p)^2 with fixed q: of few options all, of many some that are drawn with q.
    """
    there = scores.isfinite()
    chance = there / there.sum(1, keepdim=True) if undecided else scores.detach().softmax(1)
    known = scores.masked_fill(~there, 0)
    apart = known - (chance * known).sum(1, keepdim=True)
    if scores.shape[1] <= MOST_FACTORS:
        return list((chance.sqrt() * apart).unbind(1))
    drawn = torch.multinomial(chance.cpu(), MOST_FACTORS, True, generator=draw).to(scores.device)
    return list((apart.gather(1, drawn) / MOST_FACTORS**0.5).unbind(1))
