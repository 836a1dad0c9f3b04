"""A decoder layer computed again from what its weights gave: how a change of one output reaches the layer's own.

Norms, sums, activations and attention are computed again, in float32; every product with a weight is the one that was
recorded. So a small change of what one of them gives takes its direct way out of the layer and no other: the layers
that would read it on its way say what they said. Nothing is known of the architecture, and no weight is read.
"""

import logging
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from xgblora.base.architecture import linear_shape
from xgblora.base.swap import StandIn, swap
from xgblora.errors import one_line

logger = logging.getLogger(__name__)

NUDGE = 0.03
"""Size of a change, as a share of what it is added to: small to a norm, large to float32."""


@dataclass(frozen=True)
class Response:
    """What a small change n (positions, hidden) of an output does to the layer's: strength_t * gain * n_t.

    It is the diagonal of the derivative, which a norm behind an output has, or a factor; all else is left over.
    """

    gain: Tensor
    """(hidden,) float32."""
    strength: Tensor
    """(positions,) float32, 1 in the mean."""
    explained: float
    """Share of the squared change that it accounts for, up to 1."""
    straight: bool
    """The change arrives as it is."""


class Replay:
    """Keeps, while it is open, what the weights of a decoder layer give, and can compute the layer again.

    Args:
        layer: The decoder layer.
        done: Called with the replay after each forward of the layer; only then can it be computed again.
    """

    def __init__(self, layer: nn.Module, done: Callable[["Replay"], None]) -> None:
        self.layer = layer
        self.weights = _weights(layer)
        """The modules that hold them, by their name in the layer."""
        self.output = torch.empty(0)
        """(positions, hidden), as the forward gave it."""
        self._done = done
        self._given: dict[nn.Module, list[Any]] = {}
        self._entered: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._again = False
        self._hooks = ExitStack()

    def __enter__(self) -> "Replay":
        hooks = [module.register_forward_hook(self._keep) for module in self.weights.values()]
        hooks.append(self.layer.register_forward_pre_hook(self._enter, with_kwargs=True))
        hooks.append(self.layer.register_forward_hook(self._leave))
        for hook in hooks:
            self._hooks.callback(hook.remove)
        return self

    def __exit__(self, *_: Any) -> None:
        self._hooks.close()

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._entered = _copied(args), _copied(kwargs)
        self._given.clear()

    def _keep(self, module: nn.Module, _: Any, output: Any) -> None:
        if not self._again:
            self._given.setdefault(module, []).append(_copied(output))  # some layers add to it in place

    def _leave(self, _: nn.Module, __: Any, output: Any) -> None:
        self.output = _hidden(output)
        self._done(self)
        self._given.clear()
        self._entered = (), {}

    def given(self, module: nn.Module) -> Tensor | None:
        """What a module of :attr:`weights` gave, (positions, out) float32; None unless once, at all positions."""
        outputs = self._given.get(module, [])
        if len(outputs) != 1 or not isinstance(outputs[0], Tensor):
            return None
        rows = outputs[0].reshape(-1, outputs[0].shape[-1]).float()
        return rows if len(rows) == len(self.output) else None

    @cached_property
    def _others(self) -> dict[str, nn.Parameter]:
        """Parameters outside of :attr:`weights`, such as those of norms."""
        inside = tuple(f"{name}." for name in self.weights)
        return {f"layer.{name}": p for name, p in self.layer.named_parameters() if not name.startswith(inside)}

    @property
    def entered(self) -> Tensor:
        """What enters the layer, (positions, hidden) float32."""
        args, kwargs = self._entered
        return _hidden(args[0] if args else kwargs["hidden_states"]).float()

    def with_change(self, place: nn.Module, change: Tensor) -> Tensor:
        """What the layer gives, (positions, hidden) float32, where ``place`` gives ``change`` more.

        Args:
            place: A module of :attr:`weights`; the layer itself for what enters it.
            change: (positions, hidden) float32.
        """

        def moved(module: nn.Module, output: Any, _: Any) -> Any:
            output = _float(output)
            return output + change.view_as(output) if module is place else output

        with self._replaying(self.weights.values(), moved):
            args, kwargs = _float(_copied(self._entered))
            if place is self.layer:
                args, kwargs = _changed(args, kwargs, change)
            others = {name: parameter.float() for name, parameter in self._others.items()}
            output = functional_call(_Bare(self.layer), others, args, kwargs)
        return _hidden(output).float()

    def mixing(self, places: Sequence[nn.Module]) -> list[bool]:
        """Whether what enters each of ``places`` at a position depends on others than by what ``places`` give there.

        So it is behind attention and all else that mixes positions, and not behind an MLP. The layer's other weights
        are used, twice.
        """

        def inputs(change: Tensor) -> list[Tensor]:
            seen: dict[nn.Module, Tensor] = {}

            def keep(module: nn.Module, output: Any, x: Tensor) -> Any:
                seen[module] = x.reshape(-1, x.shape[-1])[1::2].float()
                return output

            with self._replaying(places, keep):
                args, kwargs = _copied(self._entered)
                args, kwargs = _changed(args, kwargs, change.to(self.output.dtype))
                self.layer.forward(*args, **kwargs)
            return [seen[place] for place in places]

        draw = torch.Generator().manual_seed(0)
        change = torch.randn(self.entered.shape, generator=draw).to(self.output.device)
        change[1::2] = 0
        change *= self.entered.square().mean().sqrt()
        pairs = zip(inputs(torch.zeros_like(change)), inputs(change), strict=True)
        return [_ratio(after - before, before) > 1e-4 for before, after in pairs]

    @contextmanager
    def _replaying(self, modules: Collection[nn.Module], of: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
        """Inside the block ``modules`` give ``of`` (module, what it gave, what enters it); no hook of theirs runs."""
        with ExitStack() as undo:
            self._again = True
            undo.callback(setattr, self, "_again", False)
            for name, module in self.weights.items():
                if module in modules:
                    swap(self.layer, name, _Given(module, self._given.get(module, []), of), undo)
            yield

    def response(self, place: nn.Module) -> Response | None:
        """What a small change of what ``place`` gives does to what the layer gives; None where it does nothing."""
        moved, signs = self._moved(place)
        if not moved.any():
            return None
        z = moved * signs
        gain = z.mean(0)
        strength = _along(z, gain)
        gain = (strength[:, None] * z).sum(0) / strength.square().sum()
        strength = _along(z, gain)
        gain, strength = gain * strength.mean(), strength / strength.mean()
        left = moved - strength[:, None] * gain * signs
        straight = (moved - signs).square().mean().item() < 1e-4
        explained = 1 - _ratio(left, moved)
        return Response(gain, strength, explained if math.isfinite(explained) else 0.0, straight)

    def strength(self, place: nn.Module, gain: Tensor) -> Tensor:
        """The strength (positions,) beside a ``gain`` that is known."""
        moved, signs = self._moved(place)
        return _along(moved * signs, gain)

    def _moved(self, place: nn.Module) -> tuple[Tensor, Tensor]:
        """How far the layer's output moves for each unit that ``place`` moves by, and where to: +1 or -1 everywhere."""
        given = self.entered if place is self.layer else self.given(place)
        assert given is not None
        draw = torch.Generator().manual_seed(0)
        signs = (torch.randint(0, 2, given.shape, generator=draw, dtype=torch.int8) * 2 - 1).to(given.device).float()
        sizes = given.square().mean(1, keepdim=True).sqrt()
        nudge = NUDGE * torch.where(sizes > 0, sizes, sizes.mean().clamp(min=1e-6))
        ahead, behind = (self.with_change(place, sign * nudge * signs) for sign in (1, -1))
        return (ahead - behind) / (2 * nudge), signs

    def reproduces(self) -> bool:
        """Whether the layer, computed again without a change, gives what it gave, up to its precision."""
        try:
            again = self.with_change(self.layer, torch.zeros_like(self.entered))
        except Exception as error:  # whatever a foreign layer raises, in another precision and without its weights
            logger.info("%s cannot be computed again: %s", type(self.layer).__name__, one_line(error, 100))
            return False
        return again.shape == self.output.shape and _ratio(again - self.output.float(), again) < 1e-3


class _Given(StandIn):
    """Gives what ``source`` gave, one call after the other."""

    def __init__(self, source: nn.Module, given: Sequence[Any], of: Callable[[nn.Module, Any, Any], Any]) -> None:
        super().__init__(source)
        self.given = iter(given)
        self.of = of

    def forward(self, *args: Any, **_: Any) -> Any:
        return self.of(self.source[0], _copied(next(self.given)), args[0] if args else None)


class _Bare(nn.Module):
    """A layer without its hooks, and as it is where it has been compiled."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer.forward(*args, **kwargs)


def _weights(layer: nn.Module) -> dict[str, nn.Module]:
    """The outermost linear modules, and those that hold tensors of two dimensions or more and no linear module."""
    linear = [name for name, module in layer.named_modules() if linear_shape(module)]
    weights: dict[str, nn.Module] = {}
    for name, module in layer.named_modules():
        if not name or any(name.startswith(f"{outer}.") for outer in weights):
            continue
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        alone = not any(inner.startswith(f"{name}.") for inner in linear)
        if linear_shape(module) or (alone and any(tensor.dim() > 1 for tensor in tensors)):
            weights[name] = module
    return weights


def _hidden(value: Any) -> Tensor:
    """(positions, hidden) of what a layer takes or gives."""
    tensor: Tensor = value[0] if isinstance(value, tuple) else value
    return tensor.reshape(-1, tensor.shape[-1])


def _changed(args: Any, kwargs: Any, change: Tensor) -> tuple[Any, Any]:
    """Arguments of a layer with ``change`` added to the hidden states."""
    if args:
        return (args[0] + change.view_as(args[0]), *args[1:]), kwargs
    hidden = kwargs["hidden_states"]
    return args, {**kwargs, "hidden_states": hidden + change.view_as(hidden)}


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Tensors in nested tuples, lists and dictionaries, changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(part, change) for key, part in value.items()}
    return type(value)(_mapped(part, change) for part in value) if type(value) in (tuple, list) else value


def _copied(value: Any) -> Any:
    return _mapped(value, lambda tensor: tensor.clone())


def _float(value: Any) -> Any:
    return _mapped(value, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)


def _along(z: Tensor, gain: Tensor) -> Tensor:
    return z @ gain / gain.square().sum()


def _ratio(part: Tensor, whole: Tensor) -> float:
    """The first one's squares as a share of the other's."""
    return (part.square().sum() / whole.square().sum()).item()
