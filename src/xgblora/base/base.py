"""The frozen model as an object: hidden states, logits, what its layers see. It is asked, never opened."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any, Union

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from xgblora.base.architecture import context_length, decoder_layers
from xgblora.base.attention import attending_packed, forward
from xgblora.base.compilation import as_written, compiled
from xgblora.base.cpu_layout import cpu_layout, return_freed_memory
from xgblora.base.fingerprint import fingerprint
from xgblora.base.head import likeliest, log_probabilities, log_sum_of_others, logits
from xgblora.base.layer_major import Turn, has_greenlets, in_waves, later, layer_major, no_turn, one_by_one, together
from xgblora.base.observation import NO_BIASES, Observation, Passed, Watch, rows_read
from xgblora.base.packed import budgeted_file
from xgblora.base.packed_file import PackedFile
from xgblora.base.prefix import Prefix
from xgblora.base.route import measure_route
from xgblora.base.writers import Strengths, Writer, measure_writers
from xgblora.data.batch import Batch, Example, build_batch
from xgblora.errors import XgbloraError

logger = logging.getLogger(__name__)

TEXT_TOKENS = 8
"""Tokens of the forward that shows which layers a text reaches."""


class Base:
    """A frozen causal language model.

    Args:
        model: A causal model of transformers. Adapters may be attached to it: they act in every forward.
        packed: Whether it runs packed batches; by default that is measured when it is first needed.

    Examples:
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
        return measure_route({packed: Base(self.model, packed) for packed in (True, False)})

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

    def waves(self, batches: Iterable[Batch]) -> Iterator[list[Batch]]:
        """Batches that go through the model together, layer by layer: one at a time, unless weights are read again.

        With a memory budget, a wave is as many as may wait between two layers. A file for what waits would be written
        and read for every layer: as soon as half a layer fits into memory, reading the model once more is less.
        """
        file = self._file
        if file is None:
            return ([batch] for batch in batches)
        # Of a token its embedding and its hidden state wait; and what is kept of it, and a copy that enters the layers.
        token = (2 if self._prefix is None else 4) * self.width * self.dtype.itemsize

        def room() -> int:
            return_freed_memory()
            return file.room

        return in_waves(batches, lambda batch: token * batch.input_ids.numel(), room)

    @property
    def reread(self) -> bool:
        """Whether every wave of batches reads weights again."""
        return self._file is not None

    @cached_property
    def _file(self) -> PackedFile | None:
        """What weights are read from again, where forwards can pass their layers together."""
        file = budgeted_file(self.model) if self.device.type == "cpu" else None
        if file is not None and not has_greenlets():
            logger.info('Every batch reads the model again; pip install "xgblora[packed]" lets them pass it together')
            return None
        return file

    def hidden(self, batches: Iterable[Batch], turn: Turn = no_turn) -> Iterator[Tensor]:
        """Final hidden states where each batch predicts something: (reads, hidden), in the model's dtype.

        Args:
            batches: What to forward.
            turn: Told the number of the batch that goes on, whenever another one does: of a wave, several times.
        """
        start = 0
        for wave in self.waves(batches):
            yield from self._forward(wave, later(turn, start))
            start += len(wave)

    def _forward(self, wave: list[Batch], turn: Turn) -> list[Tensor]:
        """Final hidden states that are read of batches that pass the model together."""
        results: dict[int, Tensor] = {}

        def read(number: int) -> None:
            results[number] = rows_read(forward(self.model, wave[number]), wave[number])

        with self._skipped(wave) as enter:

            def both(number: int) -> None:
                enter(number)
                turn(number)

            self.run([partial(read, number) for number in range(len(wave))], both)
        if self.device.type == "cpu":
            return_freed_memory()  # every batch leaves holes of other sizes, in all a fifth of the memory
        return [results[number] for number in range(len(wave))]

    def run(self, forwards: Sequence[Callable[[], None]], turn: Turn) -> None:
        """Carry out forwards: where weights are read again, layer by layer."""
        if self._file is None or len(forwards) < 2:
            one_by_one(forwards, turn)
        else:
            with self._file.held() as release, attending_packed(self.model, self.packed):

                def after_layer() -> None:
                    release()
                    return_freed_memory()  # what waits lies between holes

                layer_major(self.layers.values(), forwards, turn, after_layer)

    def observe(
        self, batches: Iterable[Batch], layers: Sequence[nn.Module], biases: Mapping[nn.Module, Tensor] = NO_BIASES
    ) -> Iterator[Observation]:
        """One forward of each batch that keeps what enters ``layers``, and what leaves the last decoder layer.

        What the writers give that have ``biases`` (hidden,) is added up. Raises :class:`XgbloraError` where one of all
        these is not called once, with all words.
        """
        decoder_layers = list(self.layers.values())
        names = {module: name.removesuffix(".base_layer") for name, module in self.model.named_modules()}
        asked = {names[module] for module in (*layers, *biases)}
        writers = {name: writer for name, writer in self.writers.items() if name in asked} if asked else {}
        for wave in self.waves(batches):
            strengths = Strengths(self.model, writers, wave)
            passed = {
                module: Passed(writer.gain, partial(strengths.of, names[module]))
                for module in (*layers, *biases)
                if (writer := writers.get(names[module])) is not None and writer.gain is not None
            }
            with as_written(self.model), strengths, Watch(wave, layers, decoder_layers, biases, passed) as watch:
                final = self._forward(wave, together(strengths.turn, watch.turn))
            try:
                yield from watch.observations(final)
            except KeyError as error:
                raise XgbloraError(
                    f"{names[error.args[0]]} does not see every word once a forward, as fits need it"
                ) from None

    @cached_property
    @torch.no_grad()
    def writers(self) -> dict[str, Writer]:
        """The layers that write to the residual stream, by name. Costs a short forward, once."""
        draw, width = torch.Generator().manual_seed(0), 16
        words = torch.randint(self.vocabulary, (4, width), generator=draw).tolist()
        batch = self.batch([Example(row[:-2], [row[-2:-1], row[-1:]], 0) for row in words])
        with self.skipping(None, None), as_written(self.model):
            return measure_writers(self.layers, partial(self._forward, [batch], no_turn), self.width)

    @cached_property
    @torch.no_grad()
    def called(self) -> frozenset[str]:
        """Names of the modules that take part in a forward of text. Costs a short forward, once."""
        names: set[str] = set()
        text = torch.arange(TEXT_TOKENS, device=self.device)[None] % self.vocabulary
        with ExitStack() as hooks:
            for name, module in self.model.named_modules():
                hooks.callback(module.register_forward_hook(lambda *_, name=name: names.add(name)).remove)
            self.model(input_ids=text, use_cache=False)
        return frozenset(names)

    def logits(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits of final hidden states, float32 from float32 products.

        Args:
            hidden: (reads, hidden).
            rows: The words of the vocabulary that are wanted; None = all.

        Returns:
            (reads, rows).
        """
        return logits(self.model, hidden, rows)

    def log_probabilities(self, hidden: Tensor, read: Tensor, word: Tensor) -> Tensor:
        """Log-probability of one word at each of some positions, float32.

        Args:
            hidden: Final hidden states (reads, hidden).
            read: (targets,) the hidden state that predicts each word.
            word: (targets,) the words.

        Returns:
            (targets,).
        """
        return log_probabilities(self.model, hidden, read, word)

    def likeliest(self, hidden: Tensor, count: int) -> Tensor:
        """The ``count`` likeliest words (reads, count) of each of some final hidden states (reads, hidden)."""
        return likeliest(self.model, hidden, count)

    def log_sum_of_others(self, hidden: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Log of the sum of e^logit over all words but ``words``, of final hidden states (reads, hidden).

        Returns it, (reads,) float32, and its slope, (reads, hidden) float32.
        """
        return log_sum_of_others(self.model, hidden, words)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Weights that are used inside the block, the head's say, are read once for all uses."""
        with nullcontext() if self._file is None else self._file.held():
            yield

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

    def share_below(self, batches: Sequence[Batch]) -> None:
        """Before processes forward some of these batches each: what :meth:`skipping` keeps of all of them, all keep."""
        if self._prefix is not None:
            prefix, layer = self._prefix
            prefix.share(batches, layer, self.run)

    @contextmanager
    def ready(self, batch: Batch) -> Iterator[None]:
        """Make the model ready for forwards of this very batch by somebody else's code."""
        with self._skipped([batch]):
            yield

    def _skipped(self, wave: Sequence[Batch]) -> AbstractContextManager[Turn]:
        """Let forwards of these batches begin where :meth:`skipping` says."""
        if self._prefix is None:
            return nullcontext(no_turn)
        prefix, layer = self._prefix
        return prefix.skipped(layer, wave, self.run)

    @contextmanager
    def without_gradients(self, compile_layers: bool = False) -> Iterator[None]:
        """Run forwards inside the block faster: weights in the CPU library's layout, on request compiled layers."""
        with cpu_layout(self.model), compiled(self.model) if compile_layers else nullcontext():
            yield
