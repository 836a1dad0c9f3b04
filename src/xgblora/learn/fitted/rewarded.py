"""What answers are worth, as what a model is to say."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from xgblora.data.batch import Example
from xgblora.errors import XgbloraError
from xgblora.learn.cost import Cost
from xgblora.learn.fitted.activations import Observed
from xgblora.learn.fitted.recipe import Worth, Written
from xgblora.learn.fitted.tail_loss import TailLoss
from xgblora.randomness import Stream, generator

logger = logging.getLogger(__name__)


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
        spread = _spread([self._of(example) for example in examples])
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


def _spread(rewards: Iterable[Tensor]) -> float:
    """Standard deviation of rewards around the mean of their example's, whose answers' are a row each."""
    return torch.stack([row.double().var(correction=0) for row in rewards]).mean().sqrt().item()


class Drawn:
    """Rows to learn from where answers are written: to a prompt, one of those that the model writes, by its reward.

    Of some answers drawn from what the model says, q, one is taken with a chance that goes by exp(r / tau): nearly a
    draw from q exp(r / tau), which :class:`Rewards` has of options, with the same tau. A prompt whose answers are
    all worth the same says nothing, and is left out.

    Args:
        written: Draws answers and judges them.
        temperature: As :class:`Rewards` takes it.
        seed: Of what is drawn.
    """

    def __init__(self, written: Written, temperature: float, seed: int) -> None:
        self.written = written
        self.temperature = temperature
        self.seed = seed

    def rows(self, groups: Sequence[Sequence[Example]], number: int) -> tuple[list[list[Example]], float, Cost]:
        """Rows of each group for booster ``number``, the mean reward of the model's answers, and what that took."""
        draw = generator(self.seed, Stream.ANSWERS, number)
        with torch.random.fork_rng():
            torch.manual_seed(draw.initial_seed())
            judged = [list(self.written(group)) for group in groups]
        worth = torch.tensor([rewards for group in judged for _, rewards in group], dtype=torch.float64)
        tau = self.temperature * _spread(worth)
        chosen: list[list[Example]] = []
        for group, answers in zip(groups, judged, strict=True):
            chosen.append([])
            for example, (drawn, rewards) in zip(group, answers, strict=True):
                if max(rewards) > min(rewards):
                    chances = (torch.tensor(rewards, dtype=torch.float64) / tau).softmax(0)
                    taken = int(torch.multinomial(chances, 1, generator=draw))
                    chosen[-1].append(replace(example, options=[drawn[taken]], label=0, score_prompt=False))
        logger.info(
            "%d of %d prompts have answers of different worth, %.4f in the mean",
            *(sum(map(len, chosen)), len(worth), worth.mean()),
        )
        tokens = sum(
            len(example.prompt) + len(ids) - 1
            for group, answers in zip(groups, judged, strict=True)
            for example, (drawn, _) in zip(group, answers, strict=True)
            for ids in drawn
        )
        return chosen, worth.mean().item(), Cost(1, worth.numel(), tokens)
