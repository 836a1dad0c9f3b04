"""What forwards show where something is predicted."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from xgblora.data.batch import Batch

NO_BIASES: Mapping[nn.Module, Tensor] = MappingProxyType({})


@dataclass(frozen=True)
class Observation:
    """What one batch showed where something is predicted (reads).

    ``inputs``: (reads, in) for each layer asked about, in the model's dtype, times the strength with which the position
    passes on what the layer gives. ``last``: (reads, hidden), as the last decoder layer leaves it; ``final``: (reads,
    hidden), as the head takes it. ``written``: (reads, hidden) float32, what the writers asked about give together
    beside their biases, as far as it reaches ``last``. ``sizes``: for each layer asked about, the mean length of
    what its decoder layer leaves; 1 outside of these.
    """

    inputs: list[Tensor]
    last: Tensor
    final: Tensor
    written: Tensor | None
    sizes: list[float]


@dataclass(frozen=True)
class Passed:
    """How what a writer gives reaches the last decoder layer's output, where that is not as it is."""

    gain: Tensor
    """(hidden,) float32."""
    strength: Callable[[int], Tensor | None]
    """(reads,) float32 by number of the batch; None: 1 everywhere."""


class Watch:
    """Keeps, while it is open, what enters some layers, what others give, and what leaves the last decoder layer.

    Args:
        wave: The batches that are forwarded.
        layers: Whose inputs are kept.
        decoder_layers: All of them, in order.
        biases: (hidden,) of the layers whose outputs are added up, which takes less memory than to keep what enters
            them.
        passed: How what layers give reaches the last one's output, of those where it is not as it is.
    """

    def __init__(
        self,
        wave: Sequence[Batch],
        layers: Sequence[nn.Module],
        decoder_layers: Sequence[nn.Module],
        biases: Mapping[nn.Module, Tensor],
        passed: Mapping[nn.Module, Passed],
    ) -> None:
        self.wave, self.layers, self.biases, self.passed = wave, layers, biases, passed
        self.last = decoder_layers[-1]
        around = {module: layer for layer in decoder_layers for module in layer.modules()}
        self._around = {layer: around[layer] for layer in layers if layer in around}
        self._inputs: list[dict[nn.Module, Tensor | None]] = [{} for _ in wave]
        self._outputs: dict[int, Tensor] = {}
        self._sizes: list[dict[nn.Module, float]] = [{} for _ in wave]
        self._written: list[Tensor | None] = [None] * len(wave)
        self._apart: list[dict[nn.Module, Tensor]] = [{} for _ in wave]
        self._wrote: list[Counter[nn.Module]] = [Counter() for _ in wave]
        self._now = 0
        self._hooks = ExitStack()

    def turn(self, number: int) -> None:
        """Batch ``number`` goes on."""
        self._now = number

    def __enter__(self) -> "Watch":
        for layer in self.layers:
            self._hooks.callback(layer.register_forward_pre_hook(self._keep_input).remove)
        for writer in self.biases:
            self._hooks.callback(writer.register_forward_hook(self._add_output).remove)
        for layer in {self.last, *self._around.values()}:  # those below may be replaced
            self._hooks.callback(layer.register_forward_hook(self._keep_output).remove)
        return self

    def __exit__(self, *_: Any) -> None:
        self._hooks.close()

    def _keep_input(self, layer: nn.Module, args: Any) -> None:
        x, batch, kept = args[0], self.wave[self._now], self._inputs[self._now]
        kept[layer] = rows_read(x, batch) if _is_whole(x, batch) and layer not in kept else None

    def _add_output(self, writer: nn.Module, _: Any, output: Tensor) -> None:
        batch = self.wave[self._now]
        if _is_whole(output, batch):
            rows = rows_read(output, batch).float() - self.biases[writer]
            if writer in self.passed:
                self._apart[self._now][writer] = rows  # how strongly it passes is known later
            else:
                self._add(self._now, rows)
            self._wrote[self._now][writer] += 1

    def _add(self, number: int, rows: Tensor) -> None:
        before = self._written[number]
        self._written[number] = rows if before is None else before.add_(rows)

    def _keep_output(self, layer: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        rows = rows_read(hidden, self.wave[self._now])
        self._sizes[self._now][layer] = rows.float().norm(dim=1).mean().item()
        if layer is self.last:
            self._outputs[self._now] = rows

    def observations(self, final: Sequence[Tensor]) -> Iterator[Observation]:
        """Those of the batches, in order, whose final hidden states are ``final``.

        Raises KeyError with a layer that did not see every position once.
        """
        for number, kept in enumerate(self._inputs):
            for writer in self.biases:
                if self._wrote[number][writer] != 1:
                    raise KeyError(writer)
            for writer, rows in self._apart[number].items():
                self._add(number, self._passed_on(writer, rows, number) * self.passed[writer].gain)
            inputs = []
            for layer in self.layers:
                x = kept.get(layer)
                if x is None:
                    raise KeyError(layer)
                inputs.append(self._passed_on(layer, x, number))
            sizes = [self._sizes[number].get(self._around.get(layer, layer), 1.0) for layer in self.layers]
            yield Observation(inputs, self._outputs[number], final[number], self._written[number], sizes)

    def _passed_on(self, module: nn.Module, rows: Tensor, number: int) -> Tensor:
        """Rows (reads, any) times the strength of their positions."""
        strength = self.passed[module].strength(number) if module in self.passed else None
        return rows if strength is None else (rows.float() * strength[:, None]).to(rows.dtype)


def _is_whole(activation: Tensor, batch: Batch) -> bool:
    """Whether it holds every position of a batch."""
    return activation.numel() // activation.shape[-1] >= batch.input_ids.numel()


def rows_read(activation: Tensor, batch: Batch) -> Tensor:
    """The positions of an activation (..., width) where ``batch`` predicts something: (reads, width)."""
    return activation.reshape(-1, activation.shape[-1])[batch.read]
