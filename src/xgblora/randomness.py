"""Random numbers from a counter: what a generator yields depends on its key alone, never on what ran before."""

from typing import Literal, get_args

import numpy as np
import torch

Purpose = Literal["pair", "direction", "split", "layers", "search", "demonstrations"]

_PURPOSES: tuple[Purpose, ...] = get_args(Purpose)


def generator(seed: int, purpose: Purpose, *counter: int) -> torch.Generator:
    """A CPU generator for one use.

    ``seed`` is the run's, ``purpose`` keeps uses apart, ``counter`` is the place in the run (step, micro-batch,
    booster, ...), all non-negative. Equal keys give equal numbers on every platform and after every resume.
    """
    key = np.random.SeedSequence([seed, _PURPOSES.index(purpose), *counter])
    return torch.Generator().manual_seed(int(key.generate_state(1, np.uint64)[0]))
