"""Finished runs, read once into one table (seed, arm, metric, value); what follows from it, as data and as text."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
TRAINING = {
    "best": "Best validation AP over training",
    "lost": "Best minus final",
    "final_loss": "Training loss at the end",
}
Row = dict[str, Any]


@dataclass
class Reading:
    """A finished run, as its folder shows it.

    Attributes:
        rows: metrics.json by iteration.
        events: drops and restores.
        overlaps: O_f before each drop and after each restore.
        detections: of the last evaluation; None if they were not saved.
    """

    run: Run
    rows: dict[int, dict[str, float]]
    events: list[dict[str, Any]]
    overlaps: list[dict[str, Any]]
    detections: list[dict[str, Any]] | None

    @property
    def final(self) -> dict[str, float]:
        """The row of the evaluation after the last iteration."""
        return final_row(self.rows, self.run.max_iter)

    @property
    def collapsed(self) -> bool:
        """True if its last evaluation found nothing at all: Detectron2 logs NaN for it, COCO's AP is 0."""
        return self.detections == []

    @property
    def curve(self) -> dict[int, float]:
        """Iterations trained -> validation AP."""
        last = self.run.max_iter
        points = {min(i + 1, last): row["bbox/AP"] for i, row in self.rows.items() if "bbox/AP" in row}
        points[last] = self.ap("AP")
        return {i: ap for i, ap in sorted(points.items()) if ap >= 0}

    @property
    def first_overlap(self) -> dict[str, list[float]]:
        """Layer -> O_f of its filters, in network order, of the layers that RePr applies to; {} for a baseline."""
        return self.overlaps[0]["overlap"] if self.overlaps else {}

    @property
    def phases(self) -> list[tuple[int, int]]:
        """[first, end) iterations of the sub-network, one a cycle."""
        starts = [event["iteration"] + 1 for event in self.events if event["event"] == "drop"]
        ends = [event["iteration"] + 1 for event in self.events if event["event"] == "restore"]
        return list(zip(starts, [*ends, self.run.max_iter], strict=False))

    @property
    def final_loss(self) -> float:
        """Mean of the last tenth of the logged losses."""
        losses = [row["total_loss"] for row in self.rows.values() if "total_loss" in row]
        return float(np.mean(losses[-max(1, len(losses) // 10) :])) if losses else math.nan

    @property
    def classes(self) -> list[str]:
        """Names of the classes with an AP, in the order in which they were logged."""
        return [key.removeprefix("bbox/AP-") for key in self.final if key.startswith("bbox/AP-")]

    def ap(self, metric: str) -> float:
        """A metric of the last evaluation; NaN if the data hold no such object."""
        if self.collapsed:
            return 0.0
        value = self.final.get(f"bbox/{metric}", math.nan)
        return value if value >= 0 else math.nan  # COCO has -1 for "no such objects"

    def values(self, classes: Sequence[str]) -> dict[str, float]:
        """All numbers of the run: metric -> value."""
        found = {metric: self.ap(metric) for metric in (*METRICS, *(f"AP-{name}" for name in classes))}
        best = max(self.curve.values()) if len(self.curve) > 1 else math.nan
        return found | {"best": best, "lost": best - found["AP"], "final_loss": self.final_loss}


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


def compare(study: Study) -> Comparison:
    """Reads finished, comparable runs and computes every number of the report."""
    readings = {arm: list(map(_read, study.of(arm))) for arm in study.arms}
    both = [reading for arm in study.arms for reading in readings[arm]]
    table = tidy_table(both)
    ap = metric_row(table, "AP", study.arms)
    difference = paired_difference(*(ap[arm]["values"] for arm in study.arms))
    classes = dict.fromkeys(name for reading in both for name in reading.classes)
    training = {metric: metric_row(table, metric, study.arms, "direction") for metric in TRAINING}
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
        "classes": {name: metric_row(table, f"AP-{name}", study.arms) for name in classes},
        "training": {name: row for name, row in training.items() if row["difference"]["n"]},
        "notes": _notes(both),
    }
    return Comparison(study, readings, table, results)


def tidy_table(readings: Iterable[Reading]) -> pd.DataFrame:
    """Every number of every run, one a line: seed, arm, metric, value."""
    readings = list(readings)
    classes = list(dict.fromkeys(name for reading in readings for name in reading.classes))
    lines = [
        (reading.run.seed, reading.run.arm, metric, value)
        for reading in readings
        for metric, value in reading.values(classes).items()
    ]
    return pd.DataFrame(lines, columns=["seed", "arm", "metric", "value"])


def metric_row(table: pd.DataFrame, metric: str, arms: tuple[str, str], word: str = "verdict") -> Row:
    """Both arms over the seeds, and the second minus the first.

    Args:
        table: seed, arm, metric, value.
        word: attribute of ``Difference`` for the verdict: better or worse for AP, else higher or lower ("direction").
    """
    by_seed = table[table["metric"] == metric].pivot(index="seed", columns="arm", values="value")
    reference, other = (by_seed[arm].tolist() for arm in arms)
    difference = paired_difference(reference, other)
    return {
        arms[0]: asdict(summarize(reference, other)),
        arms[1]: asdict(summarize(other, reference)),
        "difference": {**asdict(difference), "verdict": getattr(difference, word)},
        "sentence": verdict_sentence(metric, difference, versus(arms)),
    }


def versus(arms: tuple[str, str]) -> str:
    """The second arm, with the first if that is no baseline."""
    reference, other = map(title, arms)
    return other if arms == (BASELINE, REPR) else f"{other} against {reference}:"


def lines_of(rows: dict[str, Row], arms: tuple[str, str]) -> list[list[str]]:
    """A line a metric for people: name, both arms, difference, interval, verdict."""
    lines = []
    for name, row in rows.items():
        digits = 3 if name == "final_loss" else 1
        found = row["difference"]
        line = [TRAINING.get(name, name)]
        for arm in arms:
            spread = f" ± {number(row[arm]['sd'], digits)}" if row[arm]["n"] > 1 else ""
            line.append(number(row[arm]["mean"], digits) + spread)
        line += [number(found["mean"], digits, sign=True), interval(found["low"], found["high"], digits)]
        lines.append([*line, found["verdict"] if found["n"] else "n/a"])
    return lines


def heads(arms: tuple[str, str]) -> list[str]:
    """The names of the columns of ``lines_of``."""
    return ["", *map(title, arms), "difference", "95 % interval", "verdict"]


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
    folder = run.folder
    overlaps = read_json_lines(folder / OVERLAPS_FILE)
    return Reading(run, read_metrics(folder), read_events(folder), overlaps, read_detections(folder))


def _notes(readings: Sequence[Reading]) -> list[str]:
    notes = ["One seed says nothing about the spread between runs."] if len(readings) == 2 else []
    for reading in readings:
        if reading.collapsed:
            notes.append(f"{reading.run.folder}: its last evaluation has no detections, so its AP is 0.")
        elif math.isnan(reading.ap("AP")):
            what = "are not at hand" if reading.detections is None else "are not empty"
            notes.append(f"{reading.run.folder}: the AP of its last evaluation is NaN, its detections {what}.")
    return notes
