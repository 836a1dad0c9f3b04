"""Examples, and batches of real tokens: many prompts with their options in one row.

A *segment* is one example: its prompt, followed by the tokens of each option that are fed to the model (all but an
option's last, which nothing reads). Options are branches of a tree: each sees the prompt and itself, never another
option, and its positions go on from the prompt's. So a prompt is computed once, however many options it has, and
options of one token cost nothing. Models that cannot run this get padded rows (:attr:`xgblora.base.Base.packed`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FILLING = 16
"""Packed rows of n to 2 n tokens, n a power of two, have one of this many token counts."""

OPTION_TOKENS = 256
"""Tokens of options in a packed row at most, or as many as its prompt has; more of them take further rows."""

SHARED = 32
"""Tokens that all prompts of a batch must begin with before they are worth computing once."""


@dataclass(frozen=True)
class Example:
    """One tokenised example.

    Examples:
        >>> Example(prompt=[11, 12, 13], options=[[5], [9, 4]], label=0).tokens
        4
    """

    prompt: Sequence[int]
    """Token ids."""
    options: Sequence[Sequence[int]]
    """Token ids of each candidate answer; none is empty."""
    label: int
    """Index of the correct option, which is trained on."""
    score_prompt: bool = False
    """Count the prompt's tokens as well in the options' log-probabilities."""
    also_correct: tuple[int, ...] = ()
    """Indices of further correct options."""
    references: tuple[str, ...] = ()
    """Texts of the right answers."""
    null_prompt: tuple[int, ...] = ()
    """Token ids that ask nothing, for calibrated scores."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The columns it was made from, for rewards."""

    @property
    def tokens(self) -> int:
        """Tokens that are fed to the model: the prompt's, and those of each option but its last."""
        return len(self.prompt) + sum(len(option) - 1 for option in self.options)


@dataclass(frozen=True)
class Batch:
    """Examples as tensors, packed into one row or padded into several. All are integer tensors on one device.

    The *grid* is the (rows, longest) rectangle in which attention pads; a packed batch holds only the ``tokens``
    of it that are real, a padded batch all of it.
    """

    input_ids: Tensor
    """(1, tokens) packed, (rows, longest) padded."""
    position_ids: Tensor
    """Same shape: position of a token in its own prompt + option."""
    slot: Tensor
    """(tokens,) place of each real token in the flattened grid."""
    branch: Tensor
    """(tokens,) 0 for a prompt's token, 1, 2, ... for those of its options."""
    token_segment: Tensor
    """(positions,) the example that each position of the flattened ``input_ids`` belongs to."""
    read: Tensor
    """(reads,) positions of the flattened ``input_ids`` whose hidden state predicts something."""
    target_read: Tensor
    """(targets,) which read predicts this target token."""
    target: Tensor
    """(targets,) token id to be predicted."""
    target_option: Tensor
    """(targets,) running number of the option that the target belongs to."""
    option_cell: Tensor
    """(options,) segment x max_options + place of the option in its example."""
    label: Tensor
    """(segments,) place of the correct option."""
    examples: tuple[Example, ...]
    """What the batch was built from, segment by segment."""
    segments: int
    rows: int
    longest: int
    max_options: int
    packed: bool
    forked: bool
    """Some option has tokens of its own in the batch, so attention needs the tree mask."""
    single_token: bool
    """Every option is one token: scores may leave out the log-softmax, whose constant cancels between options."""
    shared: int = 0
    """Tokens that all prompts begin with: they stand once, as the first row of the grid, and every row sees them."""
    original: "Batch | None" = None
    """The batch that this one repeats or fills; None where it is one itself."""

    @property
    def tokens(self) -> int:
        """Real tokens, padding not counted."""
        return self.slot.numel()

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on ``device``."""
        moved: dict[str, Any] = {
            f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def filled(self) -> "Batch":
        """The batch with filler tokens at its end, up to a round number; no real token sees them, nothing reads them.

        oneDNN builds and keeps a kernel for every token count it meets, at 10 ms and 2 MB each: a few counts instead
        of hundreds are worth 2 % more tokens. Call it last: the result cannot be repeated.
        """
        if not self.packed:
            return self
        tokens = self.input_ids.numel()
        step = max(8, 2 ** (tokens.bit_length() - 1) // FILLING)
        filler = (0, -tokens % step)
        return replace(
            self,
            input_ids=F.pad(self.input_ids, filler),
            position_ids=F.pad(self.position_ids, filler),
            token_segment=F.pad(self.token_segment, filler, value=self.segments - 1),
            original=self.original or self,
        )

    def repeat(self, times: int) -> "Batch":
        """The batch ``times`` over, as more segments of one batch; segment s of copy k becomes k * segments + s."""
        if times == 1:
            return self

        def tile(index: Tensor, step: int) -> Tensor:
            return (index + step * torch.arange(times, device=index.device)[:, None]).reshape(-1)

        positions = self.input_ids.numel()
        shape = (1, times) if self.packed else (times, 1)
        return replace(
            self,
            input_ids=self.input_ids.repeat(shape),
            position_ids=self.position_ids.repeat(shape),
            slot=tile(self.slot, self.rows * self.longest),
            branch=self.branch.repeat(times),
            token_segment=tile(self.token_segment, self.segments),
            read=tile(self.read, positions),
            target_read=tile(self.target_read, self.read.numel()),
            target=self.target.repeat(times),
            target_option=tile(self.target_option, self.option_cell.numel()),
            option_cell=tile(self.option_cell, self.segments * self.max_options),
            label=self.label.repeat(times),
            examples=self.examples * times,
            segments=self.segments * times,
            rows=self.rows * times,
            original=self.original or self,
        )


def split_by_tokens(examples: Sequence[Example], room: float, shared: int = 0) -> Iterator[list[Example]]:
    """Split examples into consecutive groups of at most ``room`` tokens; a longer example is a group of its own.

    ``shared`` tokens of each example are not counted.
    """
    group: list[Example] = []
    used = 0
    for example in examples:
        if group and used + example.tokens - shared > room:
            yield group
            group, used = [], 0
        group.append(example)
        used += example.tokens - shared
    yield group


def shared_beginning(examples: Sequence[Example]) -> int:
    """How many tokens all prompts begin with, each keeping one of its own; 0 where that is not worth a row."""
    prompts = [list(example.prompt) for example in examples]
    first, last = min(prompts), max(prompts)  # what these two share, all between them in order share, too
    common = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    common = min(common, min(map(len, prompts)) - 1)
    return common if common >= SHARED and len(prompts) > 1 else 0


def build_batch(examples: Sequence[Example], packed: bool = True, share: bool = False) -> Batch:
    """Lay examples out as a :class:`Batch`.

    Args:
        examples: At least one.
        packed: One row of real tokens, else padded rows (:attr:`xgblora.base.Base.packed` says which the model runs).
        share: Compute once what all prompts of a packed batch begin with (demonstrations, say). Not for probes, which
            differ between examples, nor where a prompt's own tokens are scored.

    Examples:
        >>> build_batch([Example([1, 2, 3], [[4], [5]], 0), Example([6, 7], [[4], [5]], 1)]).input_ids.tolist()
        [[1, 2, 3, 6, 7]]
    """
    shared = shared_beginning(examples) if share and packed else 0
    rows: list[list[int]] = []  # token ids of each row of the grid
    positions: list[list[int]] = []
    branches: list[list[int]] = []
    row_segment: list[int] = []
    reads: dict[tuple[int, int], int] = {}  # (row, column) of each hidden state to read
    target_read: list[int] = []
    target: list[int] = []
    target_option: list[int] = []
    option_cell: list[int] = []
    max_options = max(len(e.options) for e in examples)

    def new_row(segment: int, prompt: Sequence[int]) -> int:
        start = shared if rows else 0  # the shared beginning is a row of its own, the first one
        rows.append(list(prompt[start:]))
        positions.append(list(range(start, len(prompt))))
        branches.append([0] * (len(prompt) - start))
        row_segment.append(segment)
        return len(rows) - 1

    if shared:
        new_row(0, examples[0].prompt[:shared])
    for segment, example in enumerate(examples):
        prompt = len(example.prompt)
        row = -1
        for place, option in enumerate(example.options):
            # A padded row has one option only: without the tree mask a second one would see the first. The mask grows
            # with the square of a row: where options are many, another copy of their prompt costs less.
            options_so_far = 0 if row < 0 else len(rows[row]) - (prompt - shared)
            crowded = options_so_far > 0 and options_so_far + len(option) - 1 > max(prompt, OPTION_TOKENS)
            if row < 0 or crowded or (not packed and (len(option) > 1 or options_so_far)):
                row = new_row(segment, example.prompt)
            number = len(option_cell)
            option_cell.append(segment * max_options + place)
            start = len(rows[row])  # column of the option's first fed token
            rows[row] += option[:-1]
            positions[row] += range(prompt, prompt + len(option) - 1)
            branches[row] += [place + 1] * (len(option) - 1)
            columns = [prompt - shared - 1, *range(start, start + len(option) - 1)]
            wanted = list(option)
            if example.score_prompt:
                columns = [*range(prompt - 1), *columns]
                wanted = [*example.prompt[1:], *wanted]
            for column, token in zip(columns, wanted, strict=True):
                target_read.append(reads.setdefault((row, column), len(reads)))
                target.append(token)
                target_option.append(number)

    longest = max(len(row) for row in rows)
    lengths = torch.tensor([len(row) for row in rows])
    segment_of_row = torch.tensor(row_segment)
    column = torch.cat([torch.arange(len(row)) for row in rows])
    slot = torch.repeat_interleave(torch.arange(len(rows)), lengths) * longest + column
    flat_ids = torch.tensor([token for row in rows for token in row])
    flat_positions = torch.tensor([position for row in positions for position in row])
    read = torch.tensor([row * longest + column for row, column in reads])
    if packed:
        place_in_row = torch.full((len(rows) * longest,), -1)
        place_in_row[slot] = torch.arange(len(slot))
        read = place_in_row[read]
        input_ids, position_ids = flat_ids[None], flat_positions[None]
        token_segment = torch.repeat_interleave(segment_of_row, lengths)
    else:
        input_ids = torch.zeros(len(rows) * longest, dtype=torch.long)
        input_ids[slot] = flat_ids  # right padding with token 0: causal attention never looks to the right
        input_ids = input_ids.view(len(rows), longest)
        position_ids = torch.arange(longest).repeat(len(rows), 1)
        token_segment = segment_of_row.repeat_interleave(longest)
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        slot=slot,
        branch=torch.tensor([branch for row in branches for branch in row]),
        token_segment=token_segment,
        read=read,
        target_read=torch.tensor(target_read),
        target=torch.tensor(target),
        target_option=torch.tensor(target_option),
        option_cell=torch.tensor(option_cell),
        label=torch.tensor([e.label for e in examples]),
        examples=tuple(examples),
        segments=len(examples),
        rows=len(rows),
        longest=longest,
        max_options=max_options,
        packed=packed,
        forked=any(len(o) > 1 for e in examples for o in e.options),
        single_token=all(len(o) == 1 for e in examples for o in e.options)
        and not any(e.score_prompt for e in examples),
        shared=shared,
    )
