"""Recipe boost: each booster is fitted to what the model still gets wrong, its step length found by forward passes."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from xgblora.adapters.adapters import Adapters
from xgblora.base.prefix import Prefix
from xgblora.config import RunConfig
from xgblora.data.batch import Example
from xgblora.errors import XgbloraError
from xgblora.learn.cost import Cost
from xgblora.learn.fitted.activations import Forwards, Observed
from xgblora.learn.fitted.fit import Learner, fit
from xgblora.learn.fitted.kept import look_beside
from xgblora.learn.fitted.recipe import Fit, Recipe, Worth, Written
from xgblora.learn.fitted.rewarded import Drawn, Rewards
from xgblora.learn.fitted.step_length import likely_next, line_search, shortest_as_good
from xgblora.learn.fitted.tail_loss import TailLoss, scored
from xgblora.learn.fitted.teacher import ENOUGH_HELD, RIDGE, Teacher, teach
from xgblora.learn.fitted.writers import require_writers, turned_down, writers_in_training, written_along
from xgblora.learn.losses import AnswerLoss, OptionLoss
from xgblora.randomness import Stream, generator

logger = logging.getLogger(__name__)

MOST_DIRECTIONS = 8
"""Directions of a booster at most, where nobody says how many."""

TEXT_DIRECTIONS = 16
"""Those of a booster of text (docs/experiments.md)."""

FAR_AHEAD = 0.8
"""Loss of a teacher, as a share of the base's, below which some step of a first booster must come nearer to it."""


class BoostRecipe(Recipe):
    """Boosters fitted to pseudo-residuals; where there are options to choose from, they follow one teacher."""

    def __init__(
        self,
        adapters: Adapters,
        loss: AnswerLoss,
        config: RunConfig,
        prefix: Prefix,
        worth: Worth | None = None,
        written: Written | None = None,
    ) -> None:
        require_writers(adapters)  # before anything is computed
        self.rewards = None if worth is None else Rewards(worth, config.boost_temperature)
        """What options are worth, where that is followed instead of labels."""
        self.drawn = None if written is None else Drawn(written, config.boost_temperature, config.seed)
        """What written answers are worth, where that is followed."""
        self.adapters = adapters
        self.config = config
        self.forwards = Forwards(adapters, loss, prefix, config.forward_tokens)
        self.teacher: Teacher | None = None
        """What every booster follows; fitted in the first step."""
        self.searched: list[Example] = []
        """Rows that find every booster's step length."""
        self.fitted: list[Example] = []
        self.first = adapters.boosters
        """Boosters that were there before training began."""

    def split(self, rows: Sequence[Example]) -> list[Example]:
        """Set aside the rows that find step lengths, once for the run, and give the pair its rank.

        Drawn anew for each booster, they would be rows that earlier boosters were fitted on, and the search would take
        learning by heart for progress (docs/experiments.md).
        """
        count = self.config.boost_searched(len(rows))
        order = torch.randperm(len(rows), generator=generator(self.config.seed, Stream.SEARCH)).tolist()
        fitted = order[count : count + self.config.boost_teacher_examples]
        give_rank(self.adapters, self._directions(rows))
        self.searched = [rows[i] for i in order[:count]]
        self.fitted = [rows[i] for i in sorted(fitted)]
        return self.fitted

    def keep(self, texts: Sequence[Example]) -> None:
        self.forwards.kept, self.forwards.keep_weight = texts, self.config.boost_keep_weight

    def _directions(self, rows: Sequence[Example]) -> int:
        """How many directions a booster moves final hidden states along, which is the rank of its pair."""
        if self.config.boost_directions is not None:
            return self.config.boost_directions
        if not isinstance(self.forwards.loss, OptionLoss):
            return min(TEXT_DIRECTIONS, self.adapters.base.width)
        return min(MOST_DIRECTIONS, option_directions(rows))

    @property
    def _ridge(self) -> float:
        """Of boosters that are fitted without a teacher."""
        return self.config.boost_ridge or RIDGE

    def fit(self, examples: Sequence[Example], start: float) -> Fit:
        cost = Cost()
        self.forwards.note = self.note
        if self.drawn is not None:
            return self._fit_drawn(self.drawn, examples, start)
        if isinstance(self.forwards.loss, OptionLoss) and self.teacher is None:
            self.teacher, cost = self._teach()
        booster = boost(
            self.forwards,
            self._seen(examples) or examples,
            self.searched,
            ridge=self._ridge if self.teacher is None else self.config.boost_follow_ridge,
            teacher=self.teacher,
            start=start,
            shrinkage=self.config.xgblora_shrinkage,
        )
        if self.adapters.boosters == self.first and booster.step_length == 0:
            self._require_reached()
        return replace(booster, cost=cost + booster.cost)

    def _fit_drawn(self, drawn: Drawn, examples: Sequence[Example], start: float) -> Fit:
        """Fit the pair to answers that the model writes, taken by their reward; the loss is minus the mean reward."""
        self.note("writing answers to judge")
        (fitted, searched), mean, cost = drawn.rows([examples, self.searched], self.adapters.boosters)
        if len(fitted) < 2 or not searched:
            if self.adapters.boosters == self.first:
                raise XgbloraError(
                    "the reward is the same for all answers that the model writes to a prompt, of nearly all prompts: "
                    "it must tell a better one from a worse (--reward_samples draws more of them)"
                )
            return Fit(loss=-mean, before=0.0, after=0.0, step_length=0.0, cost=cost)
        shrinkage = self.config.xgblora_shrinkage
        booster = boost(self.forwards, fitted, searched, ridge=self._ridge, start=start, shrinkage=shrinkage)
        return replace(booster, loss=-mean, cost=cost + booster.cost)

    def _seen(self, examples: Sequence[Example]) -> Observed | None:
        """What the teacher saw, where a first booster is fitted to the same rows. It is kept no longer."""
        if self.teacher is None:
            return None
        seen, self.teacher.seen = self.teacher.seen, None
        same = seen is not None and len(seen.examples) == len(examples) == len(self.fitted)
        return seen if same and self.adapters.boosters == self.first else None

    def _require_reached(self) -> None:
        """Raise :class:`XgbloraError` where a first booster without a step means that something is wrong."""
        if self.teacher is None or len(self.searched) < ENOUGH_HELD:
            return
        best, before = min(self.teacher.losses.values()), self.teacher.before
        if best < FAR_AHEAD * before:
            kind = type(self.adapters.model).__name__
            raise XgbloraError(
                f"--recipe boost: no step of the first booster comes nearer to its teacher (held-out loss {best:.2f}, "
                f"the base has {before:.2f}): what it writes does not reach the head of {kind} as measured; use "
                "--recipe classic"
            )

    def _teach(self) -> tuple[Teacher, Cost]:
        """Fit the teacher to the model as it was before the first booster; a resumed run has some already."""
        config, resumed = self.config, self.adapters.boosters > self.first
        with self.adapters.first(self.first):
            self.adapters.choose_layers(self.first)
            teacher = teach(
                self.forwards,
                self.fitted,
                self.searched,
                ridge=config.boost_ridge,
                directions=config.boost_boosters * self.adapters.rank,
                opinion=config.boost_opinion,
                rewards=self.rewards,
            )
        self.adapters.choose_layers(self.adapters.boosters)
        if resumed:
            if self.forwards.prefix is not None and not self.adapters.same_layers_next:
                self.forwards.prefix.clear()
            return teacher, Cost()  # it was counted when it was fitted first
        losses = ", ".join(
            f"{loss:.4f} {'added to' if kept else 'in place of'} the base's opinion"
            for kept, loss in teacher.losses.items()
        )
        logger.info(
            "Teacher of %d examples, along %d direction(s), ridge %g; held-out loss %s",
            *(teacher.cost.sequences, teacher.directions, teacher.ridge, losses),
        )
        return teacher, teacher.cost


def give_rank(adapters: Adapters, rank: int) -> None:
    """Let the pair in training, which is a new one, have this rank.

    Raises:
        XgbloraError: It has another one, and has learned something.
    """
    if adapters.rank == rank:
        return
    if not adapters.pair_is_zero:
        raise XgbloraError(
            f"boosters of this training have rank {rank}, and the pair that is there, of rank {adapters.rank}, has "
            "learned something: merge it first (Ledger.merge)"
        )
    adapters.resize_pair(rank)


def option_directions(rows: Sequence[Example]) -> int:
    """How many directions tell the options of each row apart: one less than there are, and at least one."""
    return max(max(len(row.options) for row in rows) - 1, 1)


@torch.no_grad()
def boost(
    forwards: Forwards,
    examples: Sequence[Example] | Observed,
    searched: Sequence[Example],
    ridge: float = 1.0,
    teacher: Teacher | None = None,
    start: float = 1.0,
    shrinkage: float = 1.0,
) -> Fit:
    """Fit the pair in training to the pseudo-residuals of some examples, in place.

    It moves final hidden states along as many directions at once as it has ranks, all by one step length. Where no
    step lowers the loss, it stays zero.

    Args:
        forwards: Of the adapters whose pair it is.
        examples: What the pair is fitted to; or what a forward over it saw.
        searched: Examples that no booster was fitted on; they decide the step length.
        ridge: Penalty, as in :func:`fit`.
        teacher: The loss is the divergence from what it says; without one it is that of the labels.
        start: Step length that is tried first.
        shrinkage: Multiplies the step at its end.

    Raises:
        XgbloraError: There are too few examples, or an adapted layer does not write to the residual stream.
    """
    seen = examples if isinstance(examples, Observed) else None
    if isinstance(examples, Observed):
        examples = examples.examples
    if teacher is not None:
        examples, searched = ([row for row in rows if teacher.knows(row)] for rows in (examples, searched))
    if len(examples) < 2 or not searched:
        raise XgbloraError(
            f"a booster is fitted on at least 2 examples and 1 finds its step length, got {len(examples)} and "
            f"{len(searched)}"
        )
    adapters, tokens = forwards.adapters, forwards.tokens
    require_writers(adapters)
    forwards.work = f"booster {adapters.boosters + 1}"
    looking = seen is None
    if seen is None:
        (seen,) = forwards.observe(examples)
    labelled = TailLoss(forwards, seen)
    loss = labelled if teacher is None else TailLoss(forwards, seen, teacher.targets(seen.examples))
    with forwards.base.held():
        kept = look_beside(forwards, forwards.kept, seen) if forwards.kept else None
        learner = fit(seen, loss, ridge, adapters.rank, note=forwards.tell, kept=kept)
    put(adapters, learner, 0.0)
    batches = forwards.parts(searched)
    losses: dict[float, Tensor] = {}
    asked: dict[float, Tensor] = {}

    def measure(steps: Sequence[float]) -> None:
        """The losses at some steps, by one forward over the examples for each."""
        number, done = len(losses) + 1, 0
        taken: float | None = None

        def turn(at: int) -> None:
            nonlocal taken
            if (step := steps[at // len(batches)]) != taken:
                step_by(adapters, learner, step)
                taken = step

        of_batches = []
        for batch, scores in forwards.scores(batches * len(steps), turn):
            targets = None if teacher is None else teacher.targets(batch.examples)
            of_batches.append(scored(forwards.loss, scores, batch, targets))
            done += len(batch.examples)
            forwards.tell(f"step length {number}, {done:,} of {len(steps) * len(searched):,} examples")
        for place, step in enumerate(steps):
            losses[step] = torch.cat(of_batches[place * len(batches) : (place + 1) * len(batches)]).double()

    def loss_at(step: float) -> float:
        if step not in losses:
            ahead = likely_next(step, start, asked) if forwards.base.reread else []
            measure([step, *(more for more in ahead if more not in losses)])
        asked[step] = losses[step] + step**2 * learner.kept
        return asked[step].mean().item()

    best = line_search(loss_at, start)
    chosen = shortest_as_good(asked, best) if teacher is None else best  # a teacher's words carry no chance
    step_by(adapters, learner, chosen * shrinkage)
    return Fit(
        loss=labelled(seen.hidden).double().mean().item() if teacher is None else teacher.loss(labelled, seen),
        before=losses[0.0].mean().item(),
        after=losses[chosen].mean().item(),
        step_length=chosen,
        cost=Cost(
            looking + len(losses) + (kept is not None),
            looking * len(seen.examples) + len(searched) * len(losses) + (len(kept.seen.examples) if kept else 0),
            forwards.tokens - tokens,
        ),
    )


def put(adapters: Adapters, learner: Learner, step: float) -> None:
    """The learner as the pair in training: A = a_m, B = step * v / scaling; zero in layers that do not train.

    v is what the layer must give for u to arrive in the final hidden states: u itself, where it passes as it is. In
    layers that are turned down, a_m = -gamma W_m^T v', with what they write along v' arriving along u. A learner of
    fewer directions than the pair has ranks leaves the last ones zero.
    """
    inputs = iter(learner.inputs)
    writers = writers_in_training(adapters)
    for (layer, _, _), writer, down in zip(adapters.slices, writers, turned_down(adapters), strict=True):
        if down:
            along = writer.adjoint(learner.outputs)
            A = -learner.share[:, None] * written_along(layer, along, adapters.base.dtype)
        else:
            A = next(inputs)
        layer.lora_A.copy_(F.pad(A, (0, 0, 0, adapters.rank - len(A))))
    step_by(adapters, learner, step)


def step_by(adapters: Adapters, learner: Learner, step: float) -> None:
    """The learner that was put there, with another step."""
    for layer in adapters.layers.values():
        layer.lora_B.zero_()
    for (layer, _, _), writer in zip(adapters.slices, writers_in_training(adapters), strict=True):
        layer.lora_B[:, : len(learner.outputs)] = step / layer.scaling * writer.inverse(learner.outputs).T
