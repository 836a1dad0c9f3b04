"""How much boosters change each decoder layer."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ELSEWHERE = "outside the layers"
NUMBERED = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class BlockNorms:
    """What boosters add to the weights of one decoder layer, in Frobenius norms."""

    name: str
    norms: list[float]
    """Of each booster."""
    parts: str
    """Of all boosters, by adapted layer, in words."""

    @property
    def total(self) -> float:
        """Of all boosters, as if they were at right angles."""
        return _together(self.norms)


def block_norms(norms: Mapping[str, Sequence[float]]) -> list[BlockNorms]:
    """Sum up adapted layers by the decoder layer that they are in, in order; those without any change are left out.

    Args:
        norms: For each adapted layer, the norm of every booster.

    Examples:
        >>> (block,) = block_norms({"layers.3.o_proj": [3.0], "layers.3.down_proj": [4.0]})
        >>> block.name, block.norms, block.parts
        ('layer 3', [5.0], 'o_proj 3, down_proj 4')
    """
    groups: dict[int, dict[str, Sequence[float]]] = {}
    for layer, of_layer in norms.items():
        if any(of_layer):
            number = NUMBERED.search(layer)
            groups.setdefault(int(number[1]) if number else -1, {})[layer.rpartition(".")[2]] = of_layer
    return [
        BlockNorms(
            f"layer {place}" if place >= 0 else ELSEWHERE,
            [_together(of_booster) for of_booster in zip(*group.values(), strict=True)],
            ", ".join(f"{name} {_together(values):.3g}" for name, values in group.items()),
        )
        for place, group in sorted(groups.items())
    ]


def _together(norms: Sequence[float]) -> float:
    return sum(norm**2 for norm in norms) ** 0.5
