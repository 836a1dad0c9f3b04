"""What forwards show where something is predicted."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from xgblora.data.batch import Batch


@dataclass(frozen=True)
class Observation:
    """What one batch showed where something is predicted (reads).

    ``inputs``: (reads, in) for each layer asked about, in the model's dtype. ``last``: (reads, hidden), as the last
    decoder layer leaves it; ``final``: (reads, hidden), as the head takes it. ``written``: (reads, hidden) float32,
    what the writers asked about give together.
    """

    inputs: list[Tensor]
    last: Tensor
    final: Tensor
    written: Tensor | None


class Watch:
    """Keeps, while it is open, what enters some layers, what others give, and what leaves the last decoder layer.

    Args:
        wave: The batches that are forwarded.
        layers: Whose inputs are kept.
        last: The last decoder layer.
        writers: Whose outputs are added up, which takes less memory than to keep what enters them.
    """

    def __init__(
        self, wave: Sequence[Batch], layers: Sequence[nn.Module], last: nn.Module, writers: Sequence[nn.Module] = ()
    ) -> None:
        self.wave, self.layers, self.last, self.writers = wave, layers, last, writers
        self._inputs: list[dict[nn.Module, Tensor | None]] = [{} for _ in wave]
        self._outputs: dict[int, Tensor] = {}
        self._written: list[Tensor | None] = [None] * len(wave)
        self._wrote: list[Counter[nn.Module]] = [Counter() for _ in wave]
        self._now = 0
        self._hooks = ExitStack()

    def turn(self, number: int) -> None:
        """Batch ``number`` goes on."""
        self._now = number

    def __enter__(self) -> "Watch":
        for layer in self.layers:
            self._hooks.callback(layer.register_forward_pre_hook(self._keep_input).remove)
        for writer in self.writers:
            self._hooks.callback(writer.register_forward_hook(self._add_output).remove)
        self._hooks.callback(self.last.register_forward_hook(self._keep_output).remove)
        return self

    def __exit__(self, *_: Any) -> None:
        self._hooks.close()

    def _keep_input(self, layer: nn.Module, args: Any) -> None:
        x, batch, kept = args[0], self.wave[self._now], self._inputs[self._now]
        kept[layer] = rows_read(x, batch) if _is_whole(x, batch) and layer not in kept else None

    def _add_output(self, writer: nn.Module, _: Any, output: Tensor) -> None:
        batch, before = self.wave[self._now], self._written[self._now]
        if _is_whole(output, batch):
            rows = rows_read(output, batch).float()
            self._written[self._now] = rows if before is None else before.add_(rows)
            self._wrote[self._now][writer] += 1

    def _keep_output(self, _: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self._outputs[self._now] = rows_read(hidden, self.wave[self._now])

    def observations(self, final: Sequence[Tensor]) -> Iterator[Observation]:
        """Those of the batches, in order, whose final hidden states are ``final``.

        Raises KeyError with a layer that did not see every position once.
        """
        for number, kept in enumerate(self._inputs):
            inputs = []
            for layer in self.layers:
                rows = kept.get(layer)
                if rows is None:
                    raise KeyError(layer)
                inputs.append(rows)
            for writer in self.writers:
                if self._wrote[number][writer] != 1:
                    raise KeyError(writer)
            yield Observation(inputs, self._outputs[number], final[number], self._written[number])


def _is_whole(activation: Tensor, batch: Batch) -> bool:
    """Whether it holds every position of a batch."""
    return activation.numel() // activation.shape[-1] >= batch.input_ids.numel()


def rows_read(activation: Tensor, batch: Batch) -> Tensor:
    """The positions of an activation (..., width) where ``batch`` predicts something: (reads, width)."""
    return activation.reshape(-1, activation.shape[-1])[batch.read]
