"""One adapted layer: y = base(x) + scaling * B A x (LoRA, arXiv 2106.09685), in float32 beside a frozen base.

It holds the pair in training (A, B) and the stack of frozen rank-1 boosters before it. During a zeroth-order step it
evaluates many perturbed copies of the pair at once: see :class:`Probe`.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xgblora.base.architecture import linear_shape
from xgblora.base.compilation import Opaque

BLOCK = 16
"""Rank-1 pairs evaluated in one product outside of probes."""

PIECE = 512
"""Positions that adapters work on at once on a CPU: what is cast and added then stays in the processor's cache."""


@dataclass(frozen=True)
class Probe:
    """Forwards in which every position sees its own perturbed pair. Nothing is ever added to a parameter.

    With D directions, position t sees A + sum_d select[t, d] zA_d, and B likewise. In a forward of n times as many
    positions, each line of ``select`` is that of n neighbouring ones: of a row of tokens, while answers are written.
    """

    directions: Tensor
    """(D, parameters) float32, laid out as :attr:`Adapters.slices` says."""
    select: Tensor
    """(positions, D) float32: +eps or -eps at the position's own direction, 0 elsewhere."""
    _pieces: dict[int, list[tuple[slice, Tensor]]] = field(default_factory=dict, init=False)

    def pieces(self, positions: int) -> list[tuple[slice, Tensor]]:
        """For every few positions of a forward: which directions occur there, and 1 beside their part of ``select``.

        Neighbouring positions belong to the same few examples, so a large batch need not multiply every position by
        every direction. All layers of a forward ask for the same.
        """
        if positions not in self._pieces:
            self._pieces[positions] = self._split(positions)
        return self._pieces[positions]

    def _split(self, positions: int) -> list[tuple[slice, Tensor]]:
        select = self.select.repeat_interleave(positions // len(self.select), dim=0)
        pieces = []
        for part in select.split(_piece_length(select.device, positions)):
            used = part.any(0).nonzero()[:, 0]
            low, high = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
            pieces.append((slice(low, high), F.pad(part[:, low:high], (1, 0), value=1.0)[:, :, None]))
        return pieces


class AdaptedLinear(Opaque):
    """A frozen linear layer with its pair in training and its boosters.

    ``lora_A`` (r, in), ``lora_B`` (out, r): the pair. ``booster_A`` (K, in), ``booster_B`` (out, K): the frozen stack.
    All are float32. The base layer may be any module with ``in_features`` and ``out_features`` (quantised ones too),
    or transformers' Conv1D: it is called, its weight is never touched.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    booster_A: Tensor
    booster_B: Tensor

    def __init__(self, base_layer: nn.Module, rank: int, scaling: float, device: torch.device) -> None:
        super().__init__()
        shape = linear_shape(base_layer)
        assert shape is not None  # attach has looked
        self.base_layer = base_layer
        self.in_features, self.out_features = shape
        self.scaling = scaling
        self.lora_A = nn.Parameter(torch.zeros(rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        self.register_buffer("booster_A", torch.zeros(0, self.in_features, device=device), persistent=False)
        self.register_buffer("booster_B", torch.zeros(self.out_features, 0, device=device), persistent=False)
        self.probe: tuple[Tensor, Tensor, Probe] | None = None
        """zA (D, r, in), zB (D, r, out) and the probe they are part of."""

    def resize(self, rank: int) -> None:
        """Make the pair zero, of another rank."""
        self.lora_A = nn.Parameter(self.lora_A.new_zeros(rank, self.in_features))
        self.lora_B = nn.Parameter(self.lora_B.new_zeros(self.out_features, rank))

    def compute(self, x: Tensor) -> Tensor:
        """Base output plus adapters, in the base output's dtype; x is (..., in), the result (..., out)."""
        base = self.base_layer(x)
        rows, result = x.reshape(-1, self.in_features), base.reshape(-1, self.out_features)
        if torch.is_grad_enabled():
            return self._stacked(rows.float(), result.float(), self._blocks()).view(base.shape).to(base.dtype)
        stack = self._blocks() if self.probe is None else []
        pieces = self.probe[2].pieces(len(rows)) if self.probe else []
        length = _piece_length(x.device, len(rows))
        for number, start in enumerate(range(0, len(rows), length)):
            part = slice(start, start + length)
            inputs, outputs = rows[part].float(), result[part].float()
            result[part] = (
                self._probed(inputs, outputs, *pieces[number]) if pieces else self._stacked(inputs, outputs, stack)
            )
        return result.view(base.shape)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """All boosters and, last, the pair in training as one: (K + r, in), (out, K + r)."""
        return torch.cat([self.booster_A, self.lora_A]), torch.cat([self.booster_B, self.lora_B], dim=1)

    def _blocks(self) -> list[tuple[Tensor, Tensor]]:
        """All boosters and the pair, in blocks (BLOCK, in) and (out, BLOCK), the last one filled up with zeros.

        One wide product would be as right, but its summation order changes with its width: a merge would then tip
        the last bit of an activation here and there, and a half-precision base makes that a visible difference.
        With equal shapes before and after, the new pair adds exact zeros and a merge is bit-identical.
        """
        A, B = self.pairs()
        empty = -len(A) % BLOCK
        A, B = F.pad(A, (0, 0, 0, empty)), F.pad(B, (0, empty))
        return list(zip(A.split(BLOCK), B.split(BLOCK, dim=1), strict=True))

    def _stacked(self, x: Tensor, result: Tensor, stack: list[tuple[Tensor, Tensor]]) -> Tensor:
        """``result`` (t, out) plus scaling * all boosters and the pair at x (t, in)."""
        for A, B in stack:
            result = torch.addmm(result, F.linear(x, A), B.T, alpha=self.scaling)
        return result

    def _probed(self, x: Tensor, result: Tensor, used: slice, weights: Tensor) -> Tensor:
        """``result`` (t, out) plus scaling * B' A' x with each position's own A' and B', and the boosters.

        ``weights`` (t, 1 + D, 1): 1 for the pair itself, then how far along each of the D directions ``used``. These
        are D more rows of two skinny products, so that the whole probe stays a matrix product: gathering a direction
        for every position would move (t, in) floats from memory instead.
        """
        assert self.probe is not None
        z_A, z_B, _ = self.probe
        rank = self.lora_A.shape[0]
        products = F.linear(x, torch.cat([self.lora_A, z_A[used].flatten(0, 1)]))
        hidden = (products.view(len(x), -1, rank) * weights).sum(1, keepdim=True)  # A' x: (t, 1, r)
        right = torch.cat([self.lora_B.T, z_B[used].flatten(0, 1)])
        result = torch.addmm(result, (weights * hidden).flatten(1), right, alpha=self.scaling)
        if self.booster_A.shape[0]:
            result = torch.addmm(result, F.linear(x, self.booster_A), self.booster_B.T, alpha=self.scaling)
        return result


def _piece_length(device: torch.device, positions: int) -> int:
    return PIECE if device.type == "cpu" else max(positions, 1)
