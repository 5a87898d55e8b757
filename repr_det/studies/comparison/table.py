"""Finished runs, read once into one table (seed, arm, metric, value); what follows from it, as data and as text."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from repr_det.runs.files import write_atomically
from repr_det.studies.comparison.records import BASELINE, REPR, Study, final_row, read_config, read_metrics, title
from repr_det.studies.comparison.statistics import (
    could_show,
    interval,
    number,
    paired_difference,
    summarize,
    verdict_sentence,
)

Row = dict[str, Any]


@dataclass
class Comparison:
    """The table of final values, the AP over training, and the content of results.json.

    Attributes:
        table: columns seed, arm, metric (COCO's, and AP-<class> of each class), value (NaN if there is no such object).
        curves: iterations trained -> validation AP, a column (arm, seed) each.
    """

    study: Study
    table: pd.DataFrame
    curves: pd.DataFrame
    results: dict[str, Any]


def compare(study: Study) -> Comparison:
    """Reads finished, comparable runs and computes every number of the report."""
    lines, curves = [], {}
    notes = ["One seed says nothing about the spread between runs."] if len(study.seeds) == 1 else []
    for run in [run for arm in study.arms for run in study.of(arm)]:
        rows = read_metrics(run.folder)
        final = {key: value for key, value in final_row(rows, run.max_iter).items() if key.startswith("bbox/")}
        for key, value in final.items():
            # COCO has -1 if there is no such object.
            lines.append((run.seed, run.arm, key.removeprefix("bbox/"), value if value >= 0 else math.nan))
        if not final["bbox/AP"] >= 0:
            notes.append(f"{run.folder}: the AP of its last evaluation is NaN: no detections, or no objects.")
        aps = {min(i + 1, run.max_iter): row.get("bbox/AP", -1) for i, row in rows.items()}
        curves[run.arm, run.seed] = {iterations: ap for iterations, ap in aps.items() if ap >= 0}
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


def metric_row(table: pd.DataFrame, metric: str, arms: Sequence[str]) -> Row:
    """Both arms over the seeds that both have, and the second minus the first."""
    by_seed = table[table["metric"] == metric].pivot(index="seed", columns="arm", values="value")
    by_seed = by_seed.reindex(columns=arms)
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


def lines_of(rows: dict[str, Row], arms: Sequence[str]) -> list[dict[str, str]]:
    """A line a metric for people: column -> cell."""
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


def metrics_table(results: Row, arms: Sequence[str]) -> str:
    """COCO's metrics for a terminal."""
    return tabulate(lines_of(results["metrics"], arms), headers="keys", disable_numparse=True)


def write_results(comparison: Comparison, folder: Path) -> None:
    """Writes results.csv, the tidy table, and results.json, with null if there is no number."""
    write_atomically(folder / "results.csv", comparison.table.to_csv(index=False, float_format="%.4f", na_rep="n/a"))
    without_nan = json.loads(json.dumps(comparison.results), parse_constant=lambda word: None)
    write_atomically(folder / "results.json", json.dumps(without_nan, indent=1, ensure_ascii=False))
