"""The frozen model as an object: hidden states, logits, what its layers see. It is asked, never opened."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from xgblora.base.architecture import context_length, decoder_layers, finish_logits
from xgblora.base.attention import forward
from xgblora.base.compilation import compiled
from xgblora.base.cpu_layout import cpu_layout
from xgblora.base.fingerprint import fingerprint
from xgblora.base.packed import PackedWeight
from xgblora.base.prefix import Prefix
from xgblora.data.batch import Batch, Example, build_batch
from xgblora.errors import MemoryBudgetError, XgbloraError, one_line

logger = logging.getLogger(__name__)

HEAD_BYTES = 2**27
"""Bytes of the output head in float32 that are multiplied at once. A whole head may take gigabytes."""

TEXT_TOKENS = 8
"""Tokens of the forward that shows which layers a text reaches."""

READS_AT_ONCE = 1024
"""Predicting positions whose logits are held at once."""


@dataclass(frozen=True)
class Observation:
    """What one batch showed where something is predicted (reads).

    ``inputs``: (reads, in) for each layer asked about, in the model's dtype. ``last``: (reads, hidden), as the last
    decoder layer leaves it.
    """

    inputs: list[Tensor]
    last: Tensor


class Base:
    """A frozen causal language model.

    Args:
        model: A causal model of transformers. Adapters may be attached to it: they act in every forward.
        packed: Whether it runs packed batches; by default that is measured when it is first needed.

    Example:
        >>> from xgblora.base.load import tiny_model
        >>> base = Base(tiny_model())
        >>> batch = base.batch([Example([1, 2, 3], [[4], [5]], label=0)])
        >>> [hidden.shape for hidden in base.hidden([batch])]
        [torch.Size([1, 32])]
    """

    def __init__(self, model: PreTrainedModel, packed: bool | None = None) -> None:
        self.model = model
        self._prefix: tuple[Prefix, str] | None = None
        if packed is not None:
            self.packed = packed

    @classmethod
    def of(cls, model: Union[PreTrainedModel, "Base"]) -> "Base":
        """``model`` itself where it is a base, else a base of it."""
        return model if isinstance(model, Base) else cls(model)

    @cached_property
    def packed(self) -> bool:
        """Whether batches are packed rows (else padded ones). Measured, not guessed from the model's name.

        Raises :class:`XgbloraError` where the logits are wrong either way.
        """
        return _measure_route(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Its precision. Adapters, which are float32 in any, may be the first parameters that are found."""
        dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype
        return dtype

    @property
    def width(self) -> int:
        """Size of a hidden state."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def vocabulary(self) -> int:
        """How many token ids it knows."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The decoder layers by name, in order."""
        return decoder_layers(self.model)

    @property
    def context_length(self) -> int | None:
        """Longest sequence that it takes; None where there is no limit."""
        return context_length(self.model.config)

    def fingerprint(self) -> dict[str, Any]:
        """What tells this model from another, as JSON values."""
        return fingerprint(self.model)

    def batch(self, examples: Sequence[Example], share: bool = False) -> Batch:
        """A batch of the examples, as this model runs them, on its device."""
        return build_batch(examples, self.packed, share).to(self.device)

    def require_known(self, examples: Sequence[Example]) -> None:
        """Raise :class:`XgbloraError` where an example holds a token that the model has no embedding for."""
        rows = self.model.get_input_embeddings().weight.shape[0]
        for number, example in enumerate(examples, start=1):
            highest = max(map(max, filter(None, (example.prompt, *example.options))), default=0)
            if highest >= rows:
                raise XgbloraError(
                    f"example {number} holds the token id {highest}, and the model knows {rows} tokens: the tokenizer "
                    "is that of another model"
                )

    def hidden(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        """Final hidden states where each batch predicts something: (reads, hidden), in the model's dtype."""
        for batch in batches:
            with self.ready(batch):
                hidden = forward(self.model, batch)
            yield rows_read(hidden, batch)

    def observe(self, batches: Iterable[Batch], layers: Sequence[nn.Module]) -> Iterator[Observation]:
        """One forward of each batch that keeps what enters ``layers``, and what leaves the last decoder layer.

        Raises :class:`XgbloraError` where the model does not call each of the layers once, with every position.
        """
        last_layer = list(self.layers.values())[-1]
        for batch in batches:
            inputs: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}
            outputs: list[Any] = []
            with ExitStack() as hooks, self.ready(batch):

                def keep_input(layer: nn.Module, args: Any, kept: dict[nn.Module, list[Tensor]] = inputs) -> None:
                    kept[layer].append(args[0])

                def keep_output(_: nn.Module, args: Any, output: Any, kept: list[Any] = outputs) -> None:
                    kept.append(output[0] if isinstance(output, tuple) else output)

                for layer in layers:
                    hooks.callback(layer.register_forward_pre_hook(keep_input).remove)
                hooks.callback(last_layer.register_forward_hook(keep_output).remove)
                forward(self.model, batch)
            for layer, seen in inputs.items():
                if len(seen) != 1 or seen[0].numel() // seen[0].shape[-1] < batch.input_ids.numel():
                    names = {module: name for name, module in self.model.named_modules()}
                    raise XgbloraError(f"{names[layer]} does not see every word once a forward, as fits need it")
            yield Observation([rows_read(seen[0], batch) for seen in inputs.values()], rows_read(outputs[-1], batch))

    @torch.no_grad()
    def called(self, layers: Mapping[str, nn.Module]) -> list[str]:
        """Names of those layers that take part in a forward of text."""
        names: list[str] = []
        with ExitStack() as hooks:
            for name, layer in layers.items():
                hooks.callback(layer.register_forward_hook(lambda *_, name=name: names.append(name)).remove)
            self.model(input_ids=torch.arange(TEXT_TOKENS, device=self.device)[None] % self.vocabulary, use_cache=False)
        return names

    def logits(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits of final hidden states, float32 from float32 products.

        Args:
            hidden: (reads, hidden).
            rows: The words of the vocabulary that are wanted; None = all.

        Returns:
            (reads, rows).
        """
        if rows is not None:
            return self._logits(hidden, rows)
        return torch.cat([self._logits(hidden, words) for words in self._vocabulary()], dim=1)

    def log_probabilities(self, hidden: Tensor, read: Tensor, word: Tensor) -> Tensor:
        """Log-probability of one word at each of some positions, float32.

        The head is multiplied in chunks of the vocabulary, and recomputed chunk by chunk for a gradient: neither it
        nor its logits are ever held whole.

        Args:
            hidden: Final hidden states (reads, hidden).
            read: (targets,) the hidden state that predicts each word.
            word: (targets,) the words.

        Returns:
            (targets,).
        """
        logs, places = [], []
        for start in range(0, len(hidden), READS_AT_ONCE):
            block = hidden[start : start + READS_AT_ONCE]
            place = ((read >= start) & (read < start + len(block))).nonzero()[:, 0]
            logs.append(self._log_probabilities(block, read[place] - start, word[place]))
            places.append(place)
        together = torch.cat(logs)
        return torch.empty_like(together).index_copy(0, torch.cat(places), together)

    def _log_probabilities(self, hidden: Tensor, read: Tensor, word: Tensor) -> Tensor:
        def chunk(hidden: Tensor, words: slice) -> tuple[Tensor, Tensor]:
            logits = self._logits(hidden, words)
            inside = (word >= words.start) & (word < words.stop)
            chosen = logits[read, (word - words.start).clamp(0, logits.shape[1] - 1)]
            return torch.where(inside, chosen, 0), torch.logsumexp(logits, dim=1)

        first, *others = self._vocabulary()
        if not others:
            chosen, total = chunk(hidden, first)
            return chosen - total[read]
        again = partial(checkpoint, chunk, hidden, use_reentrant=False, preserve_rng_state=False)
        chosen, total = again(first)
        for words in others:
            more, part = again(words)
            chosen, total = chosen + more, torch.logaddexp(total, part)
        return chosen - total[read]

    def _vocabulary(self) -> list[slice]:
        """The vocabulary in chunks of at most HEAD_BYTES of the head."""
        words, width = self.model.get_output_embeddings().weight.shape
        size = max(1, HEAD_BYTES // (4 * width))
        return [slice(start, min(start + size, words)) for start in range(0, words, size)]

    def _logits(self, hidden: Tensor, rows: Tensor | slice) -> Tensor:
        head = self.model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        weight = head.weight
        parts = weight.parts(rows) if isinstance(weight, PackedWeight) and isinstance(rows, slice) else [rows]
        logits = [
            F.linear(hidden.float(), weight[part].float(), None if bias is None else bias[part].float())
            for part in parts
        ]
        return finish_logits(self.model.config, logits[0] if len(parts) == 1 else torch.cat(logits, dim=1))

    @contextmanager
    def skipping(self, prefix: Prefix | None, layer: str | None) -> Iterator[None]:
        """Forwards inside the block start at decoder layer ``layer``; ``prefix`` computes and keeps what lies below.

        None for either means whole forwards.
        """
        before, self._prefix = self._prefix, None
        if prefix is not None and layer is not None and prefix.possible(layer, self.packed):
            self._prefix = prefix, layer
        try:
            yield
        finally:
            self._prefix = before

    @contextmanager
    def ready(self, batch: Batch) -> Iterator[None]:
        """Make the model ready for forwards of this very batch by somebody else's code."""
        with nullcontext() if self._prefix is None else self._prefix[0].skipped(self._prefix[1], batch):
            yield

    @contextmanager
    def without_gradients(self, compile_layers: bool = False) -> Iterator[None]:
        """Run forwards inside the block faster: weights in the CPU library's layout, on request compiled layers."""
        with cpu_layout(self.model), compiled(self.model) if compile_layers else nullcontext():
            yield


def rows_read(activation: Tensor, batch: Batch) -> Tensor:
    """The positions of an activation (..., width) where ``batch`` predicts something: (reads, width)."""
    return activation.reshape(-1, activation.shape[-1])[batch.read]


@torch.no_grad()
def _measure_route(model: PreTrainedModel) -> bool:
    """Whether this model runs packed batches.

    Three short sequences of token ids, one of them with options of several tokens, go through the model one by one as
    it ships, and then packed. Where the logits differ by more than rounding, padded rows are used, and the log says
    so. Costs a few short forwards. Raises :class:`XgbloraError` where even padded rows differ.
    """
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(vocabulary, (n,), generator=draw).tolist()

    examples = [Example(tokens(5), [tokens(1), tokens(1)], 0), Example(tokens(12), [tokens(3), tokens(2)], 0)]
    examples.append(Example(tokens(8), [tokens(1), tokens(4)], 0))
    wanted = []
    for example in examples:
        for option in example.options:
            row = torch.tensor([[*example.prompt, *option[:-1]]], device=device)
            wanted.append(model(input_ids=row, use_cache=False).logits[0, len(example.prompt) - 1 :].float())
    expected = torch.cat(wanted)
    tolerance = 1e-3 if Base(model).dtype == torch.float32 else 0.1  # half precision rounds much more
    words = [*examples[1].prompt, *examples[1].options[0]]
    short, long = (
        model(input_ids=torch.tensor([part], device=device), use_cache=False).logits[0, : len(words) - 1].float()
        for part in (words[:-1], words)
    )
    if _difference(short, long) > tolerance:
        raise XgbloraError(
            f"{type(model).__name__} is not supported: its words see later ones, so it is no causal model"
        )
    reason = ""
    for packed in (True, False):
        base = Base(model, packed)
        batch = base.batch(examples)
        try:
            (hidden,) = base.hidden([batch])
            logits = base.logits(hidden)[batch.target_read]
        except MemoryBudgetError:
            raise
        except Exception as error:  # whatever a foreign architecture raises: it cannot take this form
            reason = one_line(error, 100)
            continue
        if (difference := _difference(logits, expected)) <= tolerance:
            if not packed:
                logger.info("%s cannot run packed batches (%s): padded rows are used", type(model).__name__, reason)
            return packed
        reason = f"logits differ by {difference:.2g} of their spread"
    raise XgbloraError(f"{type(model).__name__} is not supported: its logits are not head(hidden states) ({reason})")


def _difference(logits: Tensor, expected: Tensor) -> float:
    """Root mean square over the vocabulary, as a share of its spread, at the worst position.

    A token that sees wrong neighbours is off by about 1.
    """
    return float(((logits - expected).std(dim=1) / expected.std(dim=1)).max())
