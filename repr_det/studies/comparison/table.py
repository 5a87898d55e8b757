"""Finished runs, read once into one table (seed, arm, metric, value); what follows from it, as data and as text."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from repr_det.runs.files import OVERLAPS_FILE, write_atomically
from repr_det.studies.comparison.records import read_config, read_detections, read_events, read_json_lines, read_metrics
from repr_det.studies.comparison.runs import BASELINE, REPR, Run, Study, final_row, title
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

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
Row = dict[str, Any]


@dataclass
class Reading:
    """A finished run, as its folder shows it.

    Attributes:
        rows: metrics.json by iteration.
        events: drops and restores.
        filters: layer -> number of filters, in network order, of the layers that RePr applies to; {} for a baseline.
        detections: of the last evaluation; None if they were not saved.
    """

    run: Run
    rows: dict[int, dict[str, float]]
    events: list[dict[str, Any]]
    filters: dict[str, int]
    detections: list[dict[str, Any]] | None

    @property
    def collapsed(self) -> bool:
        """True if its last evaluation found nothing at all: Detectron2 logs NaN for it, COCO's AP is 0."""
        return self.detections == []

    @property
    def final(self) -> dict[str, float]:
        """The metrics of the evaluation after the last iteration, named as COCO does, with AP-<class> for each class.

        NaN if the data hold no such object, for which COCO has -1.
        """
        row = final_row(self.rows, self.run.max_iter)
        values = {key.removeprefix("bbox/"): value for key, value in row.items() if key.startswith("bbox/")}
        if self.collapsed:
            return dict.fromkeys(values, 0.0)
        return {metric: value if value >= 0 else math.nan for metric, value in values.items()}

    @property
    def curve(self) -> dict[int, float]:
        """Iterations trained -> validation AP."""
        last = self.run.max_iter
        points = {min(i + 1, last): row["bbox/AP"] for i, row in self.rows.items() if row.get("bbox/AP", -1) >= 0}
        points[last] = self.final["AP"]
        return points

    @property
    def phases(self) -> list[tuple[int, int]]:
        """[first, end) iterations of the sub-network, one a cycle."""
        starts = [event["iteration"] + 1 for event in self.events if event["event"] == "drop"]
        ends = [event["iteration"] + 1 for event in self.events if event["event"] == "restore"]
        return list(zip(starts, [*ends, self.run.max_iter], strict=False))


@dataclass
class Comparison:
    """The runs read, and what follows from them.

    Attributes:
        readings: arm -> its runs by ascending seed.
        table: seed, arm, metric, value.
        results: the content of results.json.
    """

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
    both = [reading for arm in study.arms for reading in readings[arm]]
    classes = dict.fromkeys(metric for reading in both for metric in reading.final if metric.startswith("AP-"))
    lines = []
    for reading in both:
        missing = 0.0 if reading.collapsed else math.nan
        for metric in (*METRICS, *classes):
            lines.append((reading.run.seed, reading.run.arm, metric, reading.final.get(metric, missing)))
    table = pd.DataFrame(lines, columns=["seed", "arm", "metric", "value"])
    ap = metric_row(table, "AP", study.arms)
    difference = paired_difference(*(ap[arm]["values"] for arm in study.arms))
    results = {
        "verdict": ap["sentence"],
        "power": {
            "detectable": detectable_difference(difference),
            "seeds_for_1": seeds_needed(difference),
            "sentence": power_sentence("AP", difference),
        },
        "dataset": read_config(both[0].run.folder).DATASETS.TEST[0],
        "seeds": study.seeds,
        "metrics": {metric: metric_row(table, metric, study.arms) for metric in METRICS},
        "classes": {metric.removeprefix("AP-"): metric_row(table, metric, study.arms) for metric in classes},
        "notes": _notes(both),
    }
    return Comparison(study, readings, table, results)


def metric_row(table: pd.DataFrame, metric: str, arms: tuple[str, str]) -> Row:
    """Both arms over the seeds, and the second minus the first, from a table of seed, arm, metric, value."""
    by_seed = table[table["metric"] == metric].pivot(index="seed", columns="arm", values="value")
    reference, other = (by_seed[arm].tolist() for arm in arms)
    difference = paired_difference(reference, other)
    name = title(arms[1])
    if arms != (BASELINE, REPR):
        name += f" against {title(arms[0])}:"
    return {
        arms[0]: asdict(summarize(reference, other)),
        arms[1]: asdict(summarize(other, reference)),
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
    alignment = ["left", "right", "right", "right", "right", "left"]
    return tabulate(lines_of(results["metrics"], arms), heads(arms), disable_numparse=True, colalign=alignment)


def write_results(comparison: Comparison, folder: Path) -> None:
    """Writes results.csv, the tidy table, and results.json, with null if there is no number."""
    write_atomically(folder / "results.csv", comparison.table.to_csv(index=False, float_format="%.4f", na_rep="n/a"))
    without_nan = json.loads(json.dumps(comparison.results), parse_constant=lambda word: None)
    write_atomically(folder / "results.json", json.dumps(without_nan, indent=1, ensure_ascii=False))


def _read(run: Run) -> Reading:
    overlaps = read_json_lines(run.folder / OVERLAPS_FILE)
    filters = {layer: len(values) for layer, values in overlaps[0]["overlap"].items()} if overlaps else {}
    return Reading(run, read_metrics(run.folder), read_events(run.folder), filters, read_detections(run.folder))


def _notes(readings: Sequence[Reading]) -> list[str]:
    notes = ["One seed says nothing about the spread between runs."] if len(readings) == 2 else []
    for reading in readings:
        if reading.collapsed:
            notes.append(f"{reading.run.folder}: its last evaluation has no detections, so its AP is 0.")
        elif math.isnan(reading.final["AP"]):
            notes.append(f"{reading.run.folder}: the AP of its last evaluation is NaN.")
    return notes
