"""Forward passes that keep what a fit needs: what layers see, and what leaves the last one."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import compress, islice
from typing import Any

import torch
from torch import Tensor

from xgblora.adapters.adapters import Adapters
from xgblora.adapters.linear import AdaptedLinear
from xgblora.base import Observation
from xgblora.base.layer_major import Turn, no_turn
from xgblora.base.prefix import Prefix
from xgblora.data.batch import Batch, Example, build_batch, split_by_tokens
from xgblora.group import gather, gather_parts, mine, size
from xgblora.learn.fitted.kernel import Kernel
from xgblora.learn.fitted.recipe import no_note
from xgblora.learn.fitted.tail import Tail
from xgblora.learn.fitted.writers import bias, turned_down
from xgblora.learn.losses import AnswerLoss
from xgblora.randomness import Stream, generator

PART_TOKENS = 1024
"""Tokens of one forward."""

MOST_POSITIONS = 65_536
"""Predicting positions of one fit at most."""

ALL_LANDMARKS = 4096
"""Up to so many positions, all are landmarks: a fit takes time with the third power of their number."""

LANDMARKS = 2048
"""How many of more positions are."""


@dataclass(frozen=True)
class Seen:
    """Activations where something is predicted: T of them, in the order of the batches' ``read``."""

    batches: list[Batch]
    """What was forwarded."""
    written: Tensor | None
    """(T, hidden) float32, what the layers that are only turned down write together, without their biases."""
    hidden: Tensor
    """(T, hidden) float32, as the last decoder layer leaves it."""

    @property
    def examples(self) -> list[Example]:
        """What was forwarded, in the order of the batches."""
        return [example for batch in self.batches for example in batch.examples]

    def opinion(self, outputs: Tensor) -> Tensor:
        """``written`` along directions (directions, hidden): (T, directions), or (T, 1) zeros where there is none."""
        return self.hidden.new_zeros(len(self.hidden), 1) if self.written is None else self.written @ outputs.T


@dataclass(frozen=True)
class Beside(Seen):
    """Of text that a fit looks at by the side."""

    coordinates: Tensor
    """(T, landmarks) float32, by the kernel of the fit."""


@dataclass(frozen=True)
class Observed(Seen):
    """Of examples that something can be fitted to."""

    kernel: Kernel
    """Of the first positions, the landmarks, or of all."""
    known: Tensor | None
    """Coordinates of all, (T, landmarks) float32, where not all are landmarks. The others' inputs are not kept."""

    @property
    def inputs(self) -> Sequence[Tensor]:
        """(landmarks, in) for each layer that is fitted, as in :class:`Observation`."""
        return self.kernel.inputs

    @property
    def coordinates(self) -> Tensor:
        """Of all positions, (T, landmarks) float32."""
        return self.kernel.landmarks if self.known is None else self.known


class Forwards:
    """Forwards of the base with its boosters and the pair as they are, counted.

    Args:
        adapters: Whose base it is.
        loss: Says how options are scored.
        prefix: Computes what lies below the lowest layer that trains.
        part_tokens: Of one forward, about.
    """

    def __init__(
        self, adapters: Adapters, loss: AnswerLoss, prefix: Prefix | None = None, part_tokens: int | None = None
    ) -> None:
        self.part_tokens = part_tokens or PART_TOKENS
        self.adapters = adapters
        self.base = adapters.base
        self.loss = loss
        self.prefix = prefix
        self.tail = Tail(adapters.base)
        self.kept: Sequence[Example] = ()
        """Other text, of which boosters are to change as little as they can."""
        self.keep_weight = 1.0
        """How much a text of these counts, beside an example that a booster is fitted to."""
        self.tokens = 0
        self.note: Callable[[str], None] = no_note
        """Told what is being done."""
        self.work = ""
        """Names what that is for."""

    def tell(self, state: str) -> None:
        """How far the work has come."""
        self.note(f"{self.work}: {state}")

    def observe(self, examples: Sequence[Example], *held: Sequence[Example]) -> list[Observed]:
        """One forward over as many examples as predict no more than MOST_POSITIONS tokens.

        Args:
            examples: What something is fitted to. Of many positions, some are landmarks.
            held: Of these all inputs are kept.

        Layers count alike where options are fitted, else by the length of the residual stream that they write to: a
        norm lets a change through that is small beside that, and text takes changes along many directions.
        """
        landmarks, others = _split(examples)
        of_groups = [self._batches(rows) for rows in (landmarks, others, *map(_by_length, held))]
        of_landmarks, of_others, *of_held = of_groups
        with closing(self._watched(of_groups)) as seen:
            first = self._observed(of_landmarks, of_others, seen)
            return [first, *(self._observed(batches, [], seen) for batches in of_held)]

    def beside(self, texts: Sequence[Example], kernel: Kernel) -> Beside:
        """One forward over texts that a fit with this kernel looks at by the side."""
        batches, coordinates, kept = self._batches(_by_length(texts)), [], _Kept()
        kernel.fetch()
        for observation in self._watched([batches]):
            coordinates.append(kernel.coordinates(observation.inputs))
            kept.keep(observation)
        known = gather(coordinates, [(reads, kernel.count) for reads in _reads_of(batches)], self.base.device)
        return Beside(batches, *self._together((kept, batches)), torch.cat(known))

    def _batches(self, examples: Sequence[Example]) -> list[Batch]:
        return [batch.to(self.base.device) for batch in self.parts(examples)]

    def parts(self, examples: Sequence[Example]) -> list[Batch]:
        """Batches of consecutive examples, as they are forwarded."""
        return list(parts(examples, self.base.packed, self.part_tokens))

    @property
    def _fitted(self) -> list[AdaptedLinear]:
        """The layers that are fitted, not only turned down."""
        layers, down = [layer for layer, _, _ in self.adapters.slices], turned_down(self.adapters)
        return list(compress(layers, (not only for only in down)))

    def _watched(self, groups: Sequence[Sequence[Batch]]) -> Generator[Observation]:
        """What batches show of the layers that are fitted, while it is told how far that is.

        Of each of these lists of batches, those that are this process's.
        """
        batches = [batches[number] for batches in groups for number in mine(len(batches))]
        everything = [batch for batches in groups for batch in batches]
        with self.base.skipping(self.prefix, self.adapters.lowest_layer):
            self.base.share_below(everything)
        self.tokens += sum(batch.tokens for batch in everything)
        return self._watch(batches)

    def _watch(self, batches: Sequence[Batch]) -> Generator[Observation]:
        layers, down = [layer for layer, _, _ in self.adapters.slices], turned_down(self.adapters)
        with self.base.skipping(self.prefix, self.adapters.lowest_layer):
            with self.base.held():
                biases = {writer.base_layer: bias(writer, self.base.dtype) for writer in compress(layers, down)}
            seen = self.base.observe((batch.filled() for batch in batches), self._fitted, biases)
            total, done = sum(len(batch.examples) for batch in batches), 0
            self.tell(f"looking at {total:,} examples")
            for batch, observation in zip(batches, seen, strict=True):
                done += len(batch.examples)
                self.tell(f"looked at {done:,} of {total:,} examples")
                yield observation

    def _observed(self, landmarks: list[Batch], others: list[Batch], seen: Iterator[Observation]) -> Observed:
        """What the next observations say, which are those of these batches."""
        inputs: list[list[Tensor]] = []
        sizes: list[list[float]] = []
        kept = _Kept()
        for observation in islice(seen, len(mine(len(landmarks)))):
            inputs.append(observation.inputs)
            sizes.append(observation.sizes)
            kept.keep(observation)
        weights = self._weights(gather_parts(sizes, len(landmarks)))
        widths = [layer.lora_A.shape[1] for layer in self._fitted]
        kernel = Kernel(SharedInputs.of(inputs, _reads_of(landmarks), widths, self.base.device), weights)
        if not others:
            return Observed(landmarks, *self._together((kept, landmarks)), kernel, None)
        kernel.fetch()
        first, beyond, reads = kernel.landmarks, _Kept(), _reads_of(others)
        known = first.new_empty(len(first) + sum(reads), len(first))
        known[: len(first)] = first
        places = known[len(first) :].split(reads)
        ours = mine(len(others))
        for number, observation in zip(ours, islice(seen, len(ours)), strict=True):
            places[number].copy_(kernel.coordinates(observation.inputs))
            beyond.keep(observation)
        if size() > 1:
            shapes = [(count, len(first)) for count in reads]
            for place, rows in zip(places, gather([places[n] for n in ours], shapes, self.base.device), strict=True):
                place.copy_(rows)
        both = self._together((kept, landmarks), (beyond, others))
        return Observed([*landmarks, *others], *both, kernel, known)

    def _together(self, *groups: tuple["_Kept", Sequence[Batch]]) -> tuple[Tensor | None, Tensor]:
        """``written`` and ``hidden`` of all these batches, as :class:`Seen` has them, of what this process kept."""
        written: list[Tensor] = []
        hidden: list[Tensor] = []
        for kept, batches in groups:
            shapes = [(reads, self.base.width) for reads in _reads_of(batches)]
            if any(turned_down(self.adapters)):
                written += gather(kept.written, shapes, self.base.device)
            hidden += gather(kept.hidden, shapes, self.base.device)
        return torch.cat(written) if written else None, torch.cat(hidden)

    def _weights(self, sizes: Sequence[Sequence[float]]) -> list[float] | None:
        """How much each layer counts, with the lengths that batches saw around them. None: all alike."""
        if not self.loss.normalised:
            return None
        means = [sum(of_layer) / len(of_layer) for of_layer in zip(*sizes, strict=True)]
        return [mean / max(means) for mean in means]

    def scores(self, batches: Sequence[Batch], turn: Turn = no_turn) -> Iterator[tuple[Batch, Tensor]]:
        """Each of ``batches`` with its option scores (examples, options); ``turn`` as in :meth:`Base.hidden`."""
        filled = [batch.to(self.base.device).filled() for batch in batches]
        ours = mine(len(filled))
        self.tokens += sum(batch.tokens for batch in batches)
        with self.base.skipping(self.prefix, self.adapters.lowest_layer):
            self.base.share_below(filled)
            scores = self.loss.all_scores(
                self.base, [filled[number] for number in ours], turn=lambda place: turn(ours[place])
            )
            if size() > 1:  # the others' come when all are done
                shapes = [(batch.segments, batch.max_options) for batch in filled]
                scores = iter(gather(list(scores), shapes, self.base.device))
            yield from zip(filled, scores, strict=True)


class SharedInputs(Sequence[Tensor]):
    """Inputs of each layer, whose rows lie with the processes that saw them, and come when a layer is asked for.

    So no process holds more of the others than one layer's. All must ask for the same layers in the same order.
    """

    def __init__(self, ours: list[list[Tensor]], reads: Sequence[int], widths: list[int], device: torch.device) -> None:
        self.ours, self.reads, self.widths, self.device = ours, reads, widths, device

    @classmethod
    def of(
        cls, ours: list[list[Tensor]], reads: list[int], widths: list[int], device: torch.device
    ) -> Sequence[Tensor]:
        """The inputs (T, in) of each layer, of ``ours`` by part.

        Args:
            ours: (reads, in) for each layer, of each part that is this process's.
            reads: Of every part.
            widths: ``in`` of each layer.
            device: Where they go.
        """
        if size() == 1:
            return [torch.cat(rows) for rows in zip(*ours, strict=True)]
        return cls(ours, reads, widths, device)

    def __len__(self) -> int:
        return len(self.widths)

    def __getitem__(self, layer: Any) -> Any:
        if layer >= len(self.widths):
            raise IndexError(layer)
        shapes = [(count, self.widths[layer]) for count in self.reads]
        return torch.cat(gather([of_part[layer].float() for of_part in self.ours], shapes, self.device))


class _Kept:
    """What observations show of the residual stream, by batch."""

    def __init__(self) -> None:
        self.written: list[Tensor] = []
        self.hidden: list[Tensor] = []

    def keep(self, observation: Observation) -> None:
        if observation.written is not None:
            self.written.append(observation.written)
        self.hidden.append(observation.last.float())


def _split(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Those of the first MOST_POSITIONS positions: the landmarks' and the others, each shortest first."""
    chosen = within(examples, MOST_POSITIONS)
    if sum(map(_reads, chosen)) <= ALL_LANDMARKS:
        return _by_length(chosen), []
    order = torch.randperm(len(chosen), generator=generator(0, Stream.LANDMARKS)).tolist()
    shuffled = [chosen[place] for place in order]
    landmarks = within(shuffled, LANDMARKS)
    return _by_length(landmarks), _by_length(shuffled[len(landmarks) :])


def within(examples: Sequence[Example], reads: int) -> Sequence[Example]:
    """The first examples that predict at most ``reads`` tokens together, at least one."""
    for count, example in enumerate(examples):
        reads -= _reads(example)
        if reads < 0 and count:
            return examples[:count]
    return examples


def _reads(example: Example) -> int:
    """Positions at which something is predicted."""
    in_options = 1 + sum(len(option) - 1 for option in example.options)
    return in_options + (len(example.prompt) - 1 if example.score_prompt else 0)


def _reads_of(batches: Sequence[Batch]) -> list[int]:
    return [batch.read.numel() for batch in batches]


def _by_length(examples: Sequence[Example]) -> list[Example]:
    return sorted(examples, key=lambda example: len(example.prompt))


def parts(examples: Sequence[Example], packed: bool, tokens: int = PART_TOKENS) -> Iterator[Batch]:
    """Batches of consecutive examples of about so many tokens."""
    return (build_batch(group, packed) for group in split_by_tokens(examples, tokens) if group)
