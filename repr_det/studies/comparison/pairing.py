"""Which runs may be compared: the same config but for REPR, finished, one run of each arm for every seed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repr_det.method.errors import UserError
from repr_det.studies.comparison.records import flatten, read_settings
from repr_det.studies.comparison.runs import BASELINE, REPR, Run, final_row, last_iteration

# Where runs are and how often they are saved; nothing that a result depends on.
FREE_WITHIN_REPR = ("OUTPUT_DIR", "SEED", "VERSION", "VIS_PERIOD", "SOLVER.CHECKPOINT_PERIOD")
FREE = (*FREE_WITHIN_REPR, "REPR.")
# The first difference in this order is the one that is named.
_ORDER = ("SOLVER.MAX_ITER", "DATASETS.TRAIN", "DATASETS.TEST", "SOLVER.IMS_PER_BATCH", "INPUT.", "MODEL.", "SOLVER.")


@dataclass(frozen=True)
class Pair:
    """The baseline and the RePr run of one seed."""

    seed: int
    baseline: Run
    repr: Run


def run_from_folder(folder: Path, arm: str | None = None) -> Run:
    """A run that was trained already.

    Args:
        arm: the one that it must be of; None takes either.

    Raises:
        UserError: it is no run of that arm, or has no seed.
    """
    config = read_settings(folder)
    enabled = bool(config.get("REPR.ENABLED", False))
    arm = arm or (REPR if enabled else BASELINE)
    if enabled != (arm == REPR):
        given = "--baseline-runs" if arm == BASELINE else "--repr-runs"
        raise UserError(f"{folder} was trained with REPR.ENABLED {enabled}: it does not belong to {given}")
    seed, max_iter = config.get("SEED", -1), config.get("SOLVER.MAX_ITER")
    if not isinstance(seed, int) or seed < 0:
        raise UserError(f"{folder} was trained with SEED {seed}: runs are paired by seed, so it must be fixed")
    if not isinstance(max_iter, int):
        raise UserError(f"{folder}/config.yaml has no SOLVER.MAX_ITER")
    return Run(arm, seed, folder, max_iter)


def pair_runs(runs: Iterable[Run]) -> list[Pair]:
    """Pairs by seed, in ascending order.

    Raises:
        UserError: a seed occurs twice in an arm, or in one arm alone.
    """
    arms: dict[str, dict[int, Run]] = {BASELINE: {}, REPR: {}}
    for run in runs:
        other = arms[run.arm].setdefault(run.seed, run)
        if other is not run:
            raise UserError(f"{run.folder} and {other.folder} are both {run.name}: give one run for each seed")
    baseline, repr_ = arms[BASELINE], arms[REPR]
    for seed in sorted(baseline.keys() ^ repr_.keys()):
        have, lack = (BASELINE, REPR) if seed in baseline else (REPR, BASELINE)
        others = ", ".join(map(str, sorted(arms[lack]))) or "none"
        raise UserError(
            f"{arms[have][seed].folder} has SEED {seed}, but the {lack} runs have {others}: runs are paired by seed"
        )
    return [Pair(seed, baseline[seed], repr_[seed]) for seed in sorted(baseline)]


def check_finished(runs: Iterable[Run]) -> None:
    """Raises UserError for the first run without an evaluation after its last iteration."""
    for run in runs:
        if final_row(run.folder, run.max_iter) is None:
            raise UserError(
                f"{run.folder} is not finished ({last_iteration(run.folder)} of SOLVER.MAX_ITER {run.max_iter} "
                "iterations and no evaluation after them): finish it with --resume, then compare"
            )


def check_comparable(runs: Sequence[Run]) -> None:
    """All configs agree in everything that a result depends on, REPR aside; within the RePr arm in REPR too.

    Raises:
        UserError: naming the first key that differs, with both values.
    """
    configs = [read_settings(run.folder) for run in runs]
    reference = configs[0]
    for run, config in zip(runs[1:], configs[1:], strict=True):
        _refuse_difference(runs[0], reference, run, config)
    arm = [(run, config) for run, config in zip(runs, configs, strict=True) if run.arm == REPR]
    for run, config in arm[1:]:
        _refuse_difference(*arm[0], run, config, FREE_WITHIN_REPR)
    tests = reference.get("DATASETS.TEST") or []
    if len(tests) != 1:
        raise UserError(f"DATASETS.TEST must name one data set for a comparison, got {len(tests)}: {', '.join(tests)}")


def check_planned(run: Run, config: dict[str, Any]) -> None:
    """A folder that holds a run already holds this one.

    Args:
        config: the run's config as nested dicts.

    Raises:
        UserError: naming the first key that differs, with both values.
    """
    if not (run.folder / "config.yaml").exists():
        return
    try:
        found = read_settings(run.folder, as_given=True)
    except UserError:  # cut short by a crash: the run had not begun to train
        return
    wanted = flatten(config)
    key = first_difference(found, wanted, free=("OUTPUT_DIR",) if run.arm == REPR else ("OUTPUT_DIR", "REPR."))
    if key is not None:
        raise UserError(
            f"{run.folder} holds a run with {key} {found.get(key)}, but this comparison has {wanted.get(key)}: give "
            "another --output, or remove that folder"
        )


def differing_keys(a: dict[str, Any], b: dict[str, Any], free: Sequence[str] = FREE) -> list[str]:
    """The keys whose values differ between two flat configs, in the order of what matters most.

    A key that only one of them has counts as a difference (another version of Detectron2 or of this package).
    """
    keys = [key for key in {**a, **b} if not key.startswith(tuple(free))]
    keys.sort(key=lambda key: next((n for n, head in enumerate(_ORDER) if key.startswith(head)), len(_ORDER)))
    missing = object()
    return [key for key in keys if a.get(key, missing) != b.get(key, missing)]


def first_difference(a: dict[str, Any], b: dict[str, Any], free: Sequence[str] = FREE) -> str | None:
    """The first of ``differing_keys``, or None."""
    return next(iter(differing_keys(a, b, free)), None)


def _refuse_difference(first: Run, config: dict, other: Run, other_config: dict, free: Sequence[str] = FREE) -> None:
    key = first_difference(config, other_config, free)
    if key is not None:
        raise UserError(
            f"{first.folder} and {other.folder} cannot be compared: {key} is {config.get(key, 'absent')} in the first "
            f"and {other_config.get(key, 'absent')} in the second"
        )
