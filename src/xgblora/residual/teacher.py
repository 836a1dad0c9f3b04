"""What boosters are to make the model say of options, fitted once."""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from xgblora.adapters import Adapters
from xgblora.lower_layers import LowerLayers
from xgblora.packing import Example
from xgblora.residual.activations import Forwards, Observed, Tail, TailLoss
from xgblora.residual.fit import Kernel, fit

MOST_TAUGHT = 4096
"""Predicting positions that a teacher is fitted on at most."""


class Teacher:
    """What the boosters are to make the model say: the probabilities of options, by example.

    ``directions``: how many it moves final hidden states along. ``losses``: mean loss of the held-out examples where it
    adds to what the base says along them itself (True), and where it replaces that (False); the better one is what it
    says. ``sequences`` and ``tokens``: what was forwarded, once, to fit it.
    """

    def __init__(self, directions: int, losses: dict[bool, float], sequences: int, tokens: int) -> None:
        self.directions = directions
        self.losses = losses
        self.sequences = sequences
        self.tokens = tokens
        self._said: dict[Hashable, Tensor] = {}

    def learn(self, seen: Observed, probabilities: Tensor) -> None:
        """Take ``probabilities`` (examples, options) as what is to be said of the examples of ``seen``."""
        for example, row in zip(seen.examples, probabilities, strict=True):
            self._said[_asked(example)] = row[: len(example.options)]

    def knows(self, example: Example) -> bool:
        """Whether it was taught this example."""
        return _asked(example) in self._said

    def targets(self, examples: Sequence[Example]) -> Tensor:
        """Probabilities (examples, options), 0 where an example has no option."""
        return nn.utils.rnn.pad_sequence([self._said[_asked(example)] for example in examples], batch_first=True)


def _asked(example: Example) -> Hashable:
    """What an example asks, without its answer."""
    return tuple(example.prompt), tuple(tuple(option) for option in example.options), example.score_prompt


@torch.no_grad()
def teach(
    adapters: Adapters,
    examples: Sequence[Example],
    held: Sequence[Example],
    tail: Tail,
    *,
    packed: bool = True,
    ridge: float = 1.0,
    directions: int = 4,
    opinion: Literal["auto", "keep", "drop"] = "auto",
    lower_layers: LowerLayers | None = None,
) -> Teacher:
    """Fit a :class:`Teacher` of ``examples`` and ``held`` to the model as it is, with one forward over them.

    It says what the model would, could the attention layers that train write sum_r f_tr u_r straight into the final
    hidden states h_t: :func:`fit` with at most ``directions`` u_r. What the base itself says along them may be
    knowledge or prejudice. ``opinion``: "keep" adds f to it, "drop" replaces it by f, "auto" takes what has the lower
    loss on ``held``, which nothing is fitted on.
    """
    forwards = Forwards(adapters, True, packed, lower_layers)
    seen, unseen = (replace(forwards.observe(rows, MOST_TAUGHT), written=None) for rows in (examples, held))
    kernel = Kernel(seen.inputs)
    loss, check = (TailLoss(tail, each, True) for each in (seen, unseen))
    outputs: Tensor | None = None
    found: dict[bool, tuple[Tensor, Tensor, float]] = {}
    for kept in (True,) if opinion == "keep" else (True, False):
        own, new = seen, unseen
        if outputs is not None:  # the directions are those found with its opinion
            own, new = (replace(each, hidden=without(each.hidden, outputs)) for each in (seen, unseen))
        learner = fit(own, loss, ridge, directions, outputs, kernel)
        outputs = learner.outputs
        moved = new.hidden + learner.at(new) @ outputs
        said = loss.probabilities(own.hidden + learner.change @ outputs)
        found[kept] = said, check.probabilities(moved), check(moved)[0].double().mean().item()
    losses = {kept: found[kept][2] for kept in found if not (kept and opinion == "drop")}
    teacher = Teacher(len(learner.outputs), losses, len(seen.examples) + len(unseen.examples), forwards.tokens)
    said, said_unseen, _ = found[min(losses, key=losses.__getitem__)]
    teacher.learn(seen, said)
    teacher.learn(unseen, said_unseen)
    return teacher


def without(hidden: Tensor, outputs: Tensor) -> Tensor:
    """Hidden states (T, hidden) with nothing along the directions ``outputs`` (directions, hidden)."""
    return hidden - hidden @ outputs.T @ outputs
