"""Attention over packed rows, which keeps examples apart, and the forward that uses it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from xgblora import hf
from xgblora.base.architecture import body
from xgblora.data.batch import Batch

_ATTENTION = "xgblora_packed"


@dataclass(frozen=True)
class _Group:
    """Rows that attend in one call: a single row as it lies, or several padded to one rectangle."""

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
    """One call for each row, which copies and pads nothing, or one for all rows ``together``: calls cost more on GPUs,
    and on the way back.

    A shared beginning takes a call of its own.
    """
    groups, start = [], 0
    lengths = torch.bincount(batch.slot // batch.longest, minlength=batch.rows).tolist()
    if batch.shared:
        groups.append(_Group(1, batch.shared, batch.slot[: batch.shared], None, None))
        start = lengths.pop(0)
    calls = [(len(lengths), batch.longest, sum(lengths))] if together else [(1, length, length) for length in lengths]
    for rows, longest, count in calls:
        tokens = slice(start, start + count)
        slot = batch.slot[tokens] - batch.slot[start]
        masked = batch.forked or batch.shared
        tree, distance = _tree(batch, tokens, slot, rows, longest) if masked else (None, None)
        groups.append(_Group(rows, longest, slot, tree, distance, batch.shared))
        start += count
    return groups


def _tree(batch: Batch, tokens: slice, slot: Tensor, rows: int, longest: int) -> tuple[Tensor, Tensor]:
    """Who may look where, and how far back that is: both (rows, longest, shared + longest)."""

    def grid(values: Tensor) -> Tensor:
        return values.new_full((rows * longest,), -1).index_copy_(0, slot, values[tokens]).view(rows, longest)

    def keys(cells: Tensor, values: Tensor) -> Tensor:
        return torch.cat([values[: batch.shared].expand(rows, -1), cells], dim=1)[:, None, :]

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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: q, k, v are (1, heads, tokens, head_dim); returns (1, tokens, heads, head_dim)."""
    if attention_mask is not None or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("packed attention knows no additive masks, soft caps or sinks")
    attend = _opaque_attend if torch.compiler.is_compiling() else _attend
    return attend(query, key, value, scaling, kwargs.get("sliding_window")), None


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Attention of one packed row, one group after the other.

    Several rows are padded only in here. With right padding and a causal mask no real token ever looks at a padded
    one, so plain segments need no mask at all.
    """
    groups = _groups_of_row.get()
    lengths = [group.slot.numel() for group in groups]
    filler = query.shape[2] - sum(lengths)
    # Not slices, and no result that is written into: the gradient of each of those is as long as the whole row.
    of_groups = zip(*(x.split([*lengths, filler], dim=2) for x in (query, key, value)), strict=True)
    parts = [
        _of_group(group, q, k, v, (key, value), (scaling, window))
        for group, (q, k, v) in zip(groups, of_groups, strict=False)
    ]
    return torch.cat([*parts, value.new_zeros(filler, query.shape[1], value.shape[3])])[None]


def _of_group(
    group: _Group,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row: tuple[Tensor, Tensor],
    how: tuple[float | None, int | None],
) -> Tensor:
    """(tokens, heads, head_dim) of a group; ``row`` has key and value of all groups, ``how`` scaling and window."""
    scaling, window = how
    dtype, fewer = v.dtype, q.shape[1] != k.shape[1]
    if group.rows > 1:
        q, k, v = (_rectangle(x, group) for x in (q, k, v))
    if group.shared:
        k, v = (
            torch.cat([x[:, :, : group.shared].expand(group.rows, -1, -1, -1), rest], dim=2)
            for x, rest in zip(row, (k, v), strict=True)
        )
    if q.requires_grad and not q.is_cuda:  # on CPUs the way back of half precision takes two to three times as long
        q, k, v = q.float(), k.float(), v.float()
    mask = _mask(group, window)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=fewer
    ).transpose(1, 2)
    return (out[0] if group.rows == 1 else out.flatten(0, 1)[group.slot]).to(dtype)


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
def attending_packed(model: PreTrainedModel, packed: bool) -> Iterator[None]:
    """Let forwards inside the block, which may end in any order, leave the model's attention as they found it."""
    with hf.attention(model, _ATTENTION) if packed else nullcontext():
        yield


@contextmanager
def _packed_row(model: PreTrainedModel, batch: Batch) -> Iterator[None]:
    """Attend as ``batch`` is packed. Afterwards the model is as its user left it, so that generation works as ever."""
    alike = batch.rows * batch.longest <= 2 * batch.tokens
    together = batch.slot.is_cuda or (torch.is_grad_enabled() and alike)
    groups = _groups_of_row.set(_groups(batch, together))
    try:
        with hf.attention(model, _ATTENTION):
            yield
    finally:
        _groups_of_row.reset(groups)


def as_now(model: PreTrainedModel) -> Callable[[], AbstractContextManager[None]]:
    """Makes blocks in which layers attend as they do now, also after the forward, and in other threads."""
    groups, name = _groups_of_row.get(None), hf.attention_of(model)

    @contextmanager
    def again() -> Iterator[None]:
        before = None if groups is None else _groups_of_row.set(groups)
        try:
            with hf.attention(model, name):
                yield
        finally:
            if before is not None:
                _groups_of_row.reset(before)

    return again


def forward(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Final hidden states of every position, in the base's dtype: (1, tokens, hidden) or (rows, longest, hidden)."""
    if batch.packed:
        with _packed_row(model, batch):
            packed: Tensor = body(model)(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
            ).last_hidden_state
            return packed
    real = torch.zeros(batch.input_ids.numel(), dtype=torch.long, device=batch.slot.device)
    real[batch.slot] = 1
    padded: Tensor = body(model)(
        input_ids=batch.input_ids, attention_mask=real.view_as(batch.input_ids), use_cache=False
    ).last_hidden_state
    return padded
