"""What options are worth, as what a model is to say of them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xgblora.data.batch import Example
from xgblora.errors import XgbloraError
from xgblora.learn.fitted.activations import Observed
from xgblora.learn.fitted.recipe import Worth
from xgblora.learn.fitted.tail_loss import TailLoss


class Rewards:
    """The probabilities of options that have the highest mean reward, not far from what the model says.

    They maximise sum_o p_o r_o - tau KL(p || q), where q is what the model says: p_o is q_o exp(r_o / tau), normalised
    (Peters and Schaal 2007, "Reinforcement learning by reward-weighted regression for operational space control").
    tau is ``temperature`` times the standard deviation of rewards around the mean of their example's.

    Args:
        worth: What each of an example's options is worth. It is asked once for an example.
        temperature: Without unit, so that rewards may have any.
    """

    def __init__(self, worth: Worth, temperature: float) -> None:
        self.worth = worth
        self.temperature = temperature
        self._known: dict[int, tuple[Example, Tensor]] = {}

    def table(self, examples: Sequence[Example]) -> Tensor:
        """Rewards (examples, options), 0 where an example has no option."""
        return nn.utils.rnn.pad_sequence([self._of(example) for example in examples], batch_first=True)

    def _of(self, example: Example) -> Tensor:
        """Rewards (options,), asked for once; the example is kept, so that its id stays its own."""
        if id(example) not in self._known:
            self._known[id(example)] = example, torch.tensor(list(self.worth(example)))
        return self._known[id(example)][1]

    def tau(self, examples: Sequence[Example]) -> float:
        """In units of the rewards. Raises :class:`XgbloraError` where no example has a better and a worse option."""
        variances = [self._of(example).double().var(correction=0) for example in examples]
        spread = torch.stack(variances).mean().sqrt().item()
        if spread == 0:
            raise XgbloraError(
                "the reward is the same for all options of every training row: it must tell a better one from a worse"
            )
        return self.temperature * spread

    def targets(self, loss: TailLoss, seen: Observed, tau: float) -> Tensor:
        """The probabilities (examples, options), 0 where an example has no option."""
        chances = loss.probabilities(seen.hidden)
        return (chances.log() + self.table(seen.examples).to(chances.device) / tau).softmax(1)

    def mean(self, loss: TailLoss, seen: Observed) -> float:
        """The mean reward of answers as often as the model gives them."""
        chances = loss.probabilities(seen.hidden)
        return (chances * self.table(seen.examples).to(chances.device)).sum(1).mean().item()
