"""The runs of a comparison: what a run is, and which may be compared."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog

from repr_det.method.errors import UserError
from repr_det.runs.record import DATA_FILE, describe_data_sets
from repr_det.studies.comparison.records import Settings, read_metrics, read_settings

BASELINE, REPR = "baseline", "repr"
# Where runs are and how often they are saved; nothing that a result depends on.
FREE_WITHIN_REPR = ("OUTPUT_DIR", "SEED", "VERSION", "VIS_PERIOD", "SOLVER.CHECKPOINT_PERIOD")
FREE = (*FREE_WITHIN_REPR, "REPR.")
# What two configs must share, whatever else they differ in: data, their order, iterations, evaluations.
SHARED = ("SOLVER.MAX_ITER", "DATASETS.", "DATALOADER.", "TEST.EVAL_PERIOD")
# The first difference in this order is the one that is named.
_ORDER = ("SOLVER.MAX_ITER", "DATASETS.TRAIN", "DATASETS.TEST", "SOLVER.IMS_PER_BATCH", "INPUT.", "MODEL.", "SOLVER.")


def title(arm: str) -> str:
    """The name of an arm for people."""
    return "RePr" if arm == REPR else arm


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        arm: "baseline", "repr", or the name of another setting.
        seed: SEED of the run; the runs of two arms are paired by it.
        folder: its OUTPUT_DIR.
        max_iter: SOLVER.MAX_ITER, scaled to the number of processes.
        flags: the command up to the place where --resume belongs; empty for a run that was trained elsewhere.
        opts: the KEY VALUE pairs after it.
    """

    arm: str
    seed: int
    folder: Path
    max_iter: int
    flags: tuple[str, ...] = ()
    opts: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{title(self.arm)} seed {self.seed}"

    def command(self, resume: bool = False) -> list[str]:
        return [*self.flags, *(["--resume"] if resume else []), *self.opts]


@dataclass(frozen=True)
class Study:
    """The runs of two arms.

    Attributes:
        arms: the reference, and what is measured against it.
        runs: of both arms, one a seed.
        any_config: the arms are two configs that share what SHARED names; otherwise they differ in REPR alone.
    """

    arms: tuple[str, str]
    runs: tuple[Run, ...]
    any_config: bool = False

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs})

    def of(self, arm: str) -> list[Run]:
        """The runs of an arm by ascending seed."""
        return sorted((run for run in self.runs if run.arm == arm), key=lambda run: run.seed)


@dataclass(frozen=True)
class Setting:
    """Runs beside the arms that differ from one of them in the same keys and values.

    Attributes:
        name: "baseline, SOLVER.WEIGHT_DECAY 0.001".
        arm: the one that they are a variant of.
        settings: config key -> their value, if it is not that of the arm.
        runs: by seed.
    """

    name: str
    arm: str
    settings: Settings
    runs: dict[int, Run]


def final_row(rows: dict[int, dict[str, float]], max_iter: int) -> dict[str, float]:
    """The evaluation after the last iteration, {} if the run is not finished. Its AP may be NaN."""
    # A run that is resumed after its last step logs its evaluation one iteration later.
    return next((row for i, row in reversed(rows.items()) if i >= max_iter and "bbox/AP" in row), {})


def is_finished(run: Run) -> bool:
    return bool(final_row(read_metrics(run.folder), run.max_iter))


def is_number(value: object) -> bool:
    """Tells a finite number from COCO's -1 for "no such objects"."""
    return isinstance(value, (int, float)) and math.isfinite(value) and value >= 0


def run_from_folder(folder: Path, arm: str | None = None) -> Run:
    """A run that was trained already; refuses one of another arm than ``arm``, if given, or without a seed."""
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


def check_pairs(study: Study) -> None:
    """Refuses a seed that occurs twice in an arm, or in one arm alone."""
    seeds: dict[str, dict[int, Run]] = {arm: {} for arm in study.arms}
    for run in study.runs:
        other = seeds[run.arm].setdefault(run.seed, run)
        if other is not run:
            raise UserError(f"{run.folder} and {other.folder} are both {run.name}: give one run for each seed")
    for arm, lacking in (study.arms, study.arms[::-1]):
        check_seeds(seeds[arm].values(), list(seeds[lacking]), f"the {lacking} runs have")


def check_seeds(runs: Iterable[Run], seeds: Sequence[int], others: str) -> None:
    """Refuses runs of other seeds than those that the ``others`` have."""
    for run in runs:
        if run.seed not in seeds:
            known = ", ".join(map(str, sorted(seeds)))
            raise UserError(f"{run.folder} has SEED {run.seed}, but {others} {known}: runs are paired by seed")


def check_finished(runs: Iterable[Run]) -> None:
    """Refuses a run without an evaluation after its last iteration."""
    for run in runs:
        if not is_finished(run):
            trained = max((i + 1 for i, row in read_metrics(run.folder).items() if "total_loss" in row), default=0)
            raise UserError(
                f"{run.folder} is not finished ({trained} of SOLVER.MAX_ITER {run.max_iter} "
                "iterations and no evaluation after them): finish it with --resume, then compare"
            )


def check_comparable(study: Study) -> None:
    """Refuses arms that differ in more than they may, and an arm whose runs differ in what a result depends on."""
    configs = {run: read_settings(run.folder) for run in study.runs}
    refuse_differences({run.folder: config for run, config in configs.items()}, shared=study.any_config)
    for arm in study.arms:
        own = {run.folder: configs[run] for run in study.of(arm)}
        enabled = any(config.get("REPR.ENABLED") for config in own.values())
        refuse_differences(own, FREE_WITHIN_REPR if enabled else FREE)
    tests = configs[study.runs[0]].get("DATASETS.TEST") or []
    if len(tests) != 1:
        raise UserError(f"DATASETS.TEST must name one data set for a comparison, got {len(tests)}: {', '.join(tests)}")


def refuse_differences(configs: dict[Any, Settings], free: Sequence[str] = FREE, shared: bool = False) -> None:
    """Refuses configs that differ from the first one, naming the key and both values.

    Args:
        configs: name for the message -> config.
        free: keys that may differ.
        shared: only those of SHARED must be the same.
    """
    first, reference = next(iter(configs.items()))
    for name, config in configs.items():
        for key in differing_keys(reference, config, free):
            if not shared or key.startswith(SHARED):
                here, there = reference.get(key, "absent"), config.get(key, "absent")
                raise UserError(
                    f"{first} and {name} cannot be compared: {key} is {here} in the first and {there} in the second"
                )


def differing_keys(a: Settings, b: Settings, free: Sequence[str] = FREE) -> list[str]:
    """The keys whose values differ, in the order of what matters most.

    A key that only one of them has counts as a difference (another version of Detectron2 or of this package).
    """
    keys = [key for key in {**a, **b} if not key.startswith(tuple(free))]
    keys.sort(key=lambda key: next((n for n, head in enumerate(_ORDER) if key.startswith(head)), len(_ORDER)))
    missing = object()
    return [key for key in keys if a.get(key, missing) != b.get(key, missing)]


def check_same_data(folders: Iterable[Path]) -> None:
    """Refuses a data set's name that stands for two contents: in two runs, in the part of a run before it was resumed
    with other data, or in this process. Runs of versions that kept no record are taken as they are."""
    first: dict[str, tuple[Path, dict[str, Any]]] = {}
    for folder in folders:
        for name, entry in _data_sets(folder):
            other, known = first.setdefault(name, (folder, entry))
            if not _same_content(entry, known):
                raise UserError(
                    f"{other} and {folder} cannot be compared: {name} was {known.get('file')} in the first and "
                    f"{entry.get('file')}, with other content, in the second"
                )
    registered = [name for name in first if name in DatasetCatalog]
    for name, here in describe_data_sets(registered).items():
        folder, known = first[name]
        if not _same_content(here, known):
            raise UserError(
                f"{name} is {here['file']} here and was {known.get('file')}, with other content, for {folder}: give "
                "--register the file of the runs"
            )


def group_by_settings(others: Iterable[Run], study: Study) -> list[Setting]:
    """Groups runs beside the arms by the keys in which their config differs from that of an arm.

    The arm is the one that a run differs least from, among those with RePr if it has RePr, otherwise among those
    without. Refuses a run that was evaluated on other data, differs in nothing, or has the seed of another one.
    """
    references = {arm: read_settings(study.of(arm)[0].folder) for arm in study.arms}
    groups: dict[str, Setting] = {}
    for run in others:
        config = read_settings(run.folder)
        enabled = config.get("REPR.ENABLED")
        free = FREE_WITHIN_REPR if enabled else FREE
        keys = {arm: differing_keys(reference, config, free) for arm, reference in references.items()}
        alike = [arm for arm in study.arms if references[arm].get("REPR.ENABLED") == enabled]
        arm = min(alike or study.arms, key=lambda one: len(keys[one]))
        if "DATASETS.TEST" in keys[arm]:
            tests, expected = config.get("DATASETS.TEST"), references[arm].get("DATASETS.TEST")
            raise UserError(
                f"{run.folder} was evaluated on DATASETS.TEST {tests}, the arms on {expected}: AP cannot be compared"
            )
        if not keys[arm]:
            raise UserError(f"{run.folder} has the settings of the {title(arm)} runs: --other-runs takes other ones")
        settings = {key: config.get(key, "absent") for key in keys[arm]}
        name = ", ".join([title(arm), *(f"{key} {value}" for key, value in settings.items())])
        other = groups.setdefault(name, Setting(name, arm, settings, {})).runs.setdefault(run.seed, run)
        if other is not run:
            raise UserError(
                f"{run.folder} and {other.folder} have the same settings and SEED {run.seed}: give one run for each"
            )
    return list(groups.values())


def _data_sets(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """(name, description) of what the run was trained on at any time; a damaged record says nothing."""
    found = []
    for path in sorted(folder.glob(f"{Path(DATA_FILE).stem}*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict):
            found += [(name, entry) for name, entry in record.items() if isinstance(entry, dict)]
    return found


def _same_content(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """By classes and number of images if one was described before its file was there, as shapes drawn on first use."""
    keys = ("sha256",) if a.get("sha256") and b.get("sha256") else ("classes", "images")
    return all(a.get(key) == b.get(key) for key in keys)
