"""Gradient estimates of one batch: zeroth-order (two-sided SPSA) and by backpropagation.

For a direction z ~ N(0, I) the projected gradient is g = (L(theta + eps z) - L(theta - eps z)) / 2 eps, and E[g z] is
the gradient up to eps^2 (Spall 1992; MeZO, arXiv 2305.17333). With ``shared`` directions the whole batch has one, as in
MeZO. With ``per_example`` ones example i has its own z_i, and the estimate is the mean of g_i z_i: for B examples of
gradient norm |l_i| its variance is about mean(|l_i|^2) d / B against |mean l|^2 d, so never more and often B times
less, for the same forward passes.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from xgblora import group
from xgblora.adapters.adapters import Adapters
from xgblora.adapters.linear import Probe
from xgblora.base.checkpointing import checkpointed
from xgblora.base.cpu_layout import return_freed_memory
from xgblora.base.prefix import Prefix
from xgblora.config import RunConfig
from xgblora.data.batch import Batch, build_batch
from xgblora.group import gather, mine, total
from xgblora.learn.cost import Cost
from xgblora.learn.losses import Loss
from xgblora.randomness import Stream, generator

logger = logging.getLogger(__name__)

FORWARD_TOKENS = 1024
"""Tokens of a forward on a CPU, about, where nobody says: with more, what a layer hands to the next no longer stays in
its cache."""

Losses = Callable[[Tensor, Tensor], Tensor]
"""(directions (D, d), probes (2 n, D)) -> losses (2 n,): row k is one example's loss at theta + probes[k] @
directions."""


class Key(NamedTuple):
    """The place of a batch in a run: what its random numbers depend on."""

    seed: int
    step: int
    micro_batch: int = 0


@dataclass(frozen=True)
class Estimate:
    """What an estimator says of one batch."""

    loss: float
    """Mean over the examples (and over both probes)."""
    gradient: Tensor
    """(d,) float32, laid out like a direction."""
    cost: Cost
    projected: Tensor | None = None
    """Every projected gradient g, in order; None for backpropagation."""
    losses: Tensor | None = None
    """(2 n,) for each two-sided evaluation in turn, float32: all of the estimate that forwards had to say."""


Estimator = Callable[[Adapters, Loss, Batch, Key, float], Estimate]
"""(adapters, loss, batch, key, share) -> estimate. ``share``, in (0, 1], of its step multiplies the gradient."""


@dataclass(frozen=True)
class TwoSided:
    """Two-sided SPSA with Gaussian directions: both signs of all examples in one forward.

    On a CPU a large batch takes several forwards, each with both signs of some examples.

    Example::

        estimate = TwoSided(eps=1e-2)(adapters, OptionLoss(), batch, Key(seed=0, step=0))
        adapters.accumulate_gradient(estimate.gradient)
    """

    eps: float
    perturbations: int = 1
    """Two-sided evaluations that are averaged, as the mean of g z."""
    directions: Literal["per_example", "shared"] = "per_example"
    prefix: Prefix | None = None
    """Computes what lies below the lowest layer that trains."""
    forward_tokens: int | None = None
    """Of one forward, as :func:`split_batch` takes them."""

    @torch.inference_mode()
    def __call__(self, adapters: Adapters, loss: Loss, batch: Batch, key: Key, share: float = 1.0) -> Estimate:
        """Estimate the gradient of the mean loss of ``batch``, without a backward pass."""
        before = loss.tokens
        evaluate = losses_along(adapters, loss, batch, self.prefix, most=self.forward_tokens)
        evaluated: list[Tensor] = []

        def losses(z: Tensor, probes: Tensor) -> Tensor:
            evaluated.append(evaluate(z, probes))
            return evaluated[-1]

        device = batch.input_ids.device
        draws = [
            generator(key.seed, Stream.DIRECTION, key.step, key.micro_batch, number)
            for number in range(self.perturbations)
        ]
        mean, gradient, projected = self.estimate(losses, adapters.size, batch.segments, draws, device)
        passes = 2 * self.perturbations
        tokens = total(loss.tokens - before) if loss.writes else passes * batch.tokens
        if device.type == "cpu":
            return_freed_memory()  # a loss may have forwards of its own, which leave holes, too
        cost = Cost(passes, passes * batch.segments, tokens)
        return Estimate(mean.item(), gradient * share, cost, projected, torch.cat(evaluated))

    def estimate(
        self,
        losses: Losses,
        size: int,
        examples: int,
        draws: list[torch.Generator],
        device: torch.device | str = "cpu",
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same for any function.

        Args:
            losses: Asked for the first ``examples`` rows at + eps, the others at - eps.
            size: Number of parameters d.
            examples: Whose mean loss it is.
            draws: One two-sided evaluation for each generator.
            device: Where to compute.

        Returns:
            Mean loss (), its gradient (d,), every projected gradient in order.
        """
        count = examples if self.directions == "per_example" else 1
        column = torch.arange(examples) if count > 1 else torch.zeros(examples, dtype=torch.long)
        probes = torch.zeros(2 * examples, count)
        signs = torch.tensor([1.0, -1.0]).repeat_interleave(examples)
        probes[torch.arange(2 * examples), column.repeat(2)] = self.eps * signs
        probes = probes.to(device)
        gradient, loss = torch.zeros(size, device=device), torch.zeros((), device=device)
        projected = []
        for draw in draws:
            z = torch.randn(count, size, generator=draw).to(device)  # on the CPU: equal numbers on every device
            plus, minus = losses(z, probes).float().view(2, examples)
            g = (plus - minus) / (2 * self.eps)
            if self.directions == "shared":
                g = g.mean(0, keepdim=True)
            gradient += (g / count) @ z
            loss += (plus.mean() + minus.mean()) / 2
            projected.append(g)
        return loss / len(draws), gradient / len(draws), torch.cat(projected)


@dataclass(frozen=True)
class Backprop:
    """The exact gradient, by backpropagation through the base."""

    checkpoints: bool = False
    """Keep what enters each decoder layer alone, and compute the rest of it again on the way back."""
    prefix: Prefix | None = None
    """Computes what lies below the lowest layer that trains, where nothing goes back."""
    forward_tokens: int | None = None
    """Of one forward, as :func:`split_batch` takes them."""

    def __call__(self, adapters: Adapters, loss: Loss, batch: Batch, key: Key, share: float = 1.0) -> Estimate:
        """Compute the gradient of the mean loss of ``batch``, a part of it after another."""
        before = loss.tokens
        if loss.writes:  # what draws answers takes random numbers in turn: every process draws them all
            of_parts = [self._of_part(adapters, loss, batch, share)]
        else:
            split = [part for _, part in split_batch(batch, 1, self.forward_tokens)]
            work, shape = [part.tokens for part in split], (1 + adapters.size,)
            shares = [share * part.segments / batch.segments for part in split]
            with adapters.base.skipping(self.prefix, adapters.lowest_layer):
                adapters.base.share_below(split)
            of_mine = [self._of_part(adapters, loss, split[number], shares[number]) for number in mine(work)]
            of_parts = gather(of_mine, [shape] * len(split), batch.input_ids.device, work)
        whole = of_parts[0]
        for of_part in of_parts[1:]:
            whole = whole + of_part
        tokens = loss.tokens - before if loss.writes else batch.tokens
        return Estimate((whole[0] / share).item(), whole[1:], Cost(1, batch.segments, tokens))

    def _of_part(self, adapters: Adapters, loss: Loss, batch: Batch, share: float) -> Tensor:
        """The mean loss and its gradient (1 + d,) float32, times ``share``."""
        parameters = [matrix for layer, _, _ in adapters.slices for matrix in (layer.lora_A, layer.lora_B)]
        with (
            torch.enable_grad(),
            adapters.base.skipping(self.prefix, adapters.lowest_layer),
            checkpointed(adapters.base.model) if self.checkpoints else nullcontext(),
        ):
            weighted = loss(adapters.base, batch).mean() * share
        gradients = torch.autograd.grad(weighted, parameters, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
        return torch.cat([weighted.detach().float()[None], adapters.flatten(parts)])


def losses_along(
    adapters: Adapters, loss: Loss, batch: Batch, prefix: Prefix | None, places: int = 2, most: int | None = None
) -> Losses:
    """What evaluates all examples of a batch at several places of theirs: with two, at both signs of a probe.

    It takes probes (places n, D), those of all examples at the first place first, and returns losses in that order.
    Processes that share the run forward a part each.
    """
    split = split_batch(batch, places, most)
    work = [part.tokens for _, part in split]
    _say_idle(len(split), group.size())
    parts = [(examples, part.repeat(places).filled()) for examples, part in map(split.__getitem__, mine(work))]

    def losses(z: Tensor, probes: Tensor) -> Tensor:
        probed, of_mine = [], []
        for examples, part in parts:
            rows = probes.view(places, batch.segments, -1)[:, examples].flatten(0, 1)
            probed.append(Probe(z, rows if loss.writes else rows[part.token_segment]))
        with adapters.base.skipping(prefix, adapters.lowest_layer):
            adapters.base.share_below([part for _, part in split])
            if parts:
                with adapters.probing(*probed) as turn:
                    of_parts = loss.all_losses(adapters.base, [part for _, part in parts], turn)
                    of_mine = [of_part.float().view(places, -1) for of_part in of_parts]
        shapes = [(places, part.segments) for _, part in split]
        of_all = gather(of_mine, shapes, z.device, work)
        return torch.cat(of_all, 1).flatten()

    return losses


def split_batch(batch: Batch, places: int = 2, most: int | None = None) -> list[tuple[slice, Batch]]:
    """A batch in parts of consecutive examples, so that all places of a part take about ``most`` tokens.

    The parts are a function of the batch, not of who forwards them. By default those of a CPU take FORWARD_TOKENS, and
    a GPU takes the batch in one.

    Returns:
        The place of each part's examples in the batch, and the part. Parts have equally many examples but for the last.
    """
    if most is None and batch.input_ids.device.type == "cpu":
        most = FORWARD_TOKENS
    count = 1 if most is None else -(-places * batch.input_ids.numel() // most)
    size = -(-batch.segments // count)
    if size == batch.segments:
        return [(slice(0, batch.segments), batch)]
    parts = [slice(i, min(i + size, batch.segments)) for i in range(0, batch.segments, size)]
    device = batch.input_ids.device
    return [(part, build_batch(batch.examples[part], batch.packed).to(device)) for part in parts]


@cache
def _say_idle(parts: int, processes: int) -> None:
    """Say, once, that some processes have nothing to do."""
    if parts < processes:
        logger.info(
            "A step's batch is forwarded in %d part(s), and there are %d processes: lower --forward_tokens, or raise "
            "--per_device_train_batch_size",
            *(parts, processes),
        )


def estimator(config: RunConfig, prefix: Prefix | None) -> Estimator:
    """The estimator that a configuration asks for."""
    if config.trainer == "regular":
        return Backprop(config.gradient_checkpointing, prefix, config.forward_tokens)
    directions = config.zo_num_perturbations, config.zo_directions
    return TwoSided(config.zo_eps, *directions, prefix, config.forward_tokens)
