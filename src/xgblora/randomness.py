"""Random numbers from a counter: what a generator yields depends on its key alone, never on what ran before."""

from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What random numbers are used for. The number is part of every key: never change one, only add."""

    PAIR = 0
    """First A of a pair."""
    DIRECTION = 1
    """Directions of a zeroth-order step."""
    SPLIT = 2
    """Which rows are train, development and evaluation rows."""
    LAYERS = 3
    """Layers in which a pair trains."""
    SEARCH = 4
    """Rows that are set aside to find step lengths."""
    DEMONSTRATIONS = 5
    """Answered examples in a prompt."""
    LANDMARKS = 6
    """Positions that stand for others in a fit."""
    CURVATURE = 7
    """Words that show how a loss bends."""
    KEPT = 8
    """Texts on which a booster is to change little."""
    OWN_TEXT = 9
    """What a model writes by itself."""
    ANSWERS = 10
    """Answers that are drawn to be judged, and which of them are learned from."""
    BASE_SCORE = 11
    """Examples that a constant is fitted to, and the probes that find it."""
    ACTIVATIONS = 12
    """Rows that pairs are drawn from, and their order."""


def generator(seed: int, stream: Stream, *counter: int) -> torch.Generator:
    """Make a CPU generator for one use.

    Args:
        seed: The run's seed.
        stream: Keeps uses apart.
        counter: The place in the run (step, micro-batch, booster, ...), all non-negative.

    Returns:
        A generator. Equal keys give equal numbers on every platform and after every resume.

    Examples:
        >>> torch.randperm(4, generator=generator(0, Stream.SPLIT, 1)).tolist()
        [3, 0, 1, 2]
    """
    key = np.random.SeedSequence([seed, int(stream), *counter])
    return torch.Generator().manual_seed(int(key.generate_state(1, np.uint64)[0]))
