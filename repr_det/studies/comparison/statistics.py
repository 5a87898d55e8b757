"""Means, spreads and intervals over seeds, the bootstrap over images, and the verdict in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
MIN_PAIRS = 3  # fewer say nothing: two equal differences have an interval without width
_NO_SPREAD = 1e-9  # of differences, relative to their size: rounding
BETTER, WORSE, OPEN, UNKNOWN = "better", "worse", "not distinguishable", "no verdict"
HIGHER, LOWER = "higher", "lower"


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation (n - 1) over the seeds that have the value; NaN where there are too few.

    Attributes:
        values: one a seed, NaN where it has none.
        n: of the values that mean and sd are of.
    """

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
        low, high: 95 % confidence interval of the mean; NaN with fewer than two pairs, or where all are equal.
        n: pairs that have one.
    """

    values: tuple[float, ...]
    mean: float
    low: float
    high: float
    n: int

    @property
    def verdict(self) -> str:
        """BETTER or WORSE where the interval excludes 0, OPEN where it does not, UNKNOWN see ``why_no_verdict``."""
        if self.why_no_verdict:
            return UNKNOWN
        return BETTER if self.low > 0 else WORSE if self.high < 0 else OPEN

    @property
    def why_no_verdict(self) -> str:
        """ "" where there is one: every pair has the value, there are MIN_PAIRS of them, and they differ."""
        missing = len(self.values) - self.n
        if missing:
            return f"{missing} of {len(self.values)} pairs of runs lack{'s' if missing == 1 else ''} the value"
        if self.n < MIN_PAIRS:
            return f"fewer than {MIN_PAIRS} pairs of runs"
        return "" if math.isfinite(self.low) else "all differences are equal"

    @property
    def direction(self) -> str:
        """``verdict`` for a value of which more is neither better nor worse: HIGHER or LOWER."""
        return {BETTER: HIGHER, WORSE: LOWER}.get(self.verdict, self.verdict)


def summarize(values: Sequence[float], others: Sequence[float] | None = None) -> Summary:
    """Over the finite values, see Summary.

    Args:
        others: those of the other arm: only the seeds of which both have the value count, as in ``paired_difference``.
    """
    others = values if others is None else others
    there = np.array([v for v, w in zip(values, others, strict=True) if math.isfinite(v) and math.isfinite(w)])
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
    if n > 1 and np.ptp(there) > _NO_SPREAD * max(1.0, np.abs(there).max()):
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
    if difference.n == 1 == len(difference.values):
        return f"{head}, {seeds}: no interval over seeds from one pair of runs, so no verdict"
    if math.isfinite(difference.low):
        head += f", {100 * CONFIDENCE:.0f} % CI {difference.low:+.1f} .. {difference.high:+.1f}"
    why = difference.why_no_verdict
    return f"{head}, {seeds}: {difference.verdict}" + (f" ({why})" if why else "")
