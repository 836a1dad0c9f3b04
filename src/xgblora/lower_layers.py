"""The layers below the lowest one that trains: computed once for all probes, and kept for the next time.

They see the same tokens in both probes of every direction, and they do not change while a booster trains. So a step
needs them once instead of twice, and not at all for examples whose activations are still in memory.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from xgblora.adapters import Adapters
from xgblora.errors import XgbloraError
from xgblora.models import decoder_layers
from xgblora.packing import Batch, Example, build_batch, read_hidden, run_base

logger = logging.getLogger(__name__)


class LowerLayers:
    """What the layers below the lowest one with a pair in training compute, for the batches of a run.

    ``cache_bytes`` bounds the activations that are kept (in packed batches; 0 keeps none). Their values do not depend
    on whether they were kept, except for rounding: a batch of other size may be summed in another order. So a run
    forgets them at every checkpoint, where a resumed one has none.
    """

    def __init__(self, adapters: Adapters, cache_bytes: int) -> None:
        self.adapters = adapters
        self.cache_bytes = cache_bytes
        self.used_bytes = 0
        self._kept: dict[Any, Tensor] = {}
        self._full = False
        self._possible: bool | None = None

    def clear(self) -> None:
        """Forget all activations: the pairs or the choice of layers have changed."""
        self._kept.clear()
        self.used_bytes = 0
        self._full = False

    @contextmanager
    def shared(self, batch: Batch, repeated: Batch) -> Iterator[None]:
        """Forwards of ``repeated``, which is ``batch`` some times over, start at the lowest layer that trains."""
        model, lowest = self.adapters.model, self.adapters.lowest_layer
        if lowest is not None and self._possible is None:
            self._possible = can_enter(model, lowest, batch.packed)
        if lowest is None or not self._possible:
            yield
            return
        hidden = self._packed(batch, lowest) if batch.packed else run_below(model, batch, lowest)
        if batch.packed:
            copies = repeated.segments // batch.segments
            filler = repeated.input_ids.numel() - copies * batch.input_ids.numel()
            hidden = F.pad(hidden.repeat(1, copies, 1), (0, 0, 0, filler))
        else:
            hidden = hidden.repeat(repeated.rows // batch.rows, 1, 1)
        with entering(model, lowest, hidden):
            yield

    def _packed(self, batch: Batch, lowest: str) -> Tensor:
        """Hidden states (1, tokens, hidden) that enter layer ``lowest``, from memory where they are."""
        keys = [_key(example) for example in batch.examples]
        found = {key: self._kept[key] for key in keys if key in self._kept}
        missing = {key: e for key, e in zip(keys, batch.examples, strict=True) if key not in found}
        if missing:
            examples = list(missing.values())
            part = batch if len(examples) == len(keys) else build_batch(examples).to(batch.input_ids.device)
            hidden = run_below(self.adapters.model, part.filled(), lowest)[0, : part.tokens]
            lengths = torch.bincount(part.token_segment, minlength=part.segments).tolist()
            for key, rows in zip(missing, hidden.split(lengths), strict=True):
                found[key] = rows
                self._keep(key, rows)
        return torch.cat([found[key] for key in keys])[None]

    def _keep(self, key: Any, rows: Tensor) -> None:
        if self.used_bytes + rows.nbytes <= self.cache_bytes:
            self._kept[key] = rows.clone()  # a view would keep its whole batch
            self.used_bytes += rows.nbytes
        elif self.cache_bytes and not self._full:
            self._full = True
            logger.info(
                "The activation cache is full: it holds %d examples in %.2f GB; others are computed every time "
                "(--activation_cache_gb)",
                len(self._kept),
                self.used_bytes / 1e9,
            )


def _key(example: Example) -> tuple[Any, ...]:
    return tuple(example.prompt), tuple(map(tuple, example.options))


def run_below(model: PreTrainedModel, batch: Batch, layer: str) -> Tensor:
    """The hidden states that enter decoder layer ``layer``: (1, tokens, hidden) packed, (rows, longest, hidden)."""
    with _replaced(model, {layer: _Stop(model.get_submodule(layer))}):
        try:
            run_base(model, batch)
        except _Reached as reached:
            return reached.hidden
    raise XgbloraError(f"--xgblora_layers: {type(model).__name__} did not run its layer {layer}")


@contextmanager
def entering(model: PreTrainedModel, layer: str, hidden: Tensor) -> Iterator[None]:
    """Forwards inside the block skip all decoder layers before ``layer``, which starts at ``hidden``."""
    layers = decoder_layers(model)
    names = list(layers)
    below = names[: names.index(layer)]
    skips = {name: _Skip(layers[name], hidden if name == below[-1] else None) for name in below}
    with _replaced(model, skips):
        yield


@torch.inference_mode()
def can_enter(model: PreTrainedModel, layer: str, packed: bool) -> bool:
    """Whether a forward that starts at ``layer`` gives what a whole one does; measured, and the log says if not."""
    batch = build_batch([Example([1, 2, 3], [[4], [5]], 0), Example([6, 7], [[4], [5]], 0)], packed).to(model.device)
    expected = read_hidden(model, batch)
    try:
        with entering(model, layer, run_below(model, batch, layer)):
            found = read_hidden(model, batch)
    except Exception as error:  # whatever a foreign architecture raises
        reason = " ".join(str(error).split())[:100]
    else:
        if torch.allclose(found.float(), expected.float(), rtol=1e-3, atol=1e-3):
            return True
        reason = "its hidden states would differ"
    logger.info(
        "%s computes all layers for each probe: it cannot start at %s (%s)", type(model).__name__, layer, reason
    )
    return False


class _Reached(Exception):
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class _StandIn(nn.Module):
    """Takes the place of the decoder layer ``source`` and has its attributes."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.source = [source]  # in a list: not a submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["source"][0], name)


class _Stop(_StandIn):
    """Ends the forward where the lower layers end."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise _Reached(hidden_states)


class _Skip(_StandIn):
    """Computes nothing; gives ``hidden`` where that is not None, else its input, which nobody will read."""

    def __init__(self, source: nn.Module, hidden: Tensor | None) -> None:
        super().__init__(source)
        self.hidden = hidden

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.hidden is None:
            return hidden_states
        if hidden_states.shape != self.hidden.shape:
            raise XgbloraError(
                "--xgblora_layers: the objective ran the model on another batch than its own; leave the flag out"
            )
        return self.hidden


@contextmanager
def _replaced(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    before = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)
