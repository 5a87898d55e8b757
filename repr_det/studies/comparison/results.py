"""Everything that the report says, as plain data: results.json and results.csv."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pycocotools.coco import COCO

from repr_det.method.errors import UserError
from repr_det.runs.files import write_atomically
from repr_det.studies.comparison.detections import load_validation_truth, train_ap
from repr_det.studies.comparison.matches import METRICS, bootstrap_pairs
from repr_det.studies.comparison.records import read_config
from repr_det.studies.comparison.runs import Setting, Study
from repr_det.studies.comparison.statistics import (
    detectable_difference,
    paired_difference,
    percentile_interval,
    power_sentence,
    seeds_needed,
    summarize,
)
from repr_det.studies.comparison.table import (
    Reading,
    csv_text,
    json_text,
    metric_row,
    metric_rows,
    phase_seconds,
    read_run,
    sub_network_phases,
    tidy_table,
    values,
)

Pair = tuple[Reading, Reading]


@dataclass
class Comparison:
    """The runs read, and what follows from them.

    Attributes:
        pairs: runs of both arms by ascending seed.
        truth: annotations of the validation set; None if they are not at hand.
        results: json-able, see ``compare``.
    """

    study: Study
    pairs: list[Pair]
    truth: COCO | None
    results: dict[str, Any]


def compare(
    study: Study,
    cache: Path,
    bootstrap: int = 1000,
    train_images: int = 100,
    say: Callable[[str], None] = lambda text: None,
    others: Sequence[Setting] = (),
) -> Comparison:
    """Reads finished, comparable runs and computes everything that the report shows.

    Args:
        cache: where AP on training images is remembered.
        bootstrap: resampled lists of validation images.
        train_images: training images that the AP of every run is measured on; 0 for none.
        say: called with a line before each step that takes long.
        others: finished runs of other settings, each measured against both arms.
    """
    arms, seeds = study.arms, study.seeds
    reference, other = ([read_run(run) for run in study.of(arm)] for arm in arms)
    pairs = list(zip(reference, other, strict=True))
    beside = [read_run(replace(run, arm=setting.name)) for setting in others for run in setting.runs.values()]
    both = [reading for pair in pairs for reading in pair]
    notes = [note for note in map(_missing_ap, both) if note]
    dataset = read_config(reference[0].run.folder).DATASETS.TEST[0]
    truth = _truth(both, dataset, notes)
    for reading in (*both, *beside):
        if train_images:
            say(f"AP on {train_images} training images: {reading.run.name}")
        try:
            reading.train_ap = train_ap(reading.run.folder, train_images, cache)
        except UserError as error:
            notes.append(f"No AP on training images: {error}.")
            break
    table = tidy_table((*both, *beside))
    metrics = metric_rows(table, arms, seeds)
    say("bootstrap over images")
    resampled = _bootstrap(pairs, truth, bootstrap, notes)
    for metric, row in metrics.items():
        row["images"] = resampled[-1][metric] if resampled else None
    classes = dict.fromkeys(name for reading in both for name in reading.classes)
    ap = paired_difference(metrics["AP"][arms[0]]["values"], metrics["AP"][arms[1]]["values"])
    results = {
        "verdict": metrics["AP"]["sentence"],
        "power": {
            "detectable": detectable_difference(ap),
            "seeds_for_1": seeds_needed(ap),
            "sentence": power_sentence("AP", ap),
        },
        "dataset": dataset,
        "seeds": seeds,
        "metrics": metrics,
        "classes": {name: metric_row(table, f"AP-{name}", arms, seeds) for name in classes},
        "training": _training(table, study, train_images),
        "others": [_other_row(table, setting, arms) for setting in others],
        "pairs": [
            {
                "seed": seed,
                **{reading.run.arm: _run_entry(reading) for reading in pair},
                "images": resampled[i] if resampled else {},
            }
            for i, (seed, pair) in enumerate(zip(seeds, pairs, strict=True))
        ],
        "bootstrap_samples": bootstrap if resampled else 0,
        "time": _times(pairs),
        "notes": notes,
    }
    return Comparison(study, pairs, truth, results)


def write_results(comparison: Comparison, folder: Path) -> None:
    """Writes results.json and results.csv."""
    write_atomically(folder / "results.json", json_text(comparison.results))
    write_atomically(folder / "results.csv", csv_text(comparison.results, comparison.study.arms))


def _training(table: pd.DataFrame, study: Study, train_images: int) -> dict[str, Any]:
    """Their words are higher and lower: a lower loss or gap is not better as such."""
    rows = {"final": metric_row(table, "AP", study.arms, study.seeds, "direction")}
    known = table[table["arm"].isin(study.arms)].groupby("metric")["value"].apply(lambda one: one.notna().all())
    for metric in ("final_loss", "best", "lost", "train", "gap"):
        if known[metric] or metric == "final_loss":
            rows[metric] = metric_row(table, metric, study.arms, study.seeds, "direction")
    if "train" in rows:
        rows["train"]["images"] = train_images
    return rows


def _other_row(table: pd.DataFrame, setting: Setting, arms: tuple[str, str]) -> dict[str, Any]:
    """Its values over the seeds that it has, and its AP minus that of either arm with the same seeds."""
    seeds = sorted(setting.runs)
    row: dict[str, Any] = {
        "name": setting.name,
        "arm": setting.arm,
        "settings": setting.settings,
        "seeds": seeds,
        "folders": [str(setting.runs[seed].folder) for seed in seeds],
    }
    for metric in ("AP", "best", "train", "gap"):
        row[metric] = asdict(summarize(values(table, setting.name, metric, seeds)))
    for arm in arms:
        against = metric_row(table, "AP", (arm, setting.name), seeds)
        row[f"minus_{arm}"] = {**against["difference"], "sentence": against["sentence"]}
    return row


def _run_entry(reading: Reading) -> dict[str, Any]:
    best_iteration, best = reading.best
    return {
        "folder": str(reading.run.folder),
        **{metric: reading.ap(metric) for metric in METRICS},
        "best_AP": best,
        "best_iteration": best_iteration,
        "final_loss": reading.final_loss,
        "train_AP": reading.train_ap,
    }


def _missing_ap(reading: Reading) -> str | None:
    if reading.collapsed:
        return f"{reading.run.folder}: its last evaluation has no detections, so its AP is 0."
    if not math.isfinite(reading.ap("AP")):
        what = "are not at hand" if reading.detections is None else "are not empty"
        return f"{reading.run.folder}: the AP of its last evaluation is NaN, and its detections {what}: no verdict."
    return None


def _truth(readings: Sequence[Reading], dataset: str, notes: list[str]) -> COCO | None:
    """The annotations, if they are those that the runs were evaluated on; otherwise a note says why not."""
    try:
        truth = load_validation_truth(readings[0].run.folder)
    except UserError as error:
        notes.append(f"No bootstrap over images and no gallery: {error}.")
        return None
    for reading in readings:
        if not {d["image_id"] for d in reading.detections or []} <= truth.imgs.keys():
            what = f"{reading.run.folder} has detections on images that {dataset} lacks"
            notes.append(f"No bootstrap over images and no gallery: {what}.")
            return None
    return truth


def _bootstrap(pairs: Sequence[Pair], truth: COCO | None, samples: int, notes: list[str]) -> list[dict[str, Any]]:
    """For every pair, and last for their mean: metric -> {"difference", "low", "high"}; [] if it cannot be had."""
    if truth is None or not samples:
        return []
    for reading in (reading for pair in pairs for reading in pair):
        if reading.detections is None:
            notes.append(f"No bootstrap over images: {reading.run.folder} has no saved detections (inference/).")
            return []
    found = bootstrap_pairs(truth, [(first.detections, second.detections) for first, second in pairs], samples)
    differences = []
    for pair, evaluations in zip(pairs, found, strict=True):
        for reading, aps in zip(pair, evaluations, strict=True):
            _check_agreement(reading, aps["AP"][0], notes)
        differences.append({metric: evaluations[1][metric] - evaluations[0][metric] for metric in METRICS})
    mean = {metric: np.mean([one[metric] for one in differences], axis=0) for metric in METRICS}
    return [{metric: _interval(samples) for metric, samples in one.items()} for one in (*differences, mean)]


def _interval(differences: np.ndarray) -> dict[str, float]:
    low, high = percentile_interval(differences[1:])
    return {"difference": float(differences[0]), "low": low, "high": high}


def _check_agreement(reading: Reading, ap: float, notes: list[str]) -> None:
    logged = reading.ap("AP")
    if math.isfinite(logged) and not abs(ap - logged) < 0.01:
        notes.append(
            f"{reading.run.folder}: the saved detections give AP {ap:.2f}, metrics.json says {logged:.2f}. "
            "The annotations have changed since, or these are two evaluations: do not trust this pair's bootstrap."
        )


def _times(pairs: Sequence[Pair]) -> dict[str, dict[str, float]]:
    """Arm -> phase -> seconds, mean over the seeds."""
    lines = []
    for pair in pairs:
        phases = [sub_network_phases(reading.events, reading.run.max_iter) for reading in pair]
        for reading, own, partner in zip(pair, phases, phases[::-1], strict=True):
            lines.append({"arm": reading.run.arm, **phase_seconds(reading, own or partner)})
    return pd.DataFrame(lines).groupby("arm").mean().to_dict("index")
