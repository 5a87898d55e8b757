"""Values, differences and tables of the evidence as text."""

import math
from collections.abc import Iterable, Mapping, Sequence

from repr_det.studies.comparison.statistics import Difference, paired_difference, summarize


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table without padding, so that a changed cell changes one line."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |".replace("  ", " ") for row in rows)


def spread(values: Iterable[float]) -> str:
    """Mean ± standard deviation (n - 1)."""
    found = summarize(list(values))
    return f"{found.mean:.1f}" + (f" ± {found.sd:.1f}" if found.n > 1 else "")


def paired(baseline: Mapping[int, float], other: Mapping[int, float]) -> Difference | None:
    """Other minus baseline, both seed -> value, over the seeds that both have; None without any."""
    seeds = sorted(set(baseline) & set(other))
    return paired_difference(*([arm[seed] for seed in seeds] for arm in (baseline, other))) if seeds else None


def interval(d: Difference | None) -> str:
    """Mean difference (95 % CI, pairs); the difference itself of one pair."""
    if d is None:
        return "no baseline of these seeds"
    if math.isfinite(d.low):
        return f"{d.mean:+.1f} ({d.low:+.1f} .. {d.high:+.1f}, {d.n} pairs)"
    pairs = "one pair" if d.n == 1 else f"{d.n} pairs"
    same = "" if any(d.values) else "the same numbers, "
    return f"{d.mean:+.1f} ({same}{pairs})"
