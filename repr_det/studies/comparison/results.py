"""Everything that the report says, as plain data: results.json and results.csv."""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from repr_det.method.errors import UserError
from repr_det.runs.files import write_atomically
from repr_det.studies.comparison.evaluation import load_validation_truth, read_predictions, train_ap
from repr_det.studies.comparison.matches import METRICS, Matches, average_precision, bootstrap_multiplicities, match
from repr_det.studies.comparison.others import OtherSetting
from repr_det.studies.comparison.pairing import Pair
from repr_det.studies.comparison.records import read_config, read_events, read_metrics, read_wall_clock
from repr_det.studies.comparison.runs import BASELINE, REPR, Run, final_row, is_number
from repr_det.studies.comparison.statistics import paired_difference, percentile_interval, summarize, verdict_sentence
from repr_det.studies.comparison.timing import phase_seconds, sub_network_phases

_CLASS_PREFIX = "bbox/AP-"


@dataclass
class RunData:
    """A finished run, read."""

    run: Run
    rows: dict[int, dict[str, float]]
    final: dict[str, float]
    events: list[dict[str, Any]]
    detections: list[dict[str, Any]] | None
    train_ap: float = math.nan

    @property
    def curve(self) -> list[tuple[int, float]]:
        """(iterations trained, validation AP) of every evaluation."""
        last = self.run.max_iter
        points = {min(i + 1, last): row["bbox/AP"] for i, row in self.rows.items() if "bbox/AP" in row}
        if self.collapsed:
            points[last] = self.value("AP")
        return [(i, ap) for i, ap in sorted(points.items()) if is_number(ap)]

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(iterations trained, total loss), Detectron2's median over 20 iterations."""
        return [(i + 1, row["total_loss"]) for i, row in self.rows.items() if "total_loss" in row]

    @property
    def final_loss(self) -> float:
        """Mean of the last tenth of the logged losses."""
        losses = [loss for _, loss in self.losses]
        return float(np.mean(losses[-max(1, len(losses) // 10) :])) if losses else math.nan

    @property
    def best(self) -> tuple[int, float]:
        """(iterations trained, AP) of the best evaluation; the earliest of equals."""
        return max(self.curve, key=lambda point: (point[1], -point[0]), default=(0, math.nan))

    @property
    def collapsed(self) -> bool:
        """Whether its last evaluation found nothing at all: Detectron2 logs NaN for it, COCO's AP is 0."""
        return self.detections == []

    def value(self, metric: str) -> float:
        value = self.final.get(f"bbox/{metric}")
        return value if is_number(value) else 0.0 if self.collapsed else math.nan


@dataclass
class Comparison:
    """The runs read, and what follows from them.

    Attributes:
        pairs: (baseline, RePr) by ascending seed.
        truth: annotations of the validation set; None where they are not at hand.
        results: json-able, see ``compare``.
    """

    pairs: list[tuple[RunData, RunData]]
    truth: COCO | None
    results: dict[str, Any]

    def arm(self, name: str) -> list[RunData]:
        return [pair[0] if name == BASELINE else pair[1] for pair in self.pairs]


def compare(
    pairs: Sequence[Pair],
    cache: Path,
    bootstrap: int = 1000,
    train_images: int = 100,
    say: Callable[[str], None] = lambda text: None,
    others: Sequence[OtherSetting] = (),
) -> Comparison:
    """Reads finished, comparable runs and computes everything that the report shows.

    Args:
        cache: where AP on training images is remembered.
        bootstrap: resampled lists of validation images.
        train_images: training images that both arms' AP is measured on; 0 for none.
        say: called with a line before each step that takes long.
        others: finished runs of other settings, each measured against both arms.
    """
    notes: list[str] = []
    data = read_pairs(pairs)
    everyone = [one for pair in data for one in pair]
    read_others = [(other, [_read(run) for run in other.runs]) for other in others]
    notes += [note for one in everyone if (note := _missing_ap(one))]
    config = read_config(pairs[0].baseline.folder)
    dataset = config["DATASETS"]["TEST"][0]
    try:
        truth = load_validation_truth(pairs[0].baseline.folder)
    except UserError as error:
        truth = None
        notes.append(f"No bootstrap over images and no gallery: {error}.")
    if truth is not None and (strange := _without_truth(everyone, truth)):
        truth = None
        notes.append(
            "No bootstrap over images and no gallery: "
            f"{strange.run.folder} has detections on images that {dataset} lacks."
        )
    named = [(one.run.name, one) for one in everyone]
    named += [(f"{other.name}, seed {one.run.seed}", one) for other, runs in read_others for one in runs]
    for name, one in named:
        if train_images:
            say(f"AP on {train_images} training images: {name}")
        try:
            value = train_ap(one.run.folder, train_images, cache)
        except UserError as error:
            notes.append(f"No AP on training images: {error}.")
            break
        one.train_ap = math.nan if value is None else value
    say("bootstrap over images")
    resampled = _bootstrap(data, truth, bootstrap, notes) if truth is not None and bootstrap else {}
    metrics = metric_rows(data)
    for metric, row in metrics.items():
        row["images"] = resampled.get("mean", {}).get(metric)
    classes = _classes(everyone)
    results = {
        "verdict": metrics["AP"]["sentence"],
        "dataset": dataset,
        "seeds": [pair.seed for pair in pairs],
        "metrics": metrics,
        "classes": {c: _row(data, lambda one, c=c: one.value(f"AP-{c}")) for c in classes},
        "training": _training(data, train_images),
        "others": [_other_row(other, runs, data) for other, runs in read_others],
        "pairs": [
            {
                "seed": base.run.seed,
                BASELINE: _run_entry(base),
                REPR: _run_entry(other),
                "images": resampled.get("pairs", [{}] * len(data))[i],
            }
            for i, (base, other) in enumerate(data)
        ],
        "bootstrap_samples": bootstrap if resampled else 0,
        "time": _times(data),
        "notes": notes,
    }
    return Comparison(data, truth, results)


def read_pairs(pairs: Sequence[Pair]) -> list[tuple[RunData, RunData]]:
    """(baseline, RePr) of finished runs."""
    return [(_read(pair.baseline), _read(pair.repr)) for pair in pairs]


def metric_rows(data: list[tuple[RunData, RunData]]) -> dict[str, dict[str, Any]]:
    """Metric -> both arms over the seeds, their paired difference and the verdict as a sentence."""
    rows = {metric: _row(data, lambda one, m=metric: one.value(m)) for metric in METRICS}
    for metric, row in rows.items():
        difference = paired_difference(row[BASELINE]["values"], row[REPR]["values"])
        row["sentence"] = verdict_sentence(metric, difference)
    return rows


def write_results(comparison: Comparison, folder: Path) -> None:
    """results.json (NaN as null) and results.csv (one line a metric or class) in ``folder``."""
    write_atomically(folder / "results.json", json.dumps(without_nan(comparison.results), indent=1, ensure_ascii=False))
    write_atomically(folder / "results.csv", _csv(comparison.results))


def without_nan(value: Any) -> Any:
    """A copy with None for every number that JSON has no word for."""
    if isinstance(value, dict):
        return {str(k): without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _read(run: Run) -> RunData:
    final = final_row(run.folder, run.max_iter)
    return RunData(run, read_metrics(run.folder), final, read_events(run.folder), read_predictions(run.folder))


def _row(
    data: list[tuple[RunData, RunData]], value: Callable[[RunData], float], word: str = "verdict"
) -> dict[str, Any]:
    baseline, repr_ = [value(base) for base, _ in data], [value(other) for _, other in data]
    difference = paired_difference(baseline, repr_)
    return {
        BASELINE: asdict(summarize(baseline, repr_)),
        REPR: asdict(summarize(repr_, baseline)),
        "difference": {**asdict(difference), "verdict": getattr(difference, word)},
    }


def _classes(everyone: list[RunData]) -> list[str]:
    """Class names in the order in which they were logged first."""
    keys = [key for one in everyone for key in one.final if key.startswith(_CLASS_PREFIX)]
    return [key.removeprefix(_CLASS_PREFIX) for key in dict.fromkeys(keys)]


def _training(data: list[tuple[RunData, RunData]], train_images: int) -> dict[str, Any]:
    """Their words are higher and lower: a lower loss or gap is not better as such."""
    values: dict[str, Callable[[RunData], float]] = {
        "final": lambda one: one.value("AP"),
        "final_loss": lambda one: one.final_loss,
    }
    if all(len(one.curve) > 1 for pair in data for one in pair):
        values["best"] = lambda one: one.best[1]
        values["lost"] = lambda one: one.best[1] - one.value("AP")
    if all(math.isfinite(one.train_ap) for pair in data for one in pair):
        values["train"] = lambda one: one.train_ap
        values["gap"] = lambda one: one.train_ap - one.value("AP")
    rows = {name: _row(data, value, "direction") for name, value in values.items()}
    if "train" in rows:
        rows["train"]["images"] = train_images
    return rows


def _other_row(other: OtherSetting, runs: list[RunData], data: list[tuple[RunData, RunData]]) -> dict[str, Any]:
    """Its values over the seeds that it has, and its AP minus that of either arm with the same seeds."""
    of_seed = {base.run.seed: {BASELINE: base, REPR: with_repr} for base, with_repr in data}
    values: dict[str, Callable[[RunData], float]] = {
        "AP": lambda one: one.value("AP"),
        "best": lambda one: one.best[1],
        "train": lambda one: one.train_ap,
        "gap": lambda one: one.train_ap - one.value("AP"),
    }
    row: dict[str, Any] = {
        "name": other.name,
        "arm": other.arm,
        "settings": other.settings,
        "seeds": [one.run.seed for one in runs],
        "folders": [str(one.run.folder) for one in runs],
        **{key: asdict(summarize([value(one) for one in runs])) for key, value in values.items()},
    }
    for arm in (BASELINE, REPR):
        against = [of_seed[one.run.seed][arm].value("AP") for one in runs]
        difference = paired_difference(against, row["AP"]["values"])
        row[f"minus_{arm}"] = {**asdict(difference), "verdict": difference.verdict}
    return row


def _run_entry(one: RunData) -> dict[str, Any]:
    best_iteration, best = one.best
    return {
        "folder": str(one.run.folder),
        **{metric: one.value(metric) for metric in METRICS},
        "best_AP": best,
        "best_iteration": best_iteration,
        "final_loss": one.final_loss,
        "train_AP": one.train_ap,
    }


def _missing_ap(one: RunData) -> str | None:
    if one.collapsed:
        return f"{one.run.folder}: its last evaluation has no detections, so its AP is 0."
    if not math.isfinite(one.value("AP")):
        what = "are not at hand" if one.detections is None else "are not empty"
        return f"{one.run.folder}: the AP of its last evaluation is NaN, and its detections {what}: no verdict."
    return None


def _without_truth(everyone: list[RunData], truth: COCO) -> RunData | None:
    """The first run whose detections are on images that the annotations do not know."""
    known = truth.imgs.keys()
    return next((one for one in everyone if not {d["image_id"] for d in one.detections or []} <= known), None)


def _bootstrap(data: list[tuple[RunData, RunData]], truth: COCO, samples: int, notes: list[str]) -> dict[str, Any]:
    """{"pairs": [{metric: {"difference", "low", "high"}}], "mean": the same for the mean over the pairs}."""
    missing = [one.run.folder for pair in data for one in pair if one.detections is None]
    if missing:
        notes.append(f"No bootstrap over images: {missing[0]} has no saved detections (inference/).")
        return {}
    differences: list[dict[str, np.ndarray]] = []
    for base, other in data:
        # The first list is the real one, the rest are resampled: the same for both arms and all pairs.
        resampled = []
        for one in (base, other):
            matches: Matches = match(truth, one.detections)
            images = len(matches.image_ids)
            lists = np.concatenate([np.ones((1, images)), bootstrap_multiplicities(images, samples)])
            resampled.append(average_precision(matches, lists).metrics)
            _check_agreement(one, resampled[-1]["AP"][0], notes)
        differences.append({metric: resampled[1][metric] - resampled[0][metric] for metric in METRICS})
    mean = {metric: np.mean([d[metric] for d in differences], axis=0) for metric in METRICS}
    return {"pairs": [_intervals(d) for d in differences], "mean": _intervals(mean)}


def _intervals(differences: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    intervals = {}
    for metric, values in differences.items():
        low, high = percentile_interval(values[1:])
        intervals[metric] = {"difference": float(values[0]), "low": low, "high": high}
    return intervals


def _check_agreement(one: RunData, ap: float, notes: list[str]) -> None:
    logged = one.value("AP")
    if math.isfinite(logged) and not abs(ap - logged) < 0.01:
        notes.append(
            f"{one.run.folder}: the saved detections give AP {ap:.2f}, metrics.json says {logged:.2f}. "
            "The annotations have changed since, or these are two evaluations: do not trust this pair's bootstrap."
        )


def _times(data: list[tuple[RunData, RunData]]) -> dict[str, Any]:
    """Arm -> phase -> seconds, mean over the seeds."""
    arms: dict[str, list[dict[str, float]]] = {BASELINE: [], REPR: []}
    for base, other in data:
        phases = sub_network_phases(other.events, other.run.max_iter)
        for arm, one in ((BASELINE, base), (REPR, other)):
            transitions = sum(event.get("seconds", 0.0) for event in one.events)
            wall = read_wall_clock(one.run.folder)
            arms[arm].append(phase_seconds(one.rows, phases, transitions, wall))
    return {arm: {phase: float(np.mean([s[phase] for s in many])) for phase in many[0]} for arm, many in arms.items()}


def _csv(results: dict[str, Any]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    seeds = results["seeds"]
    writer.writerow(
        ["name", "baseline_mean", "baseline_sd", "repr_mean", "repr_sd", "difference", "ci_low", "ci_high", "pairs"]
        + ["verdict", "images_ci_low", "images_ci_high"]
        + [f"{arm}_seed_{seed}" for arm in (BASELINE, REPR) for seed in seeds]
    )
    rows = [*results["metrics"].items(), *((f"AP-{name}", row) for name, row in results["classes"].items())]
    for name, row in rows:
        base, other, difference, images = row[BASELINE], row[REPR], row["difference"], row.get("images") or {}
        numbers = [base["mean"], base["sd"], other["mean"], other["sd"]]
        numbers += [difference["mean"], difference["low"], difference["high"]]
        image_numbers = [images.get("low", math.nan), images.get("high", math.nan)]
        writer.writerow(
            [name, *map(_cell, numbers), difference["n"], difference["verdict"], *map(_cell, image_numbers)]
            + [_cell(v) for v in (*base["values"], *other["values"])]
        )
    return text.getvalue()


def _cell(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "n/a"
