"""Finished runs, read once into one table (seed, arm, metric, value), what follows from a metric, and both as text."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from tabulate import tabulate

from repr_det.studies.comparison.detections import read_predictions
from repr_det.studies.comparison.matches import METRICS
from repr_det.studies.comparison.records import read_events, read_metrics, read_wall_clock
from repr_det.studies.comparison.runs import BASELINE, REPR, Run, final_row, is_number, title
from repr_det.studies.comparison.statistics import interval, number, paired_difference, summarize, verdict_sentence

Row = dict[str, Any]


@dataclass
class Reading:
    """A finished run, as its folder shows it.

    Attributes:
        rows: metrics.json by iteration.
        events: drops and restores.
        detections: of the last evaluation; None if they were not saved.
        train_ap: AP on training images; NaN if it was not measured.
    """

    run: Run
    rows: dict[int, dict[str, float]]
    events: list[dict[str, Any]]
    detections: list[dict[str, Any]] | None
    train_ap: float = math.nan

    @property
    def final(self) -> dict[str, float]:
        """The row of the evaluation after the last iteration."""
        return final_row(self.rows, self.run.max_iter)

    @property
    def collapsed(self) -> bool:
        """True if its last evaluation found nothing at all: Detectron2 logs NaN for it, COCO's AP is 0."""
        return self.detections == []

    @property
    def curve(self) -> list[tuple[int, float]]:
        """(iterations trained, validation AP) of every evaluation."""
        last = self.run.max_iter
        points = {min(i + 1, last): row["bbox/AP"] for i, row in self.rows.items() if "bbox/AP" in row}
        if self.collapsed:
            points[last] = self.ap("AP")
        return [(i, ap) for i, ap in sorted(points.items()) if is_number(ap)]

    @property
    def best(self) -> tuple[int, float]:
        """(iterations trained, AP) of the best evaluation; the earliest of equals."""
        return max(self.curve, key=lambda point: (point[1], -point[0]), default=(0, math.nan))

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
        value = self.final.get(f"bbox/{metric}")
        return value if is_number(value) else 0.0 if self.collapsed else math.nan

    def values(self, classes: Sequence[str]) -> dict[str, float]:
        """All numbers of the run: metric -> value."""
        metrics = {metric: self.ap(metric) for metric in (*METRICS, *(f"AP-{name}" for name in classes))}
        best = self.best[1] if len(self.curve) > 1 else math.nan
        own = dict(final_loss=self.final_loss, best=best, lost=best - metrics["AP"])
        return metrics | own | dict(train=self.train_ap, gap=self.train_ap - metrics["AP"])


def read_run(run: Run) -> Reading:
    """Reads a finished run."""
    return Reading(run, read_metrics(run.folder), read_events(run.folder), read_predictions(run.folder))


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


def phase_seconds(reading: Reading, phases: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Seconds in the full network up to the last restore, in the sub-network (see ``sub_network_phases``), in the full
    network after it, in drops and restores, in evaluation (by the log), and the rest.

    Those of a phase are its iterations times Detectron2's step time, its median over 20 iterations without hooks.
    """
    logged = pd.Series({i: row["time"] for i, row in reading.rows.items() if "time" in row}, dtype=float)
    steps = logged.reindex(range(reading.run.max_iter)).bfill()  # a row stands for the iterations since the one before
    phase = np.full(len(steps), "full", dtype=object)
    for start, stop in phases:
        phase[start:stop] = "sub"
    phase[phases[-1][1] if phases else 0 :] = "after"
    seconds = {name: float(steps[phase == name].sum()) for name in ("full", "sub", "after")}
    seconds["transitions"] = sum(event.get("seconds", 0.0) for event in reading.events)
    total, seconds["evaluation"] = read_wall_clock(reading.run.folder)
    seconds["rest"] = max(0.0, total - sum(seconds.values()))
    return seconds


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


def values(table: pd.DataFrame, arm: str, metric: str, seeds: Sequence[int]) -> list[float]:
    """The values of an arm, one a seed; NaN if it has none."""
    chosen = table[(table["arm"] == arm) & (table["metric"] == metric)]
    return chosen.set_index("seed")["value"].reindex(seeds).tolist()


def metric_row(table: pd.DataFrame, metric: str, arms: tuple[str, str], seeds: Sequence[int], word: str = "") -> Row:
    """Both arms over the seeds, and the second minus the first.

    Args:
        word: attribute of ``Difference`` for the verdict: by default better or worse, for AP.
    """
    reference, other = (values(table, arm, metric, seeds) for arm in arms)
    difference = paired_difference(reference, other)
    return {
        arms[0]: asdict(summarize(reference, other)),
        arms[1]: asdict(summarize(other, reference)),
        "difference": {**asdict(difference), "verdict": getattr(difference, word or "verdict")},
        "sentence": verdict_sentence(metric, difference, versus(arms)),
    }


def metric_rows(table: pd.DataFrame, arms: tuple[str, str], seeds: Sequence[int]) -> dict[str, Row]:
    """COCO's six metrics -> ``metric_row``."""
    return {metric: metric_row(table, metric, arms, seeds) for metric in METRICS}


def versus(arms: tuple[str, str]) -> str:
    """The second arm, with the first if that is no baseline."""
    reference, other = map(title, arms)
    return other if arms == (BASELINE, REPR) else f"{other} against {reference}:"


def metrics_table(metrics: Mapping[str, Row]) -> str:
    """Rows the arms and their difference, columns the metrics, for a terminal."""
    first, second = [name for name in next(iter(metrics.values())) if name not in ("difference", "sentence", "images")]
    several = any(row[first]["n"] > 1 for row in metrics.values())
    lines = [["", *metrics]]
    for arm in (first, second):
        lines.append([title(arm), *(_mean_and_sd(row[arm], several) for row in metrics.values())])
    differences = [row["difference"] for row in metrics.values()]
    lines.append([f"{title(second)} - {title(first)}", *(number(d["mean"], sign=True) for d in differences)])
    if several:
        lines.append(["95 % CI", *(interval(d["low"], d["high"]) for d in differences)])
    columns = ["left"] + ["right"] * len(metrics)
    return tabulate(lines, headers="firstrow", disable_numparse=True, colalign=columns)


def csv_text(results: Row, arms: tuple[str, str]) -> str:
    """One line a metric or class; "n/a" if there is no number."""
    lines = []
    for name, row in [*results["metrics"].items(), *((f"AP-{c}", row) for c, row in results["classes"].items())]:
        line: Row = {"name": name}
        for arm in arms:
            line |= {f"{arm}_mean": row[arm]["mean"], f"{arm}_sd": row[arm]["sd"]}
        found, images = row["difference"], row.get("images") or {}
        line |= {"difference": found["mean"], "ci_low": found["low"], "ci_high": found["high"], "pairs": found["n"]}
        line |= {"verdict": found["verdict"], "images_ci_low": images.get("low"), "images_ci_high": images.get("high")}
        for arm in arms:
            line |= {f"{arm}_seed_{seed}": v for seed, v in zip(results["seeds"], row[arm]["values"], strict=True)}
        lines.append(line)
    frame = pd.DataFrame(lines)
    return frame.to_csv(index=False, float_format="%.4f", na_rep="n/a", lineterminator="\r\n")


def json_text(results: Row) -> str:
    """The results as JSON, with null for every number that it has no word for."""
    return json.dumps(_without_nan(results), indent=1, ensure_ascii=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _mean_and_sd(summary: Row, several: bool) -> str:
    spread = f" ± {number(summary['sd'])}" if several and summary["n"] else ""
    return number(summary["mean"]) + spread
