"""What boosters are to make the model say of options, fitted once."""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from xgblora.data.batch import Example
from xgblora.learn.cost import Cost
from xgblora.learn.fitted.activations import Forwards, Observed
from xgblora.learn.fitted.fit import fit
from xgblora.learn.fitted.rewarded import Rewards
from xgblora.learn.fitted.tail_loss import TailLoss

MINOR = 0.01
"""Share of what inputs explain, below which a direction is left out."""


class Teacher:
    """What the boosters are to make the model say: the probabilities of options, by example."""

    def __init__(
        self, directions: int, before: float, losses: dict[bool, float], cost: Cost, rewards: Rewards | None = None
    ) -> None:
        self.directions = directions
        """How many it moves final hidden states along."""
        self.before = before
        """Mean loss of the held-out examples with what the base says."""
        self.losses = losses
        """Mean loss of the held-out examples where it adds to what the base says along its directions (True), and
        where it replaces that (False). The better one is what it says."""
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


@torch.no_grad()
def teach(
    forwards: Forwards,
    examples: Sequence[Example],
    held: Sequence[Example],
    ridge: float = 1.0,
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
        ridge: Penalty, as in :func:`fit`.
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
    answers: dict[bool, tuple[Tensor, Tensor, float]] = {}
    with forwards.base.held():
        before = check(unseen.hidden).double().mean().item()
        for kept in (True,) if opinion == "keep" else (True, False):
            fitted, new = seen, unseen
            if outputs is not None:  # the directions are those with its opinion
                fitted, new = (replace(part, hidden=without(part.hidden, outputs)) for part in (seen, unseen))
            learner = fit(fitted, loss, ridge, directions if outputs is None else outputs, MINOR, forwards.tell)
            outputs = learner.outputs
            moved = new.hidden + learner.at(new) @ outputs
            probabilities = loss.probabilities(fitted.hidden + learner.change @ outputs)
            answers[kept] = probabilities, check.probabilities(moved), check(moved).double().mean().item()
    losses = {kept: answers[kept][2] for kept in answers if not (kept and opinion == "drop")}
    cost = Cost(1, len(seen.examples) + len(unseen.examples), forwards.tokens - tokens)
    teacher = Teacher(len(learner.outputs), before, losses, cost, rewards)
    of_seen, of_unseen, _ = answers[min(losses, key=losses.__getitem__)]
    teacher.learn(seen, of_seen)
    teacher.learn(unseen, of_unseen)
    teacher.seen = both[0]
    return teacher


def without(hidden: Tensor, outputs: Tensor) -> Tensor:
    """Hidden states (T, hidden) with nothing along the directions ``outputs`` (directions, hidden)."""
    return hidden - hidden @ outputs.T @ outputs
