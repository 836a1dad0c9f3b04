"""Zeroth-order gradients: two-sided SPSA with Gaussian directions (Spall 1992; MeZO, arXiv 2305.17333).

For a direction z ~ N(0, I) the projected gradient is g = (L(theta + eps z) - L(theta - eps z)) / 2 eps, and E[g z] is
the gradient (up to eps^2). ``shared``: one direction for the whole batch, as in MeZO. ``per_example``: example i has
its own z_i and the estimate is the mean of g_i z_i; for B examples of gradient norm |l_i| its variance is about
mean(|l_i|^2) d / B against |mean l|^2 d, so never more and often B times less, for the same forward passes.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from xgblora.adapters import Adapters, Probe
from xgblora.lower_layers import LowerLayers
from xgblora.packing import Batch, build_batch
from xgblora.randomness import generator

ROW_TOKENS = 1024
"""Tokens of a forward on a CPU, about: with more, what a layer hands to the next no longer stays in its cache."""

Losses = Callable[[Tensor, Tensor], Tensor]
"""(directions (D, d), steps (2 n, D)) -> losses (2 n,): row k is an example's loss at theta + steps[k] @ directions."""


@dataclass(frozen=True)
class Estimate:
    """``loss``: mean over examples and both probes. ``gradient``: (d,) float32. ``projected``: every g, in order."""

    loss: Tensor
    gradient: Tensor
    projected: Tensor


def estimate(
    losses: Losses,
    size: int,
    examples: int,
    draws: "list[torch.Generator]",
    eps: float,
    directions: Literal["per_example", "shared"],
    device: torch.device | str = "cpu",
) -> Estimate:
    """The gradient of the mean loss of ``examples`` examples over ``size`` parameters.

    One two-sided evaluation for each generator in ``draws``; several are averaged as the mean of g z.
    ``losses`` is asked for the first ``examples`` rows at + eps, the others at - eps.
    """
    count = examples if directions == "per_example" else 1
    own = torch.arange(examples) if directions == "per_example" else torch.zeros(examples, dtype=torch.long)
    steps = torch.zeros(2 * examples, count)
    steps[torch.arange(2 * examples), own.repeat(2)] = eps * torch.tensor([1.0, -1.0]).repeat_interleave(examples)
    steps = steps.to(device)
    gradient = torch.zeros(size, device=device)
    loss = torch.zeros((), device=device)
    projected = []
    for draw in draws:
        z = torch.randn(count, size, generator=draw).to(device)  # drawn on the CPU: equal numbers on every device
        plus, minus = losses(z, steps).float().view(2, examples)
        g = (plus - minus) / (2 * eps)
        if directions == "shared":
            g = g.mean(0, keepdim=True)
        gradient += (g / count) @ z
        loss += (plus.mean() + minus.mean()) / 2
        projected.append(g)
    return Estimate(loss / len(draws), gradient / len(draws), torch.cat(projected))


def direction_generators(seed: int, step: int, micro_batch: int, count: int) -> list[torch.Generator]:
    """The generators of one training step: a function of its place in the run alone."""
    return [generator(seed, "direction", step, micro_batch, number) for number in range(count)]


@torch.inference_mode()
def estimate_batch(
    adapters: Adapters,
    objective: Callable[..., Tensor],
    batch: Batch,
    draws: list[torch.Generator],
    eps: float,
    directions: Literal["per_example", "shared"],
    lower_layers: LowerLayers | None = None,
    by_row: bool = False,
) -> Estimate:
    """The same for the pairs in training of ``adapters`` and the examples of ``batch``: both signs in one forward.

    On a CPU a large batch takes several forwards, each with both signs of some examples. ``by_row``: the objective's
    forwards are its own, of padded rows, one or more for every example of its batch in turn.
    """
    parts = [(examples, part, part.repeat(2).filled()) for examples, part in _parts(batch)]

    def losses(z: Tensor, steps: Tensor) -> Tensor:
        found = torch.empty(2, batch.segments, device=z.device)
        for examples, part, both in parts:
            own = steps.view(2, batch.segments, -1)[:, examples].flatten(0, 1)
            probe = Probe(z, own) if by_row else Probe(z, own[both.token_segment])
            with lower_layers.shared(part, both) if lower_layers else nullcontext(), adapters.probing(probe):
                found[:, examples] = objective(adapters.model, both).float().view(2, -1)
        return found.flatten()

    return estimate(losses, adapters.size, batch.segments, draws, eps, directions, batch.input_ids.device)


def _parts(batch: Batch) -> list[tuple[slice, Batch]]:
    """The batch in parts of consecutive examples, as many in each, so that both signs take about ROW_TOKENS tokens."""
    count = -(-2 * batch.input_ids.numel() // ROW_TOKENS) if batch.input_ids.device.type == "cpu" else 1
    size = -(-batch.segments // count)
    if size == batch.segments:
        return [(slice(0, batch.segments), batch)]
    starts = range(0, batch.segments, size)
    return [(slice(i, i + size), build_batch(batch.examples[i : i + size], batch.packed)) for i in starts]
