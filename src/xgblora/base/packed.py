"""Weights that stay as a .gguf file holds them, and the layers that multiply by them.

A weight is unpacked right before its product, a tile of rows at a time, into one buffer that all layers reuse. The
numbers and the products are those of an unpacked model, so its losses are the same to the last bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType as Kind
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from xgblora.base.compilation import Opaque
from xgblora.base.packed_file import PackedFile
from xgblora.base.unpack import unpack

TILE = 2**20
"""Weights unpacked at once on a CPU: 4 MB in float32, which stay in its cache until they are multiplied."""

GPU_TILE = 2**27
"""The same on a GPU: all of a weight but for the largest heads, since a product of a part may sum in another order."""

GPU_PIECE = 2**24
"""Weights that one call unpacks on a GPU: enough to keep it busy, 64 MB in float32."""

Move = Callable[[Tensor], Tensor]


class PackedWeight:
    """A weight (rows, columns) as a file holds it. ``weight[rows]`` unpacks rows, as of a tensor.

    Args:
        packed: (rows, bytes) uint8; mapped from a file, it takes no memory of its own.
        kind: How numbers are packed.
        shape: Rows and columns.
        dtype: Of what is unpacked: float32 first, cast afterwards.
        order: Which packed row is row 0, 1, ... of the weight; by default they lie in order.
        place: Which bytes of which file ``packed`` is mapped from, if it is: (file, first byte, bytes). Those of a file
            with a budget stay there when the weight moves to a GPU.
        rounded: It was packed here: its numbers are those of no file.
    """

    def __init__(
        self,
        packed: Tensor,
        kind: Kind,
        shape: tuple[int, int],
        dtype: torch.dtype,
        order: Tensor | None = None,
        place: tuple[PackedFile, int, int] | None = None,
        rounded: bool = False,
    ) -> None:
        self.packed, self.kind, self.shape, self.dtype, self.place = packed, kind, shape, dtype, place
        self.rounded = rounded
        self.order = (torch.arange(shape[0]) if order is None else order).to(packed.device, torch.int32)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Rows of the weight (wanted, columns), in :attr:`dtype`."""
        wanted = self.order[rows]
        out = torch.empty(len(wanted), self.shape[1], dtype=self.dtype, device=self.device)
        if self.packed.device == self.device:
            with self._in_use(len(wanted) / self.shape[0]) as packed:
                self._fill(out, packed, wanted)
        else:  # a few rows are brought by themselves
            few = self.packed[wanted.to(self.packed.device)].to(self.device)
            self._fill(out, few, torch.arange(len(few), device=self.device, dtype=torch.int32))
        return out

    @contextmanager
    def _in_use(self, share: float = 1.0) -> Iterator[Tensor]:
        """All packed bytes (rows, bytes), on the device, to read inside the block, or a share of them."""
        if self.place is None:
            yield self.packed
            return
        file, start, size = self.place
        file.require_unchanged()
        yield file.bytes(start, size, self.device).view(self.packed.shape)
        file.used(start, size, self.device, share)

    def _fill(self, out: Tensor, packed: Tensor, wanted: Tensor) -> None:
        """Unpack rows ``wanted`` of ``packed`` into ``out``, which may be of any precision."""
        length = max(1, (TILE if out.device.type == "cpu" else GPU_PIECE) // self.shape[1])
        for start in range(0, len(wanted), length):
            part = slice(start, start + length)
            if out.dtype == torch.float32:
                unpack(packed, self.kind, wanted[part], out[part])
            else:
                tile = _buffer(torch.float32, out.device, len(wanted[part]), self.shape[1])
                unpack(packed, self.kind, wanted[part], tile)
                out[part].copy_(tile)

    @property
    def device(self) -> torch.device:
        """Where it is multiplied."""
        return self.order.device

    def parts(self, rows: slice) -> list[slice]:
        """``rows``, from a first to a last one, as few as a tile holds at a time."""
        length = max(1, (TILE if self.device.type == "cpu" else GPU_TILE) // self.shape[1])
        return [slice(start, min(start + length, rows.stop)) for start in range(rows.start, rows.stop, length)]

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows, some at a time: which, and what they hold until the next are asked for."""
        with self._in_use() as packed:
            for part in self.parts(slice(0, self.shape[0])):
                wanted = self.order[part]
                tile = _buffer(self.dtype, self.device, len(wanted), self.shape[1])
                self._fill(tile, packed, wanted)
                yield part, tile

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedWeight":
        """Itself: copies of a model share what neither writes to."""
        return self

    def move(self, fn: Move) -> None:
        """Follow what ``nn.Module.to`` does to the module that holds it."""
        self.order = fn(self.order)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        if self.place is not None and self.place[0].budget is not None:
            return
        packed = fn(self.packed)
        if packed is not self.packed:
            self.packed, self.place = packed, None  # on another device it is a copy


def budgeted_file(model: nn.Module) -> PackedFile | None:
    """The file that weights of a model are read from again, since they may not all stay in memory; None without one."""
    for module in model.modules():
        if isinstance(module, PackedLinear | PackedEmbedding) and module.weight.place is not None:
            file = module.weight.place[0]
            return None if file.budget is None else file
    return None


_buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _buffer(dtype: torch.dtype, device: torch.device, rows: int, columns: int) -> Tensor:
    """The one buffer of a precision, as (rows, columns)."""
    held = _buffers.get((dtype, device))
    if held is None or held.numel() < rows * columns:
        with torch.inference_mode(False):  # it serves forwards with gradients, too
            held = _buffers[dtype, device] = torch.empty(max(TILE, rows * columns), dtype=dtype, device=device)
    return held[: rows * columns].view(rows, columns)


class PackedLinear(Opaque):
    """A frozen linear layer on a packed weight, (..., in) -> (..., out)."""

    def __init__(self, weight: PackedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.reordered = False
        """Whether products are those of the CPU library's own layout (:mod:`xgblora.base.cpu_layout`)."""

    def compute(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in x's dtype."""
        if torch.is_grad_enabled() and x.requires_grad:
            result: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
            return result
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """What :meth:`compute` gives, unknown to autograd."""
        multiply = self._as_reordered if self.reordered else F.linear
        parts = []
        for part, tile in self.weight.tiles():
            parts.append(multiply(x, tile, None if self.bias is None else self.bias[part]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def columns(self, part: Tensor) -> Tensor:
        """Some columns of the weight, float32: (columns, out). What the layer gives for units, without the products."""
        columns = torch.empty(len(part), self.out_features, device=self.weight.device)
        for rows, tile in self.weight.tiles():
            columns[:, rows] = tile[:, part].T.float()
        return columns

    @staticmethod
    def _as_reordered(x: Tensor, tile: Tensor, bias: Tensor | None) -> Tensor:
        if x.numel() == x.shape[-1]:  # of one position the library multiplies a plain weight in another order
            tile = torch.ops.mkldnn._reorder_linear_weight(tile)  # noqa: SLF001 (torch has no other name)
        multiply = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001 (torch has no other name)
        result: Tensor = multiply(x, tile, bias, "none", [], "")
        return result

    def _apply(self, fn: Move, recurse: bool = True) -> Any:
        self.weight.move(fn)
        return super()._apply(fn, recurse)


class _Product(torch.autograd.Function):
    """The product as autograd knows it: the weight is unpacked again for the way back."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, layer: PackedLinear) -> Tensor:
        cast(Any, ctx).layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        weight = cast(Any, ctx).layer.weight
        total = gradient.new_zeros(*gradient.shape[:-1], weight.shape[1])
        for part, tile in weight.tiles():
            total += gradient[..., part] @ tile
        return total, None


class PackedEmbedding(nn.Module):
    """A table of embeddings on a packed weight: rows are unpacked as they are looked up.

    Args:
        weight: The table (words, width).
        source: The module in whose place it stands; it loses its own table. What its class does beside looking up
            (multiply by a scale, say) is done.
    """

    def __init__(self, weight: PackedWeight, source: nn.Embedding) -> None:
        super().__init__()
        self.weight = weight
        self.source = source
        del source.weight
        source.padding_idx = None  # it matters for gradients alone

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (...) -> (..., width)."""
        words, place = ids.unique(return_inverse=True)
        self.source.weight = self.weight[words]  # type: ignore[assignment]
        try:
            result: Tensor = self.source(place)
        finally:
            del self.source.weight
        return result

    def _apply(self, fn: Move, recurse: bool = True) -> Any:
        self.weight.move(fn)
        return super()._apply(fn, recurse)
