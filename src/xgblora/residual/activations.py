"""Forward passes that keep what a fit needs: what layers see, and the loss as a function of what leaves the last."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import compress

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from xgblora.adapters import Adapters
from xgblora.errors import XgbloraError
from xgblora.lower_layers import LowerLayers
from xgblora.models import decoder_layers
from xgblora.objectives import hidden_scores, option_scores, score_losses
from xgblora.packing import Batch, Example, build_batch, read_hidden, split_by_tokens
from xgblora.residual.writers import turned_down, writes

PART_TOKENS = 1024
"""Tokens of one forward."""


@dataclass(frozen=True)
class Observed:
    """Activations where something is predicted: T of them, in the order of the batches' ``read``.

    ``inputs``: (T, in) for each layer that is fitted, in the model's dtype. ``written``: (T, hidden) float32, what the
    layers that are only turned down write together, without their biases; None without such layers. ``hidden``:
    (T, hidden) float32, as the last decoder layer leaves it. ``batches``: what was forwarded.
    """

    batches: list[Batch]
    inputs: list[Tensor]
    written: Tensor | None
    hidden: Tensor

    @property
    def examples(self) -> list[Example]:
        """What was forwarded, in the order of the batches."""
        return [example for batch in self.batches for example in batch.examples]


class Forwards:
    """Forwards of the model with its boosters and the pair as it is, counted."""

    def __init__(
        self, adapters: Adapters, classification: bool, packed: bool, lower_layers: LowerLayers | None
    ) -> None:
        self.adapters = adapters
        self.classification = classification
        self.packed = packed
        self.lower_layers = lower_layers
        self.tokens = 0

    @contextmanager
    def _ready(self, batch: Batch) -> Iterator[Batch]:
        """The batch to run, with the layers below the lowest one that trains from memory where they are."""
        filled = batch.filled()
        self.tokens += batch.tokens
        with self.lower_layers.shared(batch, filled) if self.lower_layers else nullcontext():
            yield filled

    def observe(self, examples: Sequence[Example], most: int) -> Observed:
        """One forward over as many of the examples as predict no more than ``most`` tokens."""
        layers = [layer for layer, _, _ in self.adapters.slices]
        down = turned_down(self.adapters)
        inputs: list[list[Tensor]] = [[] for _ in range(down.count(False))]
        written: list[Tensor] = []
        hidden: list[Tensor] = []
        batches = []
        for each in parts(_within(examples, most), self.packed):
            batch = each.to(self.adapters.device)
            with self._ready(batch) as filled, _inputs(layers, batch) as read, last_layer(self.adapters.model) as last:
                read_hidden(self.adapters.model, filled)
            for rows, x in zip(inputs, compress(read, (not only for only in down)), strict=True):
                rows.append(x)
            if any(down):
                told = [writes(layer, x) for layer, x in compress(zip(layers, read, strict=True), down)]
                written.append(torch.stack(told).sum(0))
            hidden.append(rows_read(last[-1], batch).float())
            batches.append(batch)
        together = torch.cat(written) if written else None
        return Observed(batches, [torch.cat(rows) for rows in inputs], together, torch.cat(hidden))

    def scores(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """Each of ``batches`` with its option scores (examples, options)."""
        for batch in batches:
            with self._ready(batch.to(self.adapters.device)) as filled:
                yield filled, option_scores(self.adapters.model, filled, normalised=not self.classification)


class Tail(nn.Module):
    """What a model does between its last decoder layer and its head: a norm, in some also a projection; in float32."""

    def __init__(self, model: PreTrainedModel, packed: bool) -> None:
        """Found by watching one short forward, and checked. Raises :class:`XgbloraError` where it is something else."""
        super().__init__()
        batch = build_batch([Example([1, 2, 3], [[4], [5]], 0), Example([6, 7], [[4], [5]], 0)], packed)
        batch = batch.to(model.device)
        blocks = list(decoder_layers(model))
        around = {blocks[-1].rsplit(".", depth)[0] for depth in range(1, blocks[-1].count(".") + 1)} | {""}
        called: list[nn.Module] = []
        handles = [
            module.register_forward_hook(lambda module, *_: called.append(module))
            for name, module in model.named_modules()
            if name and name not in around and name.rpartition(".")[0] in around
        ]
        handles.append(model.get_submodule(blocks[-1]).register_forward_hook(lambda *_: called.clear()))
        try:
            with last_layer(model) as last, torch.no_grad():
                expected = read_hidden(model, batch).float()
        finally:
            for handle in handles:
                handle.remove()
        self.model = [model]  # in a list: not a submodule
        self.steps = nn.ModuleList(copy.deepcopy(module).float() for module in called)
        found = self(rows_read(last[-1], batch).float())
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0.02, atol=0.02):
            raise XgbloraError(
                f"--recipe boost cannot follow what {type(model).__name__} does after its last layer: use --recipe "
                "classic"
            )

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., hidden) behind the last decoder layer -> what the head takes."""
        for step in self.steps:
            hidden = step(hidden)
        return hidden

    def scores(self, hidden: Tensor, batch: Batch, normalised: bool) -> Tensor:
        """Option scores (segments, options) of hidden states (reads, hidden) behind the last decoder layer."""
        return hidden_scores(self.model[0], self(hidden), batch, normalised)


class TailLoss:
    """The loss as a function of the hidden states behind the last decoder layer, all else as it was observed."""

    def __init__(self, tail: Tail, seen: Observed, classification: bool, targets: Tensor | None = None) -> None:
        """``targets``: probabilities (examples, options) to come close to, in place of the examples' labels."""
        self.tail = tail
        self.classification = classification
        batches = seen.batches
        if all(batch.single_token for batch in batches):  # few rows of the head: one call for all
            batches = [build_batch(seen.examples, batches[0].packed).to(seen.hidden.device)]
        self.parts: list[tuple[Batch, slice]] = []
        start = 0
        for batch in batches:
            stop = start + batch.read.numel()
            self.parts.append((batch, slice(start, stop)))
            start = stop
        self.targets: list[Tensor | None] = [None] * len(batches)
        if targets is not None:
            split = targets.split([batch.segments for batch in batches])
            self.targets = [each[:, : batch.max_options] for each, batch in zip(split, batches, strict=True)]

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (examples,) of ``hidden`` (T, hidden), and the gradient of their sum, (T, hidden)."""
        gradient = torch.empty_like(hidden)
        found = []
        for (batch, reads), targets in zip(self.parts, self.targets, strict=True):
            own = hidden[reads].detach().requires_grad_()
            with torch.enable_grad():
                scores = self.tail.scores(own, batch, not self.classification)
                losses = score_losses(scores, batch.label, self.classification, targets)
                (gradient[reads],) = torch.autograd.grad(losses.sum(), own)
            found.append(losses.detach())
        return torch.cat(found), gradient

    def probabilities(self, hidden: Tensor) -> Tensor:
        """What the options' probabilities (examples, options) are with ``hidden`` (T, hidden)."""
        found = [self.tail.scores(hidden[reads], batch, False).softmax(1) for batch, reads in self.parts]
        most = max(each.shape[1] for each in found)
        return torch.cat([F.pad(each, (0, most - each.shape[1])) for each in found])

    def curvature(self, hidden: Tensor, direction: Tensor) -> float:
        """Mean second derivative of an example's loss along ``direction`` where all options are equally likely.

        That is the variance of the scores' slopes over an example's options; taken where the model is undecided, it
        does not shrink as the model grows sure. Without options to choose from, it is taken where the model is.
        """
        step = 0.01 * hidden.square().mean().sqrt() * hidden.shape[1] ** 0.5
        bends = []
        for batch, reads in self.parts:
            ahead, here, behind = (
                self.tail.scores(hidden[reads] + sign * step * direction, batch, not self.classification)
                for sign in (1, 0, -1)
            )
            if self.classification:
                slopes = ((ahead - behind) / (2 * step)).masked_fill(~here.isfinite(), torch.nan)
                bends.append((slopes - slopes.nanmean(1, keepdim=True)).square().nanmean(1))
            else:
                bent = -(ahead - 2 * here + behind) / step**2
                bends.append(bent.gather(1, batch.label[:, None])[:, 0])
        return max(torch.cat(bends).mean().item(), torch.finfo(torch.float32).tiny)


def rows_read(activation: Tensor, batch: Batch) -> Tensor:
    """The positions of an activation (..., width) where ``batch`` predicts something: (reads, width)."""
    return activation.reshape(-1, activation.shape[-1])[batch.read]


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


@contextmanager
def _inputs(layers: Sequence[nn.Module], batch: Batch) -> Iterator[list[Tensor]]:
    """What enters each of ``layers``, which a model runs in this order, where ``batch`` predicts, in one forward."""
    found: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args: found.append(rows_read(args[0], batch))) for layer in layers
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def last_layer(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """A list of what the last decoder layer returns in the forwards inside the block."""
    found: list[Tensor] = []
    layer = list(decoder_layers(model).values())[-1]
    handle = layer.register_forward_hook(
        lambda _, args, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        yield found
    finally:
        handle.remove()
