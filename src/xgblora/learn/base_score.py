"""The base score: a constant that training starts from, as boosted trees do.

A model mostly likes one option for its own sake, whatever a text says. That costs zeroth-order training its first
steps, hides what a candidate learns, and leaves a reward without a slope. It is one number an option, which a few
examples tell in closed form (XGBoost's ``base_score``; Zhou et al. 2023, arXiv 2309.17249, for prompts).

A LoRA has no bias. But along the mean input m of a layer, A = m / |m|^2 gives A x ~ 1 wherever something is predicted:
with it B is one. How B moves the options' scores is measured by two-sided probes, a direction for each example (SPSA,
Spall 1992), so any layer may do. Of the last layers that train, the one with the lowest loss is taken.
"""

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from xgblora.adapters.adapters import Adapters
from xgblora.adapters.boosters import Ledger
from xgblora.adapters.linear import Probe
from xgblora.data.batch import Batch, Example
from xgblora.errors import XgbloraError
from xgblora.learn.cost import Cost
from xgblora.learn.fitted.activations import parts
from xgblora.learn.fitted.recipe import Worth
from xgblora.learn.fitted.step_length import line_search
from xgblora.learn.losses import OptionLoss, divergences, option_scores
from xgblora.randomness import Stream, generator

logger = logging.getLogger(__name__)

PROBE = 0.5
"""Length of a probe, in lengths of what the layer gives. A tenth is lost in bfloat16's rounding."""

PRIOR = 1.0
"""Ridge penalty of the constants: about what one example weighs."""


@torch.no_grad()
def add_base_score(ledger: Ledger, rows: Sequence[Example], worth: Worth | None = None, seed: int = 0) -> Cost:
    """Make a constant the first booster: the one that makes options as likely as they are right in ``rows``.

    Args:
        ledger: Whose pair in training has learned nothing yet. A new one follows.
        rows: A few dozen examples, all with the same options.
        worth: What each option is worth. The best ones are taken as right, in place of the label.
        seed: Decides the probes.

    Returns:
        The forward work. Where no constant lowers the loss, no booster is added.

    Raises:
        XgbloraError: The examples have different options, or only one; the model's layers cannot be looked into; the
            pair in training has learned something; or scores are not finite.

    Example::

        ledger = Ledger(attach(model))
        add_base_score(ledger, rows[:64])
        Trainer(model, config, ledger, rows).train()
    """
    require_same_options(rows)
    adapters = ledger.adapters
    if not adapters.base.layers:
        raise XgbloraError(f"--base_score finds no decoder layers in {type(adapters.model).__name__}: leave it out")
    if not adapters.pair_is_zero:
        raise XgbloraError("the pair in training has learned something: merge it before a base score (Ledger.merge)")
    logger.info("Fitting a constant to %d examples (--base_score)", len(rows))
    rank = adapters.rank
    adapters.resize_pair(1)
    try:
        cost = _merge_constant(ledger, rows, worth, seed)
    finally:
        adapters.resize_pair(rank)
        adapters.new_pair(adapters.boosters)
    return cost


def _merge_constant(ledger: Ledger, rows: Sequence[Example], worth: Worth | None, seed: int) -> Cost:
    """Merge the best constant, which the pair of rank 1 is made to be; the pair stays where none helps."""
    adapters = ledger.adapters
    with adapters.base.without_gradients():
        search = _Search(adapters, rows, worth, generator(seed, Stream.BASE_SCORE, adapters.boosters))
        name, B, after = search.best_layer()
        losses = {0.0: search.loss(name, 0 * B), 1.0: after}

        def loss_at(step: float) -> float:
            if step not in losses:
                losses[step] = search.loss(name, step * B)
            return losses[step]

        step = line_search(loss_at, start=1.0)
        search.put(name, step * B)
    if step:
        ledger.merge(0, "the start", losses[0.0], reason=f"base score of {len(rows)} examples")
    logger.info("Base score: %s, from %d examples: loss %.4f -> %.4f", name, len(rows), losses[0.0], losses[step])
    return search.cost


def require_same_options(rows: Sequence[Example]) -> None:
    """Raise :class:`XgbloraError` where a constant cannot say of each option how likely it is."""
    if len({tuple(map(tuple, row.options)) for row in rows}) != 1 or len(rows[0].options) < 2:
        raise XgbloraError("--base_score needs the same options in every row, at least two of them: leave it out")


class _Search:
    """What a constant in one layer does to the options' scores of some examples."""

    def __init__(
        self,
        adapters: Adapters,
        rows: Sequence[Example],
        worth: Worth | None,
        draw: torch.Generator,
    ) -> None:
        self.adapters, self.base, self.draw = adapters, adapters.base, draw
        self.cost = Cost()
        self.option_loss = OptionLoss()
        self.batches = [batch.to(self.base.device) for batch in parts(rows, self.base.packed)]
        self.candidates = adapters.last_in_training()
        self.means: dict[str, Tensor] = {}
        """Mean input (in,) of each candidate where something is predicted."""
        self.sizes: dict[str, float] = {}
        """How long what it gives there is, root mean square."""
        self.scores = self._look()
        if not self.scores.isfinite().all():
            raise XgbloraError("--base_score: the base's scores are not finite: load it in float32 or bfloat16")
        self.targets = self._targets(rows, worth)

    def _look(self) -> Tensor:
        """Scores (examples, options) as they are; on the way, what enters the candidates."""
        layers = [self.adapters.layers[name] for name in self.candidates]
        scores, inputs = [], []
        for batch, seen in zip(self.batches, self.base.observe(self.batches, layers), strict=True):
            scores.append(option_scores(self.base, seen.final, batch).float())
            inputs.append(seen.inputs)
            self._count(batch, 1)
        with self.base.held():
            for name, layer, of_batches in zip(self.candidates, layers, zip(*inputs, strict=True), strict=True):
                x = torch.cat(of_batches)
                self.means[name] = x.float().mean(0)
                given: Tensor = layer.base_layer(x)
                self.sizes[name] = given.float().square().mean(1).sqrt().median().item()
        return torch.cat(scores)

    def _targets(self, rows: Sequence[Example], worth: Worth | None) -> Tensor:
        """How likely each option (examples, options) is to be."""
        if worth is None:
            right = F.one_hot(torch.tensor([row.label for row in rows]), len(rows[0].options)).float()
        else:
            values = torch.tensor([list(worth(row)) for row in rows])
            right = (values == values.amax(1, keepdim=True)).float()
        return (right / right.sum(1, keepdim=True)).to(self.scores.device)

    def best_layer(self) -> tuple[str, Tensor, float]:
        """The candidate whose constant has the lowest loss, that constant B (out,), and its loss."""
        tried = []
        for name in self.candidates:
            B = self._along(name)
            tried.append((name, B, self.loss(name, B)))
        return min(tried, key=lambda of_layer: of_layer[2])

    def _along(self, name: str) -> Tensor:
        """The shortest B (out,), of those that were probed, that moves all scores by what :meth:`_constants` says."""
        directions, moved = self._respond(name)
        if not moved.isfinite().all():
            return torch.zeros_like(directions[0])
        weights = torch.linalg.pinv(moved.double()).T @ self._constants()
        return weights.float() @ directions

    def _respond(self, name: str) -> tuple[Tensor, Tensor]:
        """A direction (examples, out) for each example, and how it moves its centred scores (examples, options)."""
        adapters, layer = self.adapters, self.adapters.layers[name]
        self.put(name, torch.zeros_like(layer.lora_B[:, 0]))
        size = self.sizes[name] / layer.scaling
        place = next(b for other, _, b in adapters.slices if other is layer)
        directions, probes, both = [], [], []
        for batch in self.batches:
            drawn = size * torch.randn(batch.segments, layer.out_features, generator=self.draw).to(self.base.device)
            z = drawn.new_zeros(batch.segments, adapters.size)
            z[:, place] = drawn
            signs = torch.eye(batch.segments, device=z.device)
            twice = batch.repeat(2)
            probes.append(Probe(z, torch.cat([PROBE * signs, -PROBE * signs])[twice.token_segment]))
            directions.append(drawn)
            both.append(twice)
            self._count(batch, 2)
        moved = []
        with adapters.probing(*probes) as turn:
            for scores in self.option_loss.all_scores(self.base, both, turn=turn):
                plus, minus = scores.float().view(2, -1, scores.shape[1])
                moved.append((plus - minus) / (2 * PROBE))
        together = torch.cat(moved)
        return torch.cat(directions), together - together.mean(1, keepdim=True)

    def _constants(self) -> Tensor:
        """What is added to the scores (options,) for the lowest loss, by Newton steps; their sum is 0."""
        scores, targets = self.scores.double(), self.targets.double()
        added = scores.new_zeros(scores.shape[1])
        for _ in range(50):
            chances = (scores + added).softmax(1)
            slope = (chances - targets).sum(0) + PRIOR * added
            bend = torch.diag(chances.sum(0) + PRIOR) - chances.T @ chances
            change = torch.linalg.solve(bend, slope)
            added = added - change / max(1.0, change.abs().max().item())
        return added - added.mean()

    def put(self, name: str, B: Tensor) -> None:
        """Make the pair in training the constant, with B (out,) in the layer."""
        layer = self.adapters.layers[name]
        for other in self.adapters.layers.values():
            other.lora_A.zero_()
            other.lora_B.zero_()
        mean = self.means[name]
        layer.lora_A[0] = mean / mean.dot(mean).clamp(min=torch.finfo(torch.float32).tiny)
        layer.lora_B[:, 0] = B

    def loss(self, name: str, B: Tensor) -> float:
        """Mean loss of the examples with the constant in the layer."""
        self.put(name, B)
        if not B.any():
            scores = [self.scores]
        else:
            scores = list(self.option_loss.all_scores(self.base, self.batches))
            for batch in self.batches:
                self._count(batch, 1)
        return divergences(torch.cat(scores).float(), self.targets).mean().item()

    def _count(self, batch: Batch, times: int) -> None:
        self.cost += Cost(times, times * batch.segments, times * batch.tokens)
