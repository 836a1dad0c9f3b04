"""The layers below the lowest one that trains: computed once for all probes, and kept for the next time.

They see the same tokens in both probes of every direction, and they do not change while a booster trains. So a step
needs them once instead of twice, and not at all for examples whose activations are still in memory.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from xgblora.base.architecture import decoder_layers
from xgblora.base.attention import forward
from xgblora.base.layer_major import Run, Turn, no_turn, one_by_one
from xgblora.base.swap import StandIn, swap
from xgblora.data.batch import Batch, Example, build_batch
from xgblora.errors import XgbloraError, one_line
from xgblora.group import gather, mine, size

logger = logging.getLogger(__name__)


class Prefix:
    """What the layers below one layer compute, for the batches of a run.

    The values do not depend on whether they were kept, except for rounding: a batch of another size may be summed in
    another order. So a run forgets them at every checkpoint, where a resumed one has none.

    Args:
        model: The model, with whatever adapters are attached to it.
        cache_bytes: Bound on the activations that are kept (in packed batches); 0 keeps none.
    """

    def __init__(self, model: PreTrainedModel, cache_bytes: int) -> None:
        self.model = model
        self.cache_bytes = cache_bytes
        self.used_bytes = 0
        self._kept: dict[Any, Tensor] = {}
        self._full = False
        self._possible: bool | None = None

    def clear(self) -> None:
        """Forget all activations: what lies below the layer has changed, or another layer is the lowest."""
        self._kept.clear()
        self.used_bytes = 0
        self._full = False

    def possible(self, layer: str, packed: bool) -> bool:
        """Whether forwards of this model can start at a layer; measured once."""
        if self._possible is None:
            self._possible = can_enter(self.model, layer, packed)
        return self._possible

    @contextmanager
    def skipped(self, layer: str, wave: Sequence[Batch], run: Run) -> Iterator[Turn]:
        """Forwards inside the block start at decoder layer ``layer``.

        Args:
            layer: Its name.
            wave: The batches that are forwarded.
            run: Carries out what lies below.

        Yields:
            To be told the number of the batch that goes on; before that it is the first.
        """
        originals = [batch.original or batch for batch in wave]
        below = (
            self._packed(originals, layer, run)
            if wave[0].packed
            else iter(run_below(self.model, originals, layer, run))
        )
        entered = []
        for batch, original, hidden in zip(wave, originals, below, strict=True):
            copies = batch.segments // original.segments
            if batch.packed:
                filler = batch.input_ids.numel() - copies * original.input_ids.numel()
                entered.append(F.pad(hidden.repeat(1, copies, 1), (0, 0, 0, filler)))
            else:
                entered.append(hidden.repeat(copies, 1, 1))
        with entering(self.model, layer, entered) as turn:
            yield turn

    def share(self, batches: Sequence[Batch], layer: str, run: Run) -> None:
        """Compute what these batches need below ``layer``, with the other processes, as far as it is kept.

        Afterwards all processes keep the same, which is what one alone would keep.
        """
        if size() == 1 or not batches[0].packed:
            return
        plan = self._plan([batch.original or batch for batch in batches])
        kept = [number for number in plan.parts if plan.kept[number]]
        ours = [plan.parts[kept[place]] for place in mine(len(kept))]
        computed = run_below(self.model, [part.filled() for part in ours], layer, run) if ours else []
        rows = [hidden[0, : part.tokens].float() for hidden, part in zip(computed, ours, strict=True)]
        shapes = [(plan.parts[number].tokens, self._width) for number in kept]
        for number, hidden in zip(kept, gather(rows, shapes, batches[0].input_ids.device), strict=True):
            for key, of_example in plan.rows(number, hidden.to(self._dtype)):
                self._keep(key, of_example)

    def _packed(self, wave: list[Batch], layer: str, run: Run) -> Iterator[Tensor]:
        """Hidden states (1, tokens, hidden) of each batch that enter ``layer``, from memory where they are."""
        plan = self._plan(wave)
        computed = run_below(self.model, [part.filled() for part in plan.parts.values()], layer, run)
        fresh: dict[int, dict[Any, Tensor]] = {}
        for number, part in plan.parts.items():
            rows = dict(plan.rows(number, computed.pop(0)[0, : part.tokens]))
            if plan.kept[number]:
                for key, of_example in rows.items():
                    self._keep(key, of_example)
            else:
                fresh[number] = rows
        for number, batch in enumerate(wave):
            new = fresh.pop(number, {})
            keys = map(_key, batch.examples)
            yield torch.cat([new[key] if key in new else self._kept[key] for key in keys])[None]

    def _plan(self, wave: Sequence[Batch]) -> "_Plan":
        """What is missing of each batch. All of that is kept, or nothing: so a batch that comes again is computed as
        before, whoever computes it."""
        missing: dict[int, dict[Any, Example]] = {}
        parts: dict[int, Batch] = {}
        kept: dict[int, bool] = {}
        coming: set[Any] = set()
        room = self.cache_bytes - self.used_bytes
        for number, batch in enumerate(wave):
            known = {_key(example): example for example in batch.examples}
            lacking = {key: e for key, e in known.items() if key not in self._kept and key not in coming}
            if not lacking:
                continue
            missing[number] = lacking
            whole = len(lacking) == len(batch.examples)
            parts[number] = batch if whole else build_batch(list(lacking.values())).to(batch.input_ids.device)
            needed = sum(example.tokens for example in lacking.values()) * self._width * self._dtype.itemsize
            kept[number] = needed <= room
            if kept[number]:  # no other batch computes it, too
                coming.update(lacking)
                room -= needed
            elif self.cache_bytes and not self._full:
                self._full = True
                logger.info(
                    "The activation cache is full: it holds %d examples in %.2f GB; others are computed every time "
                    "(--activation_cache_gb)",
                    len(self._kept) + len(coming),
                    (self.cache_bytes - room) / 1e9,
                )
        return _Plan(missing, parts, kept)

    @property
    def _width(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype
        return dtype

    def _keep(self, key: Any, rows: Tensor) -> None:
        """Keep a copy: a view would keep its whole batch."""
        self._kept[key] = rows.clone()
        self.used_bytes += rows.nbytes


@dataclass(frozen=True)
class _Plan:
    """What is to be computed below the layer, by number of the batch."""

    missing: dict[int, dict[Any, Example]]
    """Examples, by their keys."""
    parts: dict[int, Batch]
    """Batches of them."""
    kept: dict[int, bool]
    """Whether there is room for them."""

    def rows(self, number: int, hidden: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Each example's key and rows, of what was computed (tokens, hidden)."""
        part = self.parts[number]
        lengths = torch.bincount(part.token_segment, minlength=part.segments).tolist()
        return zip(self.missing[number], hidden.split(lengths), strict=True)


def _key(example: Example) -> tuple[Any, ...]:
    return tuple(example.prompt), tuple(map(tuple, example.options))


@torch.no_grad()
def run_below(model: PreTrainedModel, batches: Sequence[Batch], layer: str, run: Run) -> list[Tensor]:
    """The hidden states of each batch that enter decoder layer ``layer``.

    (1, tokens, hidden) packed, (rows, longest, hidden) padded.
    """
    results: dict[int, Tensor] = {}

    def below(number: int) -> None:
        try:
            forward(model, batches[number])
        except _Reached as reached:
            results[number] = reached.hidden

    with ExitStack() as undo:
        swap(model, layer, _Stop(model.get_submodule(layer)), undo)
        run([partial(below, number) for number in range(len(batches))], no_turn)
    if len(results) < len(batches):
        raise XgbloraError(f"--xgblora_layers: {type(model).__name__} did not run its layer {layer}")
    return [results[number] for number in range(len(batches))]


@contextmanager
def entering(model: PreTrainedModel, layer: str, hidden: Sequence[Tensor]) -> Iterator[Turn]:
    """Forwards inside the block skip all decoder layers before ``layer``, which starts at ``hidden``.

    That of the first batch, until what this yields is told the number of another.
    """
    layers = decoder_layers(model)
    names = list(layers)
    below = names[: names.index(layer)]
    entry = _Skip(layers[below[-1]], hidden[0])

    def turn(number: int) -> None:
        entry.hidden = hidden[number]

    with ExitStack() as undo:
        for name in below:
            swap(model, name, entry if name == below[-1] else _Skip(layers[name], None), undo)
        yield turn


@torch.inference_mode()
def can_enter(model: PreTrainedModel, layer: str, packed: bool) -> bool:
    """Whether a forward that starts at ``layer`` gives what a whole one does. Measured; the log says where not."""
    batch = build_batch([Example([1, 2, 3], [[4], [5]], 0), Example([6, 7], [[4], [5]], 0)], packed).to(model.device)

    def read() -> Tensor:
        hidden = forward(model, batch)
        return hidden.reshape(-1, hidden.shape[-1])[batch.read].float()

    expected = read()
    try:
        with entering(model, layer, run_below(model, [batch], layer, one_by_one)):
            entered = read()
    except Exception as error:  # whatever a foreign architecture raises
        reason = one_line(error, 100)
    else:
        if torch.allclose(entered, expected, rtol=1e-3, atol=1e-3):
            return True
        reason = "its hidden states would differ"
    logger.info(
        "%s computes all layers for each probe: it cannot start at %s (%s)", type(model).__name__, layer, reason
    )
    return False


class _Reached(Exception):
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class _Stop(StandIn):
    """Ends the forward where the lower layers end."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise _Reached(hidden_states)


class _Skip(StandIn):
    """Computes nothing; gives ``hidden`` where that is not None, else its input, which nobody will read."""

    def __init__(self, source: torch.nn.Module, hidden: Tensor | None) -> None:
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
