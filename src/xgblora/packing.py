"""Batches of real tokens: many prompts with their options in one row, and the attention that keeps them apart.

A *segment* is one example: its prompt, followed by the tokens of each option that are fed to the model (all but an
option's last, which nothing reads). Options are branches of a tree: each sees the prompt and itself, never another
option, and its positions go on from the prompt's. So a prompt is computed once, however many options it has, and
options of one token cost nothing. Models that cannot run this (:func:`choose_route` measures it) get padded rows.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from xgblora.errors import XgbloraError

logger = logging.getLogger(__name__)

_ATTENTION = "xgblora_packed"


FILLING = 16
"""Packed rows of n to 2 n tokens, n a power of two, have one of this many token counts."""

SHARED = 32
"""Tokens that all prompts of a batch must begin with before they are worth computing once."""


@dataclass(frozen=True)
class Example:
    """One tokenised example.

    ``prompt``: token ids. ``options``: token ids of each candidate answer (none empty). ``label``: index of the
    correct one, which is trained on; ``also_correct``: further ones. ``score_prompt``: count the prompt's own tokens,
    too, in the options' log-probabilities. ``references``: texts of the right answers. ``null_prompt``: token ids that
    ask nothing, for calibrated scores. ``row``: the columns it was made from, for rewards.
    """

    prompt: Sequence[int]
    options: Sequence[Sequence[int]]
    label: int
    score_prompt: bool = False
    also_correct: tuple[int, ...] = ()
    references: tuple[str, ...] = ()
    null_prompt: tuple[int, ...] = ()
    row: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens that are fed to the model: the prompt's, and those of each option but its last."""
        return len(self.prompt) + sum(len(option) - 1 for option in self.options)


@dataclass(frozen=True)
class Batch:
    """Examples as tensors, packed into one row or padded into several. Integer tensors, all on one device.

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

        oneDNN builds and keeps kernels for every token count it meets, which costs 10 ms and 2 MB a new one:
        a few counts instead of hundreds are worth 2 % more tokens. Call it last: the result cannot be repeated.
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
        )


def split_by_tokens(examples: Sequence[Example], room: float, shared: int = 0) -> Iterator[list[Example]]:
    """Consecutive examples in groups of at most ``room`` tokens; a longer example is a group of its own.

    ``shared`` tokens of each are not counted.
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
    """Lay examples out as a :class:`Batch`; ``packed`` as :func:`choose_route` found.

    ``share``: compute what all prompts of a packed batch begin with (demonstrations, say) once. Not under probes,
    which differ between examples, nor where a prompt's own tokens are scored.
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
            # A padded row has one option only: without the tree mask a second one would see the first.
            if row < 0 or (not packed and (len(option) > 1 or len(rows[row]) > prompt)):
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


@dataclass(frozen=True)
class _Group:
    """Rows that attend in one call: a single row as it lies, or several padded to one rectangle."""

    start: int
    """Where a single row begins in the packed row."""
    rows: int
    longest: int
    slot: Tensor
    """(tokens,) places of several rows' tokens in the flattened (rows, longest) rectangle."""
    tree: Tensor | None
    """(rows, longest, shared + longest) True where a query may look, None for plain causal segments."""
    distance: Tensor | None
    """(rows, longest, shared + longest) how many positions a key lies back; for sliding windows in trees."""
    shared: int = 0
    """Tokens at the beginning of the packed row that the rows see in front of their own."""


def _groups(batch: Batch, together: bool) -> list[_Group]:
    """A call for each row, which copies and pads nothing, or all rows ``together``, for GPUs, where calls cost more.

    A shared beginning is a call of its own.
    """
    found, start = [], 0
    lengths = torch.bincount(batch.slot // batch.longest, minlength=batch.rows).tolist()
    if batch.shared:
        found.append(_Group(0, 1, batch.shared, batch.slot[: batch.shared], None, None))
        start = lengths.pop(0)
    calls = [(len(lengths), batch.longest, sum(lengths))] if together else [(1, length, length) for length in lengths]
    for rows, longest, count in calls:
        tokens = slice(start, start + count)
        slot = batch.slot[tokens] - batch.slot[start]
        masked = batch.forked or batch.shared
        tree, distance = _tree(batch, tokens, slot, rows, longest) if masked else (None, None)
        found.append(_Group(start, rows, longest, slot, tree, distance, batch.shared))
        start += count
    return found


def _tree(batch: Batch, tokens: slice, slot: Tensor, rows: int, longest: int) -> tuple[Tensor, Tensor]:
    """Who may look where, and how far back that is: both (rows, longest, shared + longest)."""

    def grid(values: Tensor) -> Tensor:
        return values.new_full((rows * longest,), -1).index_copy_(0, slot, values[tokens]).view(rows, longest)

    def keys(own: Tensor, values: Tensor) -> Tensor:
        return torch.cat([values[: batch.shared].expand(rows, -1), own], dim=1)[:, None, :]

    branch, position = grid(batch.branch), grid(batch.position_ids[0])
    key_branch = keys(branch, batch.branch)
    same = (key_branch == 0) | (key_branch == branch[:, :, None])
    distance = position[:, :, None] - keys(position, batch.position_ids[0])
    # A padding position may look at itself alone: a row of nothing but False would give NaN.
    itself = F.pad(torch.eye(longest, dtype=torch.bool, device=branch.device), (batch.shared, 0))
    return (same & (distance >= 0) & (key_branch >= 0)) | itself, distance


def _packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: q, k, v are (1, heads, tokens, head_dim); returns (1, tokens, heads, head_dim)."""
    if attention_mask is not None or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("packed attention knows no additive masks, soft caps or sinks")
    attend = _opaque_attend if torch.compiler.is_compiling() else _attend
    return attend(query, key, value, scaling, kwargs.get("sliding_window")), None


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Attention of one packed row, group by group of the row in progress.

    Several rows are padded inside the attention only. With right padding and a causal mask no real token ever looks
    at a padded one, so plain segments need no mask at all.
    """
    heads, width = query.shape[1], value.shape[3]
    result = value.new_zeros(1, query.shape[2], heads, width)  # zeros for filler tokens
    for group in _groups_of_row.get():
        mask = _mask(group, window)
        stop = group.start + group.slot.numel()
        q, k, v = (x[:, :, group.start : stop] for x in (query, key, value))
        if group.rows > 1:
            q, k, v = (_rectangle(x, group) for x in (q, k, v))
        if group.shared:
            k, v = (
                torch.cat([x[:, :, : group.shared].expand(group.rows, -1, -1, -1), own], dim=2)
                for x, own in ((key, k), (value, v))
            )
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=heads != key.shape[1]
        ).transpose(1, 2)
        result[0, group.start : stop] = out[0] if group.rows == 1 else out.flatten(0, 1)[group.slot]
    return result


_groups_of_row: ContextVar[list[_Group]] = ContextVar("_groups_of_row")
"""Groups of the row in progress: beside the model's arguments, of which torch.compile would keep a copy for each."""

_opaque_attend = torch.library.custom_op("xgblora::attend", _attend, mutates_args=())


@_opaque_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    return value.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def _rectangle(x: Tensor, group: _Group) -> Tensor:
    """(1, heads, tokens, head_dim) of the packed row -> (rows, heads, longest, head_dim)."""
    _, heads, _, width = x.shape
    cells = x.new_zeros(group.rows * group.longest, heads, width).index_copy_(0, group.slot, x[0].transpose(0, 1))
    return cells.view(group.rows, group.longest, heads, width).transpose(1, 2)


def _mask(group: _Group, window: int | None) -> Tensor | None:
    """Boolean mask of a group, broadcast over heads; None where plain causal attention is meant."""
    mask = group.tree
    if window is not None and group.shared + group.longest > window:
        distance = group.distance
        if distance is None:
            steps = torch.arange(group.longest, device=group.slot.device)
            distance = (steps[:, None] - steps[None, :])[None]
        near = (distance >= 0) & (distance < window)
        mask = near if mask is None else mask & near
    return None if mask is None else mask[:, None]


AttentionInterface.register(_ATTENTION, _packed_attention)


@contextmanager
def _packed_row(model: PreTrainedModel, batch: Batch) -> Iterator[None]:
    """Attend as ``batch`` is packed; outside, the model is as its user left it (generation works as ever)."""
    before = model.config._attn_implementation
    model.config._attn_implementation = _ATTENTION
    groups = _groups_of_row.set(_groups(batch, together=batch.slot.is_cuda))
    try:
        yield
    finally:
        _groups_of_row.reset(groups)
        model.config._attn_implementation = before


def run_base(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Final hidden states of every position: (1, tokens, hidden) packed, (rows, longest, hidden) padded."""
    if batch.packed:
        with _packed_row(model, batch):
            packed: Tensor = model.base_model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
            ).last_hidden_state
            return packed
    real = torch.zeros(batch.input_ids.numel(), dtype=torch.long, device=batch.slot.device)
    real[batch.slot] = 1
    padded: Tensor = model.base_model(
        input_ids=batch.input_ids, attention_mask=real.view_as(batch.input_ids), use_cache=False
    ).last_hidden_state
    return padded


def read_hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Final hidden states at the positions that predict something: (reads, hidden), in the base's dtype."""
    hidden = run_base(model, batch)
    return hidden.reshape(-1, hidden.shape[-1])[batch.read]


def head_logits(model: PreTrainedModel, hidden: Tensor, rows: Tensor | None) -> Tensor:
    """Logits of the wanted vocabulary rows (None = all): (reads, rows), float32 from float32 products."""
    head = model.get_output_embeddings()
    weight, bias = head.weight, getattr(head, "bias", None)
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]
    logits = F.linear(hidden.float(), weight.float(), None if bias is None else bias.float())
    return _finish_logits(model, logits)


def _finish_logits(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """What some architectures do to logits after the head, read from their configuration."""
    config = model.config
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma 2
        logits = torch.tanh(logits / cap) * cap
    return logits


@torch.no_grad()
def choose_route(model: PreTrainedModel) -> bool:
    """Whether this model can run packed batches. Measured, not guessed from its name.

    Three short sequences of token ids, one of them with options of several tokens, go through the model one by one
    as it ships and then packed; logits that differ by more than rounding mean padded rows from then on, and the log
    says so. Costs a few short forwards. Raises
    :class:`XgbloraError` where even padded rows differ.
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
    tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.1  # half precision rounds much more
    reason = ""
    for packed in (True, False):
        batch = build_batch(examples, packed).to(device)
        try:
            found = head_logits(model, read_hidden(model, batch), None)[batch.target_read]
        except Exception as error:  # whatever a foreign architecture raises: it cannot take this form
            reason = " ".join(str(error).split())[:100]
            continue
        # Root mean square over the vocabulary, worst position: a token that sees wrong neighbours is off by about 1.
        difference = ((found - expected).std(dim=1) / expected.std(dim=1)).max()
        if difference <= tolerance:
            if not packed:
                logger.info("%s cannot run packed batches (%s): padded rows are used", type(model).__name__, reason)
            return packed
        reason = f"logits differ by {difference:.2g} of their spread"
    raise XgbloraError(f"{type(model).__name__} is not supported: its logits are not head(hidden states) ({reason})")
