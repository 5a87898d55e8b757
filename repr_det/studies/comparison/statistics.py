"""Means, spreads and intervals over seeds, the bootstrap over images, and the verdict in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
BETTER, WORSE, OPEN, UNKNOWN = "better", "worse", "not distinguishable", "no verdict"
HIGHER, LOWER = "higher", "lower"


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation (n - 1) over the seeds that have the value; NaN where there are too few."""

    values: tuple[float, ...]
    mean: float
    sd: float
    n: int


@dataclass(frozen=True)
class Difference:
    """RePr minus baseline, paired.

    Attributes:
        values: one a pair, NaN where either arm has none.
        mean: over the pairs that have one.
        low, high: 95 % confidence interval of the mean; NaN with fewer than two pairs.
        n: pairs that have one.
    """

    values: tuple[float, ...]
    mean: float
    low: float
    high: float
    n: int

    @property
    def verdict(self) -> str:
        """BETTER or WORSE where the interval excludes 0, OPEN where it does not, UNKNOWN without an interval."""
        if not math.isfinite(self.low):
            return UNKNOWN
        return BETTER if self.low > 0 else WORSE if self.high < 0 else OPEN

    @property
    def direction(self) -> str:
        """``verdict`` for a value of which more is neither better nor worse: HIGHER or LOWER."""
        return {BETTER: HIGHER, WORSE: LOWER}.get(self.verdict, self.verdict)


def summarize(values: Sequence[float]) -> Summary:
    """Over the finite values, see Summary."""
    there = np.array([v for v in values if math.isfinite(v)], dtype=float)
    mean = float(there.mean()) if len(there) else math.nan
    sd = float(there.std(ddof=1)) if len(there) > 1 else math.nan
    return Summary(tuple(values), mean, sd, len(there))


def paired_difference(baseline: Sequence[float], repr_: Sequence[float]) -> Difference:
    """RePr - baseline with Student's t interval over the pairs (their differences taken as normal).

    Args:
        baseline, repr_: one value a pair, in the same order; NaN where there is none.
    """
    values = np.asarray(repr_, dtype=float) - np.asarray(baseline, dtype=float)
    there = values[np.isfinite(values)]
    n = len(there)
    mean = float(there.mean()) if n else math.nan
    half = math.nan
    if n > 1:
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * there.std(ddof=1) / math.sqrt(n))
    return Difference(tuple(values.tolist()), mean, mean - half, mean + half, n)


def percentile_interval(samples: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of bootstrap samples; NaN where there are none."""
    there = samples[np.isfinite(samples)]
    if not len(there):
        return math.nan, math.nan
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(there, [tail, 100 - tail])
    return float(low), float(high)


def verdict_sentence(metric: str, difference: Difference) -> str:
    """ "RePr +0.8 AP, 95 % CI -0.3 .. +1.9, 5 seeds: not distinguishable"."""
    if difference.n == 0:
        return f"{metric}: n/a (no pair of runs has it)"
    seeds = "1 seed" if difference.n == 1 else f"{difference.n} seeds"
    head = f"RePr {difference.mean:+.1f} {metric}"
    if difference.verdict == UNKNOWN:
        return f"{head}, {seeds}: no interval over seeds from one pair of runs, so no verdict"
    return f"{head}, {100 * CONFIDENCE:.0f} % CI {difference.low:+.1f} .. {difference.high:+.1f}, {seeds}: " + (
        difference.verdict
    )
