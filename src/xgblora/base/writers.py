"""The layers that write to the residual stream, and how what they write reaches the final hidden states: measured.

In most models a decoder layer adds what they give as it is. Some norm it first (Gemma 2 and 3, OLMo 2), multiply it
(MiniCPM), norm the sum (OPT-350m), gate it by position (shared experts). To first order each of these is a gain for
every unit times a strength at every position.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from xgblora.base.architecture import linear_shape
from xgblora.base.replay import Replay, Response
from xgblora.data.batch import Batch

LEAST_EXPLAINED = 0.8
"""Share of a change that gain and strength must account for; the rest is the part that a norm takes out of it."""

FAINT = 0.1
"""Gain, as a share of the mean one, below which a unit is spared rather than written to the harder."""

SAME_EVERYWHERE = 0.01
"""Standard deviation of a strength over positions, below which it counts as one number."""


@dataclass(frozen=True)
class Way:
    """How a change passes a piece of the model: times ``gain``, and times a strength at each position if ``varies``."""

    gain: Tensor | None
    """(hidden,) float32; None: it passes as it is."""
    varies: bool

    @classmethod
    def of(cls, response: Response) -> "Way":
        """That of what was measured."""
        if response.straight:
            return cls(None, False)
        return cls(response.gain, response.strength.std(correction=0).item() > SAME_EVERYWHERE)


@dataclass(frozen=True)
class Writer:
    """A layer whose output reaches the residual stream."""

    layer: str
    """The decoder layer that holds it."""
    mixes: bool
    """It writes what a position learns from others (attention), not what is computed of it alone (MLP)."""
    out: Way
    """Out of the decoder layer."""
    up: Mapping[str, Way]
    """Through the decoder layers that come after it and change what passes."""
    explained: float
    """Least share of a change that these ways account for."""

    @cached_property
    def gain(self) -> Tensor | None:
        """All the way to the final hidden states, (hidden,) float32; None: it arrives there as it is."""
        total: Tensor | None = None
        for way in (self.out, *self.up.values()):
            if way.gain is not None:
                total = way.gain if total is None else total * way.gain
        return total

    @property
    def varies(self) -> bool:
        """Whether positions differ in how strongly they pass on what it gives."""
        return any(way.varies for way in (self.out, *self.up.values()))

    def adjoint(self, direction: Tensor) -> Tensor:
        """Along which direction (..., hidden) it writes what arrives along ``direction``."""
        return direction if self.gain is None else direction * self.gain.to(direction.device)

    def inverse(self, direction: Tensor) -> Tensor:
        """What it must give for ``direction`` (..., hidden) to arrive; units that hardly pass are spared.

        The minimum of |gain * x - direction|^2 + (FAINT * mean |gain|)^2 |x|^2.
        """
        if self.gain is None:
            return direction
        gain = self.gain.to(direction.device)
        return direction * gain / (gain.square() + (FAINT * gain.abs().mean()) ** 2)


class Strengths:
    """How strongly positions pass on what writers give, in the forwards while it is open.

    Args:
        model: The model.
        writers: By name; those that vary are looked at.
        wave: The batches that are forwarded.
    """

    def __init__(self, model: nn.Module, writers: Mapping[str, Writer], wave: Sequence[Batch]) -> None:
        self.writers = {name: writer for name, writer in writers.items() if writer.varies}
        self.wave = wave
        self._now = 0
        self._of: list[dict[str, Tensor]] = [{} for _ in wave]
        self._hooks = ExitStack()
        places: dict[str, dict[str, Way]] = {}
        for name, writer in self.writers.items():
            for layer, place, way in ((writer.layer, name, writer.out), *((up, up, writer.up[up]) for up in writer.up)):
                if way.varies:
                    places.setdefault(layer, {})[place] = way
        self._replays = [
            Replay(model.get_submodule(layer), partial(self._look, layer, ways)) for layer, ways in places.items()
        ]

    def __enter__(self) -> "Strengths":
        for replay in self._replays:
            self._hooks.enter_context(replay)
        return self

    def __exit__(self, *_: Any) -> None:
        self._hooks.close()

    def turn(self, number: int) -> None:
        """Batch ``number`` goes on."""
        self._now = number

    def _look(self, layer: str, ways: Mapping[str, Way], replay: Replay) -> None:
        for place, way in ways.items():
            assert way.gain is not None
            module = replay.layer if place == layer else replay.weights[place.removeprefix(f"{layer}.")]
            strength = replay.strength(module, way.gain)
            self._of[self._now][place] = strength[self.wave[self._now].read]

    def of(self, name: str, number: int) -> Tensor | None:
        """Those of writer ``name`` where batch ``number`` predicts something, (reads,) float32; None: 1 everywhere."""
        writer, seen = self.writers.get(name), self._of[number]
        if writer is None:
            return None
        factors = [seen[place] for place in (name, *writer.up) if place in seen]
        return torch.stack(factors).prod(0)


def measure_writers(layers: Mapping[str, nn.Module], forward: Callable[[], object], width: int) -> dict[str, Writer]:
    """The writers of a model, by name, in its order.

    Args:
        layers: The decoder layers by name.
        forward: A short forward of the model.
        width: Of the residual stream.
    """
    outer = {name: layer for name, layer in layers.items() if not any(name.startswith(f"{other}.") for other in layers)}
    calls: list[_Call] = []
    mixing: dict[tuple[object, ...], list[bool]] = {}

    def look(name: str, replay: Replay) -> None:
        through = replay.response(replay.layer) if replay.output.shape[-1] == width and replay.reproduces() else None
        if through is None:
            calls.append(_Call(name, None, {}, []))
            return
        responses = {
            part: response
            for part, module in replay.weights.items()
            if (shape := linear_shape(module)) and shape[1] == width and replay.given(module) is not None
            if (response := replay.response(module)) is not None
        }
        places = [replay.weights[part] for part in responses]
        kind = type(replay.layer), *((part, type(module)) for part, module in replay.weights.items()), *responses
        if kind not in mixing:
            mixing[kind] = replay.mixing(places)
        calls.append(_Call(name, through, responses, mixing[kind]))

    with ExitStack() as open_replays:
        for name, layer in outer.items():
            open_replays.enter_context(Replay(layer, partial(look, name)))
        forward()
    return _with_ways_up(calls)


@dataclass(frozen=True)
class _Call:
    """What a call of a decoder layer showed."""

    layer: str
    through: Response | None
    """Of what enters it; None where it cannot be computed again, or is no function of one residual stream."""
    responses: Mapping[str, Response]
    """Of what its weights give, by their names in it."""
    mixes: Sequence[bool]


def _with_ways_up(calls: Sequence[_Call]) -> dict[str, Writer]:
    """The writers that can be followed up to the last layer, given the calls of all layers, in order."""
    times = Counter(call.layer for call in calls)
    writers: dict[str, Writer] = {}
    up: dict[str, Way] = {}
    explained = 1.0
    for call in reversed(calls):
        for (part, response), mixes in reversed(list(zip(call.responses.items(), call.mixes, strict=True))):
            least = min(explained, response.explained)
            if times[call.layer] == 1 and least >= LEAST_EXPLAINED:
                writers[f"{call.layer}.{part}"] = Writer(call.layer, mixes, Way.of(response), dict(up), least)
        if call.through is None:
            break
        way = Way.of(call.through)
        if way.gain is not None:
            explained = min(explained, call.through.explained) if times[call.layer] == 1 else 0.0
            up[call.layer] = way
    return dict(reversed(writers.items()))
