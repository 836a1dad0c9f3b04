"""What work costs: forwards, and what was in them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Forward work. Costs add up.

    Examples:
        >>> Cost(passes=2, sequences=16, tokens=400) + Cost(1, 8, 200)
        Cost(passes=3, sequences=24, tokens=600)
    """

    passes: int = 0
    """Passes of a batch (or a part of it): two for each perturbation of a zeroth-order step."""
    sequences: int = 0
    """Examples in them: what methods with batches of different size are compared by."""
    tokens: int = 0
    """Real tokens in them."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.passes + other.passes, self.sequences + other.sequences, self.tokens + other.tokens)
