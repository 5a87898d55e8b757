"""Means, spreads and intervals over seeds, the difference that seeds can show, and their words."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
POWER = 0.8  # probability that a difference of the stated size gets its verdict
MIN_PAIRS = 3  # two equal differences have an interval without width
MOST_SEEDS = 10_000
_NO_SPREAD = 1e-9  # standard deviation of differences, relative to their size, that is rounding


@dataclass(frozen=True)
class Summary:
    """Values of the seeds; of the finite ones mean, standard deviation (n - 1) and number."""

    values: tuple[float, ...]
    mean: float
    sd: float
    n: int


@dataclass(frozen=True)
class Difference(Summary):
    """One arm minus its reference, paired by seed, and the 95 % interval of its mean (or NaN)."""

    low: float
    high: float

    @property
    def verdict(self) -> str:
        """The word for the difference: "better" or "worse" if the interval excludes 0."""
        if self.why_no_verdict:
            return "no verdict"
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "not distinguishable"

    @property
    def why_no_verdict(self) -> str:
        """The reason; "" if every pair has the value, there are MIN_PAIRS of them, and they differ."""
        missing = len(self.values) - self.n
        if missing:
            return f"{missing} of {len(self.values)} pairs of runs without the value"
        if self.n < MIN_PAIRS:
            return f"fewer than {MIN_PAIRS} pairs of runs"
        return "" if math.isfinite(self.low) else "all differences are equal"


def summarize(values: Sequence[float]) -> Summary:
    found = np.asarray(values, dtype=float)[np.isfinite(values)]
    mean = float(found.mean()) if len(found) else math.nan
    sd = float(found.std(ddof=1)) if len(found) > 1 else math.nan
    return Summary(tuple(values), mean, sd, len(found))


def paired_difference(baseline: Sequence[float], repr_: Sequence[float]) -> Difference:
    """Subtracts the baseline, pair by pair, with Student's t interval (differences taken as normal)."""
    values = np.asarray(repr_, dtype=float) - np.asarray(baseline, dtype=float)
    found = summarize(values.tolist())
    low = high = math.nan
    if found.n > 1 and found.sd > _NO_SPREAD * max(1.0, abs(found.mean)):
        low, high = map(float, stats.t.interval(CONFIDENCE, found.n - 1, found.mean, found.sd / math.sqrt(found.n)))
    return Difference(found.values, found.mean, found.sd, found.n, low, high)


def power(difference: float, sd: float, n: int) -> float:
    """The probability that ``n`` pairs give a true difference its verdict (paired t test)."""
    bound = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)
    shift = min(difference / sd * math.sqrt(n), 100.0)  # beyond 100 the power is 1, and scipy's is NaN
    return float(stats.nct.sf(bound, n - 1, shift))


def could_show(found: Difference) -> dict[str, Any]:
    """The true difference that so many pairs of this spread show with POWER, the pairs that show a difference of 1 (at
    most MOST_SEEDS + 1), and both in words; None and "" without a verdict."""
    if found.why_no_verdict:
        return {"detectable": None, "seeds_for_1": None, "sentence": ""}
    most = 100.0 * found.sd / math.sqrt(found.n)
    size = float(optimize.brentq(lambda size: power(size, found.sd, found.n) - POWER, 0.0, most))
    numbers = range(MIN_PAIRS, MOST_SEEDS + 1)
    needed = MIN_PAIRS + bisect.bisect_left(numbers, POWER, key=lambda n: power(1.0, found.sd, n))
    seeds = f"more than {MOST_SEEDS}" if needed > MOST_SEEDS else needed
    sentence = (
        f"With this spread, {found.n} seeds find a true difference of {number(size)} AP in four of five comparisons; a "
        f"difference of 1 AP needs {seeds} seeds"
    )
    return {"detectable": size, "seeds_for_1": needed, "sentence": sentence}


def number(value: float, sign: bool = False) -> str:
    """Text such as "41.3", "+0.8" or "n/a"."""
    if not math.isfinite(value):
        return "n/a"
    return f"{value:+.1f}" if sign else f"{value:.1f}"


def interval(low: float, high: float) -> str:
    """Text such as "-0.3 .. +1.9" or "n/a"."""
    return f"{number(low, sign=True)} .. {number(high, sign=True)}" if math.isfinite(low) else "n/a"


def verdict_sentence(metric: str, difference: Difference, name: str = "RePr") -> str:
    """A sentence such as "RePr +0.8 AP, 95 % CI -0.3 .. +1.9, 5 seeds: not distinguishable"."""
    if difference.n == 0:
        return f"{metric}: n/a (no pair of runs has it)"
    sentence = f"{name} {number(difference.mean, sign=True)} {metric}"
    if math.isfinite(difference.low):
        sentence += f", {100 * CONFIDENCE:.0f} % CI {interval(difference.low, difference.high)}"
    sentence += f", {difference.n} seed{'s' if difference.n > 1 else ''}: {difference.verdict}"
    why = difference.why_no_verdict
    return f"{sentence} ({why})" if why else sentence
