"""Finished runs, read once into one table (seed, arm, metric, value); what follows from it, as data and as text."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from repr_det.runs.files import OVERLAPS_FILE, write_atomically
from repr_det.studies.comparison.records import (
    BASELINE,
    REPR,
    Run,
    Study,
    final_row,
    read_config,
    read_detections,
    read_events,
    read_json_lines,
    read_metrics,
    title,
)
from repr_det.studies.comparison.statistics import (
    detectable_difference,
    interval,
    number,
    paired_difference,
    power_sentence,
    seeds_needed,
    summarize,
    verdict_sentence,
)

Row = dict[str, Any]


@dataclass
class Reading:
    """A finished run: metrics by iteration, drops and restores, layer -> number of filters, and its last detections."""

    run: Run
    rows: dict[int, dict[str, float]]
    events: list[dict[str, Any]]
    filters: dict[str, int]
    detections: list[dict[str, Any]] | None

    @property
    def final(self) -> dict[str, float]:
        """COCO's metrics, and AP-<class> of each class, after the last iteration; NaN if there is no such object."""
        row = final_row(self.rows, self.run.max_iter)
        values = {key.removeprefix("bbox/"): value for key, value in row.items() if key.startswith("bbox/")}
        return {metric: value if value >= 0 else math.nan for metric, value in values.items()}  # COCO has -1

    @property
    def curve(self) -> dict[int, float]:
        """Iterations trained -> validation AP."""
        last = self.run.max_iter
        return {min(i + 1, last): row["bbox/AP"] for i, row in self.rows.items() if row.get("bbox/AP", -1) >= 0}

    @property
    def phases(self) -> list[tuple[int, int]]:
        """[first, end) iterations of the sub-network, one a cycle."""
        starts = [event["iteration"] + 1 for event in self.events if event["event"] == "drop"]
        ends = [event["iteration"] + 1 for event in self.events if event["event"] == "restore"]
        return list(zip(starts, [*ends, self.run.max_iter], strict=False))


@dataclass
class Comparison:
    """The runs of each arm by ascending seed, the table of their values, and the content of results.json."""

    study: Study
    readings: dict[str, list[Reading]]
    table: pd.DataFrame
    results: dict[str, Any]

    @property
    def all_readings(self) -> list[Reading]:
        return [reading for arm in self.study.arms for reading in self.readings[arm]]


def compare(study: Study) -> Comparison:
    """Reads finished, comparable runs and computes every number of the report."""
    readings = {arm: [_read(run) for run in study.of(arm)] for arm in study.arms}
    lines = []
    notes = ["One seed says nothing about the spread between runs."] if len(study.runs) == 2 else []
    for arm in study.arms:
        for reading in readings[arm]:
            run = reading.run
            lines += [(run.seed, arm, metric, value) for metric, value in reading.final.items()]
            if math.isnan(reading.final["AP"]):
                notes.append(f"{run.folder}: the AP of its last evaluation is NaN: no detections, or no objects.")
    table = pd.DataFrame(lines, columns=["seed", "arm", "metric", "value"])
    rows = {metric: metric_row(table, metric, study.arms) for metric in table["metric"].unique()}
    difference = paired_difference(*(rows["AP"][arm]["values"] for arm in study.arms))
    results = {
        "verdict": rows["AP"]["sentence"],
        "power": {
            "detectable": detectable_difference(difference),
            "seeds_for_1": seeds_needed(difference),
            "sentence": power_sentence("AP", difference),
        },
        "dataset": read_config(study.runs[0].folder).DATASETS.TEST[0],
        "seeds": study.seeds,
        "metrics": {metric: row for metric, row in rows.items() if not metric.startswith("AP-")},
        "classes": {metric[3:]: row for metric, row in rows.items() if metric.startswith("AP-")},
        "notes": notes,
    }
    return Comparison(study, readings, table, results)


def metric_row(table: pd.DataFrame, metric: str, arms: tuple[str, str]) -> Row:
    """Both arms over the seeds that both have, and the second minus the first."""
    by_seed = table[table["metric"] == metric].pivot(index="seed", columns="arm", values="value")
    by_seed = by_seed.reindex(columns=arms)
    by_seed[by_seed.isna().any(axis=1)] = math.nan
    reference, other = (by_seed[arm].tolist() for arm in arms)
    difference = paired_difference(reference, other)
    name = title(arms[1])
    if arms != (BASELINE, REPR):
        name += f" against {title(arms[0])}:"
    return {
        arms[0]: asdict(summarize(reference)),
        arms[1]: asdict(summarize(other)),
        "difference": {**asdict(difference), "verdict": difference.verdict},
        "sentence": verdict_sentence(metric, difference, name),
    }


def heads(arms: tuple[str, str]) -> list[str]:
    """The names of the columns of ``lines_of``."""
    return ["", *map(title, arms), "difference", "95 % interval", "verdict"]


def lines_of(rows: dict[str, Row], arms: tuple[str, str]) -> list[list[str]]:
    """A line a metric for people: name, both arms, difference, interval, verdict."""
    lines = []
    for name, row in rows.items():
        found = row["difference"]
        line = [name]
        for arm in arms:
            spread = f" ± {number(row[arm]['sd'])}" if row[arm]["n"] > 1 else ""
            line.append(number(row[arm]["mean"]) + spread)
        line += [number(found["mean"], sign=True), interval(found["low"], found["high"])]
        lines.append([*line, found["verdict"] if found["n"] else "n/a"])
    return lines


def metrics_table(results: Row, arms: tuple[str, str]) -> str:
    """COCO's metrics for a terminal."""
    return tabulate(lines_of(results["metrics"], arms), heads(arms), disable_numparse=True)


def write_results(comparison: Comparison, folder: Path) -> None:
    """Writes results.csv, the tidy table, and results.json, with null if there is no number."""
    write_atomically(folder / "results.csv", comparison.table.to_csv(index=False, float_format="%.4f", na_rep="n/a"))
    without_nan = json.loads(json.dumps(comparison.results), parse_constant=lambda word: None)
    write_atomically(folder / "results.json", json.dumps(without_nan, indent=1, ensure_ascii=False))


def _read(run: Run) -> Reading:
    overlaps = read_json_lines(run.folder / OVERLAPS_FILE)
    filters = {layer: len(values) for layer, values in overlaps[0]["overlap"].items()} if overlaps else {}
    return Reading(run, read_metrics(run.folder), read_events(run.folder), filters, read_detections(run.folder))
