"""Inter-filter orthogonality O_f of whole networks at three moments: from the hook's snapshots or from checkpoints."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repr_det.method.orthogonality import inter_filter_orthogonality
from repr_det.runs.files import FINAL_CHECKPOINT
from repr_det.studies.comparison.records import checkpoints, read_overlaps
from repr_det.studies.comparison.results import RunData
from repr_det.studies.comparison.runs import BASELINE, REPR

Overlaps = dict[str, np.ndarray]  # layer -> O_f of every filter


@dataclass
class Moment:
    """O_f of both arms at one moment, the filters of all seeds together.

    Attributes:
        title: what the moment is.
        arms: arm -> layer -> O_f. Before the first drop both arms are the same network, under REPR.
        iterations: arm -> iterations trained, where that is not the moment itself but the nearest checkpoint.
    """

    title: str
    arms: dict[str, Overlaps]
    iterations: dict[str, int]


def filter_counts(pairs: Sequence[tuple[RunData, RunData]]) -> dict[str, int]:
    """Layer -> filters, in network order, of the layers that take part; {} where nothing tells."""
    return next((found for _, other in pairs if (found := _filter_counts(other))), {})


def overlap_moments(pairs: Sequence[tuple[RunData, RunData]], layers: Sequence[str]) -> list[Moment]:
    """The moments that something is known of, in order."""
    if not layers:
        return []
    drops = [event["iteration"] for event in pairs[0][1].events if event["event"] == "drop"]
    restores = [event["iteration"] for event in pairs[0][1].events if event["event"] == "restore"]
    moments = []
    if drops:
        before = _pool(_recorded(other, "drop", drops[0]) for _, other in pairs)
        moments.append(Moment("before the first drop", {REPR: before} if before else {}, {}))
    if restores:
        arms, iterations = {}, {}
        if after := _pool(_recorded(other, "restore", restores[-1]) for _, other in pairs):
            arms[REPR] = after
        near = _nearest_checkpoint([base for base, _ in pairs], restores[-1] + 1)
        if near is not None and (found := _pool(_of_checkpoint(base, near, layers) for base, _ in pairs)):
            arms[BASELINE], iterations[BASELINE] = found, near
        moments.append(Moment("after the last restore", arms, iterations))
    end = {
        BASELINE: _pool(_of_checkpoint(base, None, layers) for base, _ in pairs),
        REPR: _pool(_of_checkpoint(other, None, layers) for _, other in pairs),
    }
    moments.append(Moment("at the end", {arm: found for arm, found in end.items() if found}, {}))
    return [moment for moment in moments if moment.arms]


def _filter_counts(one: RunData) -> dict[str, int]:
    """From the snapshots, the final checkpoint, or at least those layers that ever lost filters."""
    for line in read_overlaps(one.run.folder):
        return {layer: len(values) for layer, values in line["overlap"].items()}
    state = _load(one.run.folder / FINAL_CHECKPOINT) or {}
    if filters := state.get("trainer", {}).get("hooks", {}).get("RePrHook", {}).get("scheme", {}).get("filters"):
        return filters
    counts: dict[str, int] = {}
    for event in one.events:
        for layer, dropped in event["dropped"].items():
            counts[layer] = max(counts.get(layer, 0), max(dropped) + 1)
    return counts


def _recorded(one: RunData, event: str, iteration: int) -> Overlaps:
    for line in read_overlaps(one.run.folder):
        if line.get("event") == event and line.get("iteration") == iteration:
            return {layer: np.asarray(values, dtype=float) for layer, values in line["overlap"].items()}
    return {}


def _nearest_checkpoint(runs: list[RunData], iteration: int) -> int | None:
    """Iterations trained of the checkpoint that all runs have nearest to ``iteration``, if near enough to stand for it:
    within a twentieth of the run."""
    common = set.intersection(*(set(checkpoints(one.run.folder)) for one in runs))
    nearest = min(common, key=lambda trained: abs(trained - iteration), default=None)
    if nearest is None or abs(nearest - iteration) > runs[0].run.max_iter / 20:
        return None
    return nearest


def _of_checkpoint(one: RunData, trained: int | None, layers: Sequence[str]) -> Overlaps:
    path = one.run.folder / FINAL_CHECKPOINT if trained is None else checkpoints(one.run.folder)[trained]
    state = (_load(path) or {}).get("model", {})
    return {
        layer: inter_filter_orthogonality(torch.as_tensor(state[f"{layer}.weight"]).float()).numpy()
        for layer in layers
        if f"{layer}.weight" in state
    }


def _load(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, OSError):
        return None  # the report does without what a damaged or foreign file would have shown
    return found if isinstance(found, dict) else None


def _pool(many: Any) -> Overlaps:
    """One seed's filters beside the next's."""
    pooled: dict[str, list[np.ndarray]] = {}
    for one in many:
        for layer, values in one.items():
            pooled.setdefault(layer, []).append(values)
    return {layer: np.concatenate(values) for layer, values in pooled.items()}
