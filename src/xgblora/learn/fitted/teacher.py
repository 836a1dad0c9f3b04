"""What boosters are to make the model say of options, fitted once."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from xgblora.data.batch import Example
from xgblora.learn.cost import Cost
from xgblora.learn.fitted.activations import Forwards, Observed
from xgblora.learn.fitted.fit import fit
from xgblora.learn.fitted.rewarded import Rewards
from xgblora.learn.fitted.tail_loss import TailLoss

RIDGE = 1.0
"""Penalty of a fit to labels, where nothing else is known."""

WEAKER = (0.3, 0.1, 0.03)
"""Those that held-out examples may choose in its place; stronger ones did harm (docs/experiments.md, section 30)."""

ENOUGH_HELD = 32
"""Held-out examples that tell something: which ridge, or that no step of a booster helps. Of fewer it may be chance."""

MINOR = 0.01
"""Share of what inputs explain, below which a direction is left out."""


class Teacher:
    """What the boosters are to make the model say: the probabilities of options, by example."""

    def __init__(
        self,
        directions: int,
        before: float,
        losses: dict[bool, float],
        ridge: float,
        cost: Cost,
        rewards: Rewards | None = None,
    ) -> None:
        self.directions = directions
        """How many it moves final hidden states along."""
        self.before = before
        """Mean loss of the held-out examples with what the base says."""
        self.losses = losses
        """Mean loss of the held-out examples where it adds to what the base says along its directions (True), and
        where it replaces that (False). The better one is what it says."""
        self.ridge = ridge
        """Its penalty."""
        self.cost = cost
        """What was forwarded, once, to fit it."""
        self.rewards = rewards
        """What it was fitted to, in place of labels."""
        self.seen: Observed | None = None
        """What it was fitted to; a first booster may be fitted to the same."""
        self._answers: dict[Hashable, Tensor] = {}

    def learn(self, seen: Observed, probabilities: Tensor) -> None:
        """Take ``probabilities`` (examples, options) as what is to be said of the examples of ``seen``."""
        for example, row in zip(seen.examples, probabilities, strict=True):
            self._answers[_question(example)] = row[: len(example.options)]

    def loss(self, labelled: TailLoss, seen: Observed) -> float:
        """Mean loss of the model as it is: minus its mean reward, where rewards are followed."""
        return (
            labelled(seen.hidden).double().mean().item() if self.rewards is None else -self.rewards.mean(labelled, seen)
        )

    def knows(self, example: Example) -> bool:
        """Whether it was taught this example."""
        return _question(example) in self._answers

    def targets(self, examples: Sequence[Example]) -> Tensor:
        """Probabilities (examples, options), 0 where an example has no option."""
        rows = [self._answers[_question(example)] for example in examples]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _question(example: Example) -> Hashable:
    """What an example asks, without its answer."""
    return tuple(example.prompt), tuple(tuple(option) for option in example.options), example.score_prompt


@dataclass(frozen=True)
class _Answer:
    """What a teacher that was fitted in one way says."""

    kept: bool
    """Whether it adds to what the base says."""
    ridge: float
    seen: Tensor
    """Probabilities (examples, options)."""
    unseen: Tensor
    losses: Tensor
    """Of the held-out examples (examples,)."""

    @property
    def loss(self) -> float:
        return self.losses.mean().item()


@torch.no_grad()
def teach(
    forwards: Forwards,
    examples: Sequence[Example],
    held: Sequence[Example],
    ridge: float | None = None,
    directions: int = 4,
    opinion: Literal["auto", "keep", "drop"] = "auto",
    rewards: Rewards | None = None,
) -> Teacher:
    """Fit a :class:`Teacher` of ``examples`` and ``held`` to the model as it is, with one forward over them.

    It says what the model would, could the attention layers that train write sum_r f_tr u_r straight into the final
    hidden states h_t. What the base itself says along the directions u_r may be knowledge or prejudice.

    Args:
        forwards: Of the adapters whose layers it is fitted to.
        examples: What it is fitted on.
        held: Examples that nothing is fitted on.
        ridge: Penalty, as in :func:`fit`. None: RIDGE, or the one of WEAKER with the lowest loss on ``held``, along the
            u_r that RIDGE finds.
        directions: At most so many u_r.
        opinion: "keep" adds f to what the base says along them, "drop" replaces it by f, "auto" takes what has the
            lower loss on ``held``.
        rewards: Fit to what these want said, in place of the labels.

    Raises:
        XgbloraError: Rewards tell nothing apart.
    """
    tokens, forwards.work = forwards.tokens, "teacher"
    both = forwards.observe(examples, held)
    seen, unseen = (replace(observed, written=None) for observed in both)
    loss, check = (TailLoss(forwards, observed) for observed in (seen, unseen))
    if rewards is not None:
        tau = rewards.tau(seen.examples)
        wanted = [rewards.targets(*pair, tau) for pair in ((loss, seen), (check, unseen))]
        loss, check = (TailLoss(forwards, *pair) for pair in zip((seen, unseen), wanted, strict=True))
    outputs: Tensor | None = None

    def answer(kept: bool, ridge: float) -> _Answer:
        nonlocal outputs
        fitted, new = seen, unseen
        if outputs is not None and not kept:  # the directions are those with its opinion
            fitted, new = (replace(part, hidden=without(part.hidden, outputs)) for part in (seen, unseen))
        learner = fit(fitted, loss, ridge, directions if outputs is None else outputs, MINOR, forwards.tell)
        outputs = learner.outputs
        moved = new.hidden + learner.at(new) @ outputs
        probabilities = loss.probabilities(fitted.hidden + learner.change @ outputs)
        return _Answer(kept, ridge, probabilities, check.probabilities(moved), check(moved).double())

    with forwards.base.held():
        before = check(unseen.hidden).double().mean().item()
        answers = [answer(kept, ridge or RIDGE) for kept in ((True,) if opinion == "keep" else (True, False))]
        if opinion == "drop":
            del answers[0]
        best = min(answers, key=lambda one: one.loss)
        if ridge is None and len(held) >= ENOUGH_HELD:
            best = _better_ridge(best, partial(answer, best.kept))
    losses = {one.kept: one.loss for one in answers} | {best.kept: best.loss}
    cost = Cost(1, len(seen.examples) + len(unseen.examples), forwards.tokens - tokens)
    assert outputs is not None
    teacher = Teacher(len(outputs), before, losses, best.ridge, cost, rewards)
    teacher.learn(seen, best.seen)
    teacher.learn(unseen, best.unseen)
    teacher.seen = both[0]
    return teacher


def _better_ridge(best: _Answer, answer: Callable[[float], _Answer]) -> _Answer:
    """Weaken the penalty as long as the held-out loss falls.

    It has to fall by more than a standard error, paired by example: else it may be chance.
    """
    for ridge in WEAKER:
        other = answer(ridge)
        less = best.losses - other.losses
        if less.mean() <= less.std(correction=0) / len(less) ** 0.5:
            break
        best = other
    return best


def without(hidden: Tensor, outputs: Tensor) -> Tensor:
    """Hidden states (T, hidden) with nothing along the directions ``outputs`` (directions, hidden)."""
    return hidden - hidden @ outputs.T @ outputs
