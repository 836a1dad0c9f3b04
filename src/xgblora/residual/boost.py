"""One booster: fitted to what the model still gets wrong, and its step length found by forward passes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xgblora.adapters import Adapters
from xgblora.errors import XgbloraError
from xgblora.lower_layers import LowerLayers
from xgblora.objectives import score_losses
from xgblora.packing import Example
from xgblora.residual.activations import Forwards, Tail, TailLoss, parts
from xgblora.residual.fit import Learner, fit
from xgblora.residual.teacher import Teacher
from xgblora.residual.writers import require_writers, turned_down, written_along

MOST_READS = 2048
"""Predicting positions that one booster is fitted on at most: the fit takes time with the third power of them."""


@dataclass(frozen=True)
class Boost:
    """What became of one booster.

    ``loss``: mean loss of the fitted examples before it. ``before`` and ``after``: mean loss of the examples that the
    fit did not see. ``step_length``: 0 where no step lowered it. ``passes``: forwards over the fitted or the kept
    examples; ``sequences`` and ``tokens``: what was in them.
    """

    loss: float
    before: float
    after: float
    step_length: float
    passes: int
    sequences: int
    tokens: int


@torch.no_grad()
def boost(
    adapters: Adapters,
    examples: Sequence[Example],
    searched: Sequence[Example],
    tail: Tail,
    *,
    classification: bool = True,
    packed: bool = True,
    ridge: float = 1.0,
    teacher: Teacher | None = None,
    step_length: float = 1.0,
    shrinkage: float = 1.0,
    lower_layers: LowerLayers | None = None,
) -> Boost:
    """Fit the pair in training of ``adapters`` (rank 1) to the pseudo-residuals of ``examples``, in place.

    ``searched``: examples that no booster was fitted on; they decide the step length, tried from ``step_length`` on.
    ``ridge``: see :func:`fit`. With a ``teacher`` the loss is the divergence from what it says, else it is that of the
    labels. ``shrinkage`` multiplies the step at its end. Where no step lowers the loss, the pair stays zero. Raises
    :class:`XgbloraError` where there are too few examples or an adapted layer does not write to the residual stream.
    """
    if teacher is not None:
        examples, searched = ([row for row in rows if teacher.knows(row)] for rows in (examples, searched))
    if len(examples) < 2 or not searched:
        raise XgbloraError(
            f"a booster is fitted on at least 2 examples and 1 finds its step length, got {len(examples)} and "
            f"{len(searched)}"
        )
    forwards = Forwards(adapters, classification, packed, lower_layers)
    require_writers(adapters)
    seen = forwards.observe(examples, MOST_READS)
    labelled = TailLoss(tail, seen, classification)
    loss = labelled if teacher is None else TailLoss(tail, seen, classification, teacher.targets(seen.examples))
    learner = fit(seen, loss, ridge)
    put(adapters, learner, 0.0)
    batches = list(parts(searched, packed))
    losses: dict[float, Tensor] = {}

    def loss_at(step: float) -> float:
        if step not in losses:
            step_by(adapters, learner, step)
            found = []
            for batch, scores in forwards.scores(batches):
                targets = None if teacher is None else teacher.targets(batch.examples)
                found.append(score_losses(scores, batch.label, classification, targets))
            losses[step] = torch.cat(found).double()
        return losses[step].mean().item()

    best = line_search(loss_at, step_length)
    chosen = shortest_as_good(losses, best) if teacher is None else best  # a teacher's words carry no chance
    step_by(adapters, learner, chosen * shrinkage)
    return Boost(
        loss=labelled(seen.hidden)[0].double().mean().item(),
        before=losses[0.0].mean().item(),
        after=losses[chosen].mean().item(),
        step_length=chosen,
        passes=1 + len(losses),
        sequences=sum(batch.segments for batch in seen.batches) + len(searched) * len(losses),
        tokens=forwards.tokens,
    )


def line_search(loss_at: Callable[[float], float], start: float, most: int = 8) -> float:
    """The step with the lowest loss found: from ``start`` by doubling or halving, then where a parabola has its lowest.

    0 where no step is better than none. ``loss_at`` is called for 0 and at most ``most`` other steps.
    """
    tried = {0.0: loss_at(0.0), start: loss_at(start)}
    best = start
    if tried[start] < tried[0.0]:
        while len(tried) < most and best == max(tried):
            tried[2 * best] = loss_at(2 * best)
            best = min(tried, key=tried.__getitem__)
    while len(tried) < most and (best == 0.0 or best == sorted(tried)[1]):
        smaller = sorted(tried)[1] / 2
        tried[smaller] = loss_at(smaller)
        best = min(tried, key=tried.__getitem__)
    if best > 0 and 2 * best in tried and best / 2 in tried:
        left, middle, right = (tried[step] for step in (best / 2, best, 2 * best))
        bend = left - 2 * middle + right
        if bend > 0:
            vertex = best * 2 ** ((left - right) / (2 * bend))
            tried[vertex] = loss_at(vertex)
    return min(tried, key=tried.__getitem__)


def shortest_as_good(losses: dict[float, Tensor], best: float) -> float:
    """The shortest step above 0 whose loss is within a standard error of the best step's, paired by example.

    ``losses``: (examples,) for each step tried. The one-standard-error rule (Breiman et al. 1984, "Classification and
    regression trees"): with few examples the lowest mean is mostly a lucky one, and what a step leaves undone is the
    next booster's. 0 stays 0.
    """
    for step in sorted(losses):
        more = losses[step] - losses[best]
        if 0 < step <= best and more.mean() <= more.std(correction=0) / len(more) ** 0.5:
            return step
    return best


def put(adapters: Adapters, learner: Learner, step: float) -> None:
    """The learner as the pair in training: A = a_m, B = step * u / scaling; zero in layers that do not train.

    In layers that are turned down, a_m = -gamma W_m^T u.
    """
    inputs = iter(learner.inputs)
    for (layer, _, _), down in zip(adapters.slices, turned_down(adapters), strict=True):
        if down:
            layer.lora_A.copy_(-learner.share * written_along(layer, learner.outputs[0], adapters.model.dtype))
        else:
            layer.lora_A.copy_(next(inputs))
    step_by(adapters, learner, step)


def step_by(adapters: Adapters, learner: Learner, step: float) -> None:
    """The learner that was put there, with another step."""
    for layer in adapters.layers.values():
        layer.lora_B.zero_()
    for layer, _, _ in adapters.slices:
        layer.lora_B.copy_(step / layer.scaling * learner.outputs.T)
