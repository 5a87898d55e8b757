"""Where a run's wall-clock time went, phase by phase."""

from collections.abc import Sequence
from typing import Any

from repr_det.studies.comparison.records import WallClock

FULL, SUB, AFTER, TRANSITIONS, EVALUATION, REST = "full", "sub", "after", "transitions", "evaluation", "rest"
PHASES = {
    FULL: "full network, up to the last restore",
    SUB: "iterations of the sub-network (full in the baseline)",
    AFTER: "full network, after the last restore",
    TRANSITIONS: "drops and restores",
    EVALUATION: "evaluation",
    REST: "start-up, checkpoints, logging",
}


def sub_network_phases(events: Sequence[dict[str, Any]], max_iter: int) -> list[tuple[int, int]]:
    """[first, end) iterations of the sub-network, one a cycle."""
    phases, start = [], None
    for event in events:
        if event["event"] == "drop":
            start = event["iteration"] + 1
        elif start is not None:
            phases.append((start, event["iteration"] + 1))
            start = None
    return phases if start is None else [*phases, (start, max_iter)]


def phase_seconds(
    rows: dict[int, dict[str, float]],
    phases: Sequence[tuple[int, int]],
    transitions: float,
    wall: WallClock | None,
) -> dict[str, float]:
    """Seconds by phase.

    Every logged row stands for the iterations since the row before it; their time is the row's ``time`` (Detectron2's
    median over 20 iterations, data loading included, hooks excluded).

    Args:
        rows: metrics.json by iteration.
        phases: see ``sub_network_phases``; for a baseline those of its RePr partner, so that the same iterations are
            compared.
        transitions: seconds spent in drops and restores.
        wall: the log's view; without it evaluation and rest are 0.
    """
    seconds = dict.fromkeys(PHASES, 0.0)
    end = phases[-1][1] if phases else 0
    before = 0
    for iteration, row in rows.items():
        if "time" not in row:
            continue
        inside = sum(max(0, min(stop, iteration + 1) - max(start, before)) for start, stop in phases)
        after = max(0, iteration + 1 - max(before, end))
        seconds[SUB] += row["time"] * inside
        seconds[AFTER] += row["time"] * after
        seconds[FULL] += row["time"] * (iteration + 1 - before - inside - after)
        before = iteration + 1
    seconds[TRANSITIONS] = transitions
    if wall is not None:
        seconds[EVALUATION] = wall.evaluation
        seconds[REST] = max(0.0, wall.total - sum(seconds.values()))
    return seconds
