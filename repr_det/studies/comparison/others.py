"""Runs of other settings beside the two arms: what a user could do instead of RePr, or RePr with other options."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repr_det.method.errors import UserError
from repr_det.studies.comparison.pairing import (
    FREE,
    FREE_WITHIN_REPR,
    Pair,
    check_finished,
    differing_keys,
    run_from_folder,
)
from repr_det.studies.comparison.records import read_settings
from repr_det.studies.comparison.runs import ARM_NAMES, BASELINE, REPR, Run

_KEYS_IN_A_NAME = 4


@dataclass(frozen=True)
class OtherSetting:
    """Runs that differ from one arm of the comparison in the same keys and values.

    Attributes:
        arm: "baseline" where they train without RePr, else "repr".
        settings: config key -> their value, where it is not that of the arm.
        runs: by ascending seed.
    """

    arm: str
    settings: dict[str, Any]
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        """ "baseline, SOLVER.WEIGHT_DECAY 0.001"."""
        words = [f"{key} {value}" for key, value in list(self.settings.items())[:_KEYS_IN_A_NAME]]
        more = len(self.settings) - len(words)
        return ", ".join([ARM_NAMES[self.arm], *words, *([f"{more} more keys"] if more else [])])


def read_other_runs(folders: Sequence[Path], seeds: Sequence[int]) -> list[Run]:
    """Finished runs of either arm.

    Args:
        seeds: those of the comparison.

    Raises:
        UserError: a folder holds no finished run, or one with a seed that the comparison lacks.
    """
    runs = [run_from_folder(folder) for folder in folders]
    for run in runs:
        if run.seed not in seeds:
            raise UserError(
                f"{run.folder} has SEED {run.seed}, the comparison {', '.join(map(str, seeds))}: "
                "runs are paired by seed"
            )
    check_finished(runs)
    return runs


def group_by_settings(others: Sequence[Run], pairs: Sequence[Pair]) -> list[OtherSetting]:
    """The runs grouped by how their config differs from that of their arm, in the order of the first of each group.

    Raises:
        UserError: a run was evaluated on other data, differs from its arm in nothing, or has the seed of another one in
            its group.
    """
    references = {
        BASELINE: read_settings(pairs[0].baseline.folder),
        REPR: read_settings(pairs[0].repr.folder),
    }
    groups: dict[str, tuple[str, dict[str, Any], dict[int, Run]]] = {}
    for run in others:
        folder, config, reference = run.folder, read_settings(run.folder), references[run.arm]
        if config.get("DATASETS.TEST") != reference.get("DATASETS.TEST"):
            raise UserError(
                f"{folder} was evaluated on DATASETS.TEST {config.get('DATASETS.TEST')}, the arms on "
                f"{reference.get('DATASETS.TEST')}: their AP cannot be compared"
            )
        keys = differing_keys(reference, config, FREE if run.arm == BASELINE else FREE_WITHIN_REPR)
        if not keys:
            raise UserError(
                f"{folder} has the settings of the {ARM_NAMES[run.arm]} runs: --other-runs takes runs of other settings"
            )
        settings = {key: config.get(key, "absent") for key in keys}
        *_, runs = groups.setdefault(f"{run.arm} {settings}", (run.arm, settings, {}))
        if runs.setdefault(run.seed, run) is not run:
            raise UserError(
                f"{folder} and {runs[run.seed].folder} have the same settings and SEED {run.seed}: "
                "give one run for each"
            )
    return [
        OtherSetting(arm, settings, tuple(runs[s] for s in sorted(runs))) for arm, settings, runs in groups.values()
    ]
