"""Forwards of many batches, one layer after the other: what a layer needs is brought in once for all of them.

Every forward runs in a greenlet of its own, a function that can be left and entered again, and is left in front of each
decoder layer. So it does not matter what a model computes between its layers, or hands from one to the next.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")

Turn = Callable[[int], None]
"""Told the number of the batch that goes on now."""


Run = Callable[[Sequence[Callable[[], None]], Turn], None]
"""Carries out forwards, one by one or layer by layer."""


def no_turn(number: int) -> None:
    """It makes no difference which batch goes on."""


def later(turn: Turn, start: int) -> Turn:
    """``turn`` for the batches from number ``start`` on, which are counted from 0."""
    return lambda number: turn(start + number)


def together(*turns: Turn) -> Turn:
    """Tells all of ``turns``."""

    def turn(number: int) -> None:
        for one in turns:
            one(number)

    return turn


def one_by_one(forwards: Sequence[Callable[[], None]], turn: Turn) -> None:
    """Carry out forwards one after the other."""
    for number, forward in enumerate(forwards):
        turn(number)
        forward()


def in_waves(items: Iterable[T], size: Callable[[T], int], room: Callable[[], int]) -> Iterator[list[T]]:
    """Neighbours together, as many as there is room for, which is asked before each wave; at least one.

    Examples:
        >>> list(in_waves([3, 1, 1, 4], size=lambda item: item, room=lambda: 4))
        [[3, 1], [1], [4]]
    """
    wave: list[T] = []
    left = 0
    for item in items:
        if wave and size(item) > left:
            yield wave
            wave = []
        left = (left if wave else room()) - size(item)
        wave.append(item)
    if wave:
        yield wave


@cache
def has_greenlets() -> bool:
    """Whether the greenlet package is installed."""
    return importlib.util.find_spec("greenlet") is not None


def layer_major(
    layers: Iterable[nn.Module],
    forwards: Sequence[Callable[[], None]],
    turn: Turn,
    after_layer: Callable[[], None],
) -> None:
    """Run forwards of one model so that all pass a layer before any enters the next one.

    Args:
        layers: The decoder layers, which every forward calls in the same order.
        forwards: What to run. They need not be equally long.
        turn: Told which forward goes on now.
        after_layer: Called whenever all forwards have passed a layer.

    Examples:
        >>> layer, order = nn.Identity(), []
        >>> def forward(name):
        ...     for _ in range(2):
        ...         layer(name)
        ...         order.append(name)
        >>> layer_major([layer], [lambda: forward("a"), lambda: forward("b")], lambda number: None, lambda: None)
        >>> order
        ['a', 'b', 'a', 'b']
    """
    from greenlet import getcurrent, greenlet

    waiting = {number: greenlet(forward) for number, forward in enumerate(forwards)}
    ours = set(waiting.values())

    def leave(*_: Any) -> None:
        if getcurrent() in ours:
            getcurrent().parent.switch()

    with ExitStack() as undo:
        undo.callback(lambda: [forward.throw() for forward in waiting.values()])  # after an error: end the others
        for layer in layers:
            undo.callback(layer.register_forward_pre_hook(leave, prepend=True).remove)  # before others look at it
        while waiting:
            for number, forward in list(waiting.items()):
                turn(number)
                forward.switch()
                if forward.dead:
                    del waiting[number]
            after_layer()
