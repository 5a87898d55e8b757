"""The runs of a comparison, which may be compared, and one table of their results."""

import contextlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from tabulate import tabulate

from repr_det.commands.arguments import merge_config_file
from repr_det.detectron.config import add_repr_config, as_user_error, scale_to_world
from repr_det.method.errors import UserError
from repr_det.runs.files import EVENTS_FILE, METRICS_FILE, read_json_lines, write_atomically
from repr_det.runs.record import CONFIG_FILE, DATA_FILE, describe_data_set
from repr_det.studies.comparison.statistics import (
    could_show,
    interval,
    number,
    paired_difference,
    summarize,
    verdict_sentence,
)

BASELINE, REPR = "baseline", "repr"
PROCESSES = "number of processes"
# Keys on which no result depends, those in which runs of an arm differ, and those in which baseline and RePr differ.
WITHOUT_EFFECT = ("OUTPUT_DIR", "VERSION", "VIS_PERIOD", "SOLVER.CHECKPOINT_PERIOD")
FREE_WITHIN_ARM = (*WITHOUT_EFFECT, "SEED")
FREE = (*FREE_WITHIN_ARM, "REPR.")
# What any two configs must share: data, their order, iterations, evaluations.
SHARED = (PROCESSES, "SOLVER.MAX_ITER", "SOLVER.IMS_PER_BATCH", "DATASETS.", "DATALOADER.", "TEST.EVAL_PERIOD")
# What may have been another one before a run was resumed.
RESUMED = (PROCESSES, "SOLVER.MAX_ITER", "DATALOADER.NUM_WORKERS", "TEST.EVAL_PERIOD")
Settings = dict[str, Any]  # a flat config: SOLVER.MAX_ITER -> its value


def title(arm: str) -> str:
    return "RePr" if arm == REPR else arm


@dataclass(frozen=True)
class Run:
    """A training run; without arguments of ``repr_det.train`` if trained elsewhere."""

    arm: str
    seed: int
    folder: Path
    max_iter: int
    arguments: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{title(self.arm)} seed {self.seed}"


@dataclass(frozen=True)
class Study:
    """The runs of two arms, the reference first, paired by seed. Arms of other names than BASELINE and REPR are of any
    two configs, which share only SHARED."""

    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        first = {}
        for run in self.runs:
            if run.seed < 0:
                raise UserError(f"{run.folder} has SEED {run.seed}: runs are paired by seed, it must be 0 or more")
            other = first.setdefault((run.arm, run.seed), run)
            if other is not run:
                raise UserError(f"{run.folder} and {other.folder} are both {run.name}: give one run for each seed")
        for arm in self.arms:
            for seed in self.seeds:
                if (arm, seed) not in first:
                    raise UserError(f"no {arm} run has SEED {seed}: runs are paired by seed")

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run.arm for run in self.runs))

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs})

    def of(self, arm: str) -> list[Run]:
        """The runs of an arm by ascending seed."""
        return sorted((run for run in self.runs if run.arm == arm), key=lambda run: run.seed)


def read_json(path: Path) -> Any:
    """The content of a file; UserError if it is damaged."""
    with as_user_error(f"{path} is damaged"):
        return json.loads(path.read_text(encoding="utf-8"))


def read_metrics(folder: Path) -> dict[int, dict[str, float]]:
    """Iteration -> everything logged for it. Where a run was resumed, or another began, what came before is cut off."""
    rows, last = {}, {}
    for line in read_json_lines(folder / METRICS_FILE):
        now = line.pop("iteration")
        if any(last.get(key, -1) >= now for key in line):  # a run logs nothing twice
            rows, last = {i: row for i, row in rows.items() if i < now}, {}
        rows.setdefault(now, {}).update(line)
        last |= dict.fromkeys(line, now)
    return dict(sorted(rows.items()))


def final_row(rows: dict[int, dict[str, float]], max_iter: int) -> dict[str, float]:
    """The evaluation after the last iteration, {} if unfinished. Its AP may be NaN."""
    # A run resumed after its last step logs it one iteration later.
    return next((rows[i] for i in (max_iter + 1, max_iter) if "bbox/AP" in rows.get(i, ())), {})


def is_finished(run: Run) -> bool:
    return bool(final_row(read_metrics(run.folder), run.max_iter))


def read_config(folder: Path, name: str = CONFIG_FILE) -> CfgNode:
    """The config of a run as given; keys newer than it have their defaults."""
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path} is missing: give the OUTPUT_DIR of a Detectron2 run")
    cfg = get_cfg()
    add_repr_config(cfg)
    merge_config_file(cfg, str(path))
    cfg.freeze()
    return cfg


def read_settings(folder: Path, name: str = CONFIG_FILE) -> Settings:
    """The config of a run, scaled to its processes, and their number, which an older run lacks."""
    cfg = read_config(folder, name)
    path = folder / name.replace("config", "processes").replace("yaml", "json")  # PROCESSES_FILE, or one kept with it
    if path.is_file():
        with as_user_error(f"{path} is damaged"):
            return settings_by(int(path.read_text(encoding="utf-8")), cfg)
    if cfg.SOLVER.REFERENCE_WORLD_SIZE:
        raise UserError(f"{folder} has SOLVER.REFERENCE_WORLD_SIZE: write the number of its processes into {path}")
    return flatten(cfg)


def settings_by(processes: int, cfg: CfgNode) -> Settings:
    """The settings of a run by so many processes."""
    return {PROCESSES: processes} | flatten(scale_to_world(cfg, processes))


def flatten(cfg: CfgNode) -> Settings:
    """The values of a config as in a yaml file."""
    return pd.json_normalize(yaml.safe_load(cfg.dump())).to_dict("records")[0]


def settings_of_parts(folder: Path) -> tuple[dict[Path, Settings], list]:
    """The settings of a run and of its parts before it was resumed, by place; notes say what of RESUMED changed."""
    parts, notes = {folder: read_settings(folder)}, []
    for path in sorted(folder.glob(f"{Path(CONFIG_FILE).stem}_until_*.yaml")):
        before = read_settings(folder, path.name)
        now = {key: parts[folder][key] for key in RESUMED if key in before}
        notes += [f"{path}: {key} was {before[key]} and became {now[key]}." for key in now if before[key] != now[key]]
        parts[path] = before | now
    return parts, notes


def run_from_folder(folder: Path, arm: str) -> Run:
    config = read_settings(folder)
    return Run(arm, config["SEED"], folder, config["SOLVER.MAX_ITER"])


def check_comparable(study: Study) -> list[str]:
    """Refuses unfinished runs, those of the other arm, and differences between and within arms; returns notes."""
    for run in study.runs:
        if not is_finished(run):
            command = f"python -m repr_det.train --config-file {run.folder / CONFIG_FILE} --resume"
            raise UserError(
                f"{run.folder} has no evaluation on one data set after SOLVER.MAX_ITER {run.max_iter}: run {command}"
            )
    configs, notes, of_repr = {arm: {} for arm in study.arms}, [], study.arms == (BASELINE, REPR)
    for run in study.runs:
        parts, found = settings_of_parts(run.folder)
        if of_repr and parts[run.folder]["REPR.ENABLED"] != (run.arm == REPR):
            raise UserError(f"{run.folder} has REPR.ENABLED {run.arm != REPR}: it is no {run.arm} run")
        if parts[run.folder]["REPR.ENABLED"] and not read_json_lines(run.folder / EVENTS_FILE):
            raise UserError(f"{run.folder} has REPR.ENABLED True, but no {EVENTS_FILE}: its trainer had no RePrHook")
        configs[run.arm] |= parts
        notes += found
    reference, other = configs.values()
    refuse_differences(reference | other, only_shared=not of_repr)
    for own in configs.values():
        refuse_differences(own, FREE_WITHIN_ARM)
    return notes + check_same_data([run.folder for run in study.runs])


def refuse_differences(configs: dict[Any, Settings], free: Sequence[str] = FREE, only_shared: bool = False) -> None:
    """Refuses configs (by name) that differ from the first one in keys that are not ``free`` and have an effect."""
    if any(PROCESSES not in config for config in configs.values()):
        free = (*free, PROCESSES)
    if not any(config["REPR.ENABLED"] for config in configs.values()):
        free = (*free, "REPR.")
    first, reference = next(iter(configs.items()))
    for name, config in configs.items():
        for key in differing_keys(reference, config, free):
            if not only_shared or key.startswith(SHARED):
                values = f"{reference.get(key, 'absent')} in the first and {config.get(key, 'absent')} in the second"
                raise UserError(f"{first} and {name} cannot be compared: {key} is {values}")


def differing_keys(a: Settings, b: Settings, free: Sequence[str]) -> list[str]:
    """The keys that are not ``free`` and whose values differ, or that only one has."""
    found = [key for key in {**a, **b} if key not in a or key not in b or a[key] != b[key]]
    return [key for key in found if not key.startswith(tuple(free))]


def check_same_data(folders: Iterable[Path]) -> list[str]:
    """Refuses a data set's name with two contents, in runs or this process; returns notes on other image folders."""
    used, notes = [], {}  # place, name, entry
    for folder in folders:
        for path in sorted(folder.glob(f"{Path(DATA_FILE).stem}*.json")):
            used += [(folder, name, entry) for name, entry in read_json(path).items()]
    registered = {name for _, name, _ in used}.intersection(DatasetCatalog)
    for name in sorted(registered):
        with contextlib.suppress(OSError, ImportError):  # data that are not here cannot contradict the runs
            used.append(("this command", name, describe_data_set(name)))
    first = {}
    for place, name, entry in used:
        other, known = first.setdefault(name, (place, entry))
        # Shapes that were not drawn yet have no hash.
        keys = ("sha256",) if entry["sha256"] and known["sha256"] else ("classes", "images")
        if any(entry[key] != known[key] for key in keys):
            files = f"{known['file']} in the first and {entry['file']}, with other content, in the second"
            raise UserError(f"{other} and {place} cannot be compared: {name} was {files}")
        roots = [one.get("image_root") for one in (known, entry)]
        if isinstance(place, Path) and all(roots) and roots[0] != roots[1]:
            notes[name] = f"The images of {name} were those in {roots[0]} for {other}, in {roots[1]} for {place}."
    return list(notes.values())


@dataclass
class Comparison:
    """Results of a study.

    Attributes:
        table: columns seed, arm, metric (COCO's, and AP-<class>), value (NaN without such objects).
        curves: iterations trained -> validation AP, a column (arm, seed) each.
        results: the content of results.json.
    """

    study: Study
    table: pd.DataFrame
    curves: pd.DataFrame
    results: dict[str, Any]


def compare(study: Study, notes: Sequence[str] = ()) -> Comparison:
    """Computes every number of the report from comparable runs."""
    lines, curves = [], {}
    notes = list(notes)
    if len(study.seeds) == 1:
        notes.append("One seed says nothing about the spread between runs.")
    for run in [run for arm in study.arms for run in study.of(arm)]:
        rows = read_metrics(run.folder)
        final = final_row(rows, run.max_iter)
        for key, value in final.items():
            if key.startswith("bbox/"):
                lines.append((run.seed, run.arm, key.removeprefix("bbox/"), value))
        if math.isnan(final["bbox/AP"]):
            notes.append(f"{run.folder}: the AP of its last evaluation is NaN: no detections, or no objects.")
        evaluated = {i: row["bbox/AP"] for i, row in rows.items() if "bbox/AP" in row}
        curves[run.arm, run.seed] = {min(i + 1, run.max_iter): ap for i, ap in evaluated.items()}
    table = pd.DataFrame(lines, columns=["seed", "arm", "metric", "value"])
    found = {metric: metric_row(table, metric, study.arms) for metric in table["metric"].unique()}
    results = {
        "verdict": found["AP"]["sentence"],
        "power": could_show(paired_difference(*(found["AP"][arm]["values"] for arm in study.arms))),
        "dataset": read_config(study.runs[0].folder).DATASETS.TEST[0],
        "seeds": study.seeds,
        "metrics": {metric: row for metric, row in found.items() if not metric.startswith("AP-")},
        "classes": {metric[3:]: row for metric, row in found.items() if metric.startswith("AP-")},
        "notes": notes,
    }
    return Comparison(study, table, pd.DataFrame(curves).sort_index(), results)


def metric_row(table: pd.DataFrame, metric: str, arms: Sequence[str]) -> dict[str, Any]:
    """Both arms over the seeds of the table, and the second minus the first."""
    by_seed = table[table["metric"] == metric].pivot(index="seed", columns="arm", values="value")
    by_seed = by_seed.reindex(index=sorted(table["seed"].unique()), columns=arms)
    by_seed[by_seed.isna().any(axis=1)] = math.nan
    reference, other = (by_seed[arm].tolist() for arm in arms)
    difference = paired_difference(reference, other)
    name = title(arms[1])
    if tuple(arms) != (BASELINE, REPR):
        name += f" against {title(arms[0])}:"
    return {
        arms[0]: asdict(summarize(reference)),
        arms[1]: asdict(summarize(other)),
        "difference": {**asdict(difference), "verdict": difference.verdict},
        "sentence": verdict_sentence(metric, difference, name),
    }


def lines_of(rows: dict[str, Any], arms: Sequence[str]) -> list[dict[str, str]]:
    lines = []
    for name, row in rows.items():
        line = {"": name}
        for arm in arms:
            spread = f" ± {number(row[arm]['sd'])}" if row[arm]["n"] > 1 else ""
            line[title(arm)] = number(row[arm]["mean"]) + spread
        found = row["difference"]
        line["difference"] = number(found["mean"], sign=True)
        line["95 % interval"] = interval(found["low"], found["high"])
        line["verdict"] = found["verdict"] if found["n"] else "n/a"
        lines.append(line)
    return lines


def metrics_table(results: dict[str, Any], arms: Sequence[str]) -> str:
    return tabulate(lines_of(results["metrics"], arms), headers="keys", disable_numparse=True)


def write_results(comparison: Comparison, folder: Path) -> None:
    """Writes results.csv, the table, and results.json, with null for NaN."""
    write_atomically(folder / "results.csv", comparison.table.to_csv(index=False, float_format="%.4f", na_rep="n/a"))
    without_nan = json.loads(json.dumps(comparison.results), parse_constant=lambda word: None)
    write_atomically(folder / "results.json", json.dumps(without_nan, indent=1, ensure_ascii=False))
