"""How far a measured share may be from the true one, and whether two of them differ."""

from statistics import NormalDist

LEVEL = 0.95


def wilson(right: int, rows: int, level: float = LEVEL) -> tuple[float, float]:
    """Confidence interval of a share (Wilson 1927), which stays in [0, 1] also where all or none are right.

    Examples:
        >>> [round(end, 3) for end in wilson(55, 60)]
        [0.819, 0.964]
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, slack = right / rows, z**2 / rows
    middle = (share + slack / 2) / (1 + slack)
    half = z / (1 + slack) * (share * (1 - share) / rows + slack / (4 * rows)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def beyond_chance(won: int, lost: int, level: float = LEVEL) -> bool:
    """Whether rows that only one of two models has right are divided too unevenly for chance (McNemar 1947).

    Args:
        won: Rows that the one has right, the other wrong.
        lost: The other way round.
        level: Of confidence.

    Examples:
        >>> beyond_chance(2, 1), beyond_chance(30, 10)
        (False, True)
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    return abs(won - lost) - 1 > z * (won + lost) ** 0.5  # with the correction for small counts
