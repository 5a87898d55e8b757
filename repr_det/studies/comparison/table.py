"""The comparison as text for a terminal."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from repr_det.studies.comparison.runs import BASELINE, REPR


def number(value: float, sign: bool = False) -> str:
    """One decimal; "n/a" where there is none."""
    if value is None or not math.isfinite(value):
        return "n/a"
    return f"{value:+.1f}" if sign else f"{value:.1f}"


def metrics_table(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Rows baseline, RePr, difference; columns the metrics (``Comparison.results["metrics"]``)."""
    several = any(row[BASELINE]["n"] > 1 for row in metrics.values())
    lines: list[Sequence[str]] = [["", *metrics]]
    for title, arm in (("baseline", BASELINE), ("RePr", REPR)):
        lines.append([title, *(_mean_and_sd(row[arm], several) for row in metrics.values())])
    lines.append(["RePr - baseline", *(number(row["difference"]["mean"], sign=True) for row in metrics.values())])
    if several:
        lines.append(["95 % CI", *(_interval(row["difference"]) for row in metrics.values())])
    return _aligned(lines)


def others_table(others: Sequence[Mapping[str, Any]]) -> str:
    """Rows the other settings (``Comparison.results["others"]``), columns their AP and what it is against both arms."""
    lines: list[Sequence[str]] = [["other settings", "seeds", "AP", "- baseline", "95 % CI", "- RePr", "95 % CI"]]
    for row in others:
        cells = [row["name"], str(row["AP"]["n"]), _mean_and_sd(row["AP"], several=row["AP"]["n"] > 1)]
        for arm in (BASELINE, REPR):
            difference = row[f"minus_{arm}"]
            cells += [number(difference["mean"], sign=True), _interval(difference)]
        lines.append(cells)
    return _aligned(lines)


def _mean_and_sd(summary: Mapping[str, Any], several: bool) -> str:
    return f"{number(summary['mean'])} ± {number(summary['sd'])}" if several else number(summary["mean"])


def _interval(difference: Mapping[str, Any]) -> str:
    if not math.isfinite(difference["low"]):
        return "n/a"
    return f"{difference['low']:+.1f} .. {difference['high']:+.1f}"


def _aligned(lines: list[Sequence[str]]) -> str:
    return tabulate(
        lines, headers="firstrow", disable_numparse=True, colalign=["left"] + ["right"] * (len(lines[0]) - 1)
    )
