"""COCO box AP for many resampled lists of images at once, from one matching of detections to ground truth.

Shape shorthand: B resampled lists, I images, K categories, T = 10 IoU thresholds, D detections of a category, P of
them true positives.

A resampled list is a vector of I multiplicities. COCO's AP of the list follows from the matches of the single images,
because matching never crosses images: detections sorted by score, cumulative sums of multiplicity over true and false
positives, the precision envelope, its mean at 101 recalls.
"""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

Detections = Sequence[dict[str, Any]]
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_AREAS = ("all", "small", "medium", "large")
_MAX_DETECTIONS = 100
_CHUNK = 2_000_000  # multiplicities held at once (B x D)
_RECALLS = np.linspace(0.0, 1.00, round((1.00 - 0.0) / 0.01) + 1)  # as pycocotools makes them


@dataclass(frozen=True)
class _Cell:
    """One category in one area range, detections by falling score."""

    image: np.ndarray  # (D,) index of the image
    true: np.ndarray  # (T, D) matches an object that counts
    false: np.ndarray  # (T, D) matches none, and counts
    positives: np.ndarray  # (I,) objects that count


@dataclass(frozen=True)
class Matches:
    """The matches of one set of detections: area range -> its cells, in the order of the categories."""

    categories: tuple[str, ...]
    cells: dict[str, list[_Cell]]


def match(truth: COCO, detections: Detections, image_ids: Sequence[int] | None = None) -> Matches:
    """Matches detections to the ground truth as COCO does (boxes, at most 100 detections an image and category).

    Args:
        truth: the annotations.
        detections: COCO results: image_id, category_id, bbox (XYWH, px), score.
        image_ids: the images to evaluate; None for all.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        # loadRes cannot take an empty list; an evaluation without results matches nothing all the same.
        found = truth.loadRes([dict(d) for d in detections]) if detections else _empty_results(truth)
        evaluation = COCOeval(truth, found, "bbox")
        if image_ids is not None:
            evaluation.params.imgIds = list(image_ids)
        evaluation.params.maxDets = [_MAX_DETECTIONS]
        evaluation.evaluate()
    params = evaluation.params
    images, areas = len(params.imgIds), len(params.areaRng)
    cells: dict[str, list[_Cell]] = {area: [] for area in _AREAS}
    for k in range(len(params.catIds)):
        for a, area in enumerate(params.areaRngLbl):
            start = (k * areas + a) * images
            cells[area].append(_cell(evaluation.evalImgs[start : start + images], len(params.iouThrs)))
    names = tuple(str(truth.cats[i]["name"]) for i in params.catIds)
    return Matches(names, cells)


def average_precision(matches: Matches, multiplicities: np.ndarray) -> dict[str, np.ndarray]:
    """AP in percent of B lists of images; NaN if a list holds no such object.

    Args:
        multiplicities: (B, I) how often each image occurs in each list.

    Returns:
        name in METRICS, or "AP-" and a category -> (B,).
    """
    lists = np.asarray(multiplicities, dtype=np.float64)
    whole, small, medium, large = (
        np.stack([_cell_ap(cell, lists) for cell in matches.cells[area]], axis=1) for area in _AREAS
    )  # (B, K, T)
    metrics = dict(AP=whole, AP50=whole[:, :, :1], AP75=whole[:, :, 5:6], APs=small, APm=medium, APl=large)
    metrics |= {f"AP-{name}": whole[:, k : k + 1] for k, name in enumerate(matches.categories)}
    return {name: _mean(values) for name, values in metrics.items()}


def bootstrap_pairs(
    truth: COCO, pairs: Sequence[tuple[Detections, Detections]], samples: int, seed: int = 0
) -> list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Evaluates both detections of every pair on the same lists of images, the same for all pairs.

    Returns:
        for every pair, for both: metric -> (1 + samples,), the first of the real list, the others of resampled ones.
    """
    images = len(truth.getImgIds())
    resampled = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=samples)
    lists = np.concatenate([np.ones((1, images)), resampled])
    return [
        (average_precision(match(truth, first), lists), average_precision(match(truth, second), lists))
        for first, second in pairs
    ]


def _empty_results(truth: COCO) -> COCO:
    found = COCO()
    found.dataset = {"images": truth.dataset["images"], "categories": truth.dataset["categories"], "annotations": []}
    found.createIndex()
    return found


def _cell(evaluated: list[dict[str, Any] | None], thresholds: int) -> _Cell:
    found = [(index, one) for index, one in enumerate(evaluated) if one is not None]
    positives = np.zeros(len(evaluated))
    for index, one in found:
        positives[index] = np.count_nonzero(np.asarray(one["gtIgnore"]) == 0)
    image = np.repeat([index for index, _ in found], [len(one["dtScores"]) for _, one in found]).astype(int)
    scores = np.concatenate([[], *(one["dtScores"] for _, one in found)])
    none = np.empty((thresholds, 0))
    matched = np.concatenate([none, *(np.reshape(one["dtMatches"], (thresholds, -1)) for _, one in found)], axis=1) != 0
    ignored = np.concatenate([none, *(np.reshape(one["dtIgnore"], (thresholds, -1)) for _, one in found)], axis=1) != 0
    order = np.argsort(-scores, kind="mergesort")
    order = order[~ignored.all(axis=0)[order]]  # what counts at no threshold
    return _Cell(image[order], (matched & ~ignored)[:, order], (~matched & ~ignored)[:, order], positives)


def _cell_ap(cell: _Cell, multiplicities: np.ndarray) -> np.ndarray:
    """(B, T): AP at every IoU threshold, NaN if a list has no object that counts."""
    lists, thresholds = len(multiplicities), len(cell.true)
    result = np.empty((lists, thresholds))
    step = max(1, _CHUNK // max(1, len(cell.image)))
    for start in range(0, lists, step):
        chunk = multiplicities[start : start + step]
        objects = chunk @ cell.positives
        weights = chunk[:, cell.image]
        for t in range(thresholds):
            result[start : start + step, t] = _interpolated(weights, cell.true[t], cell.false[t], objects)
    result[multiplicities @ cell.positives == 0] = np.nan
    return result


def _interpolated(weights: np.ndarray, true: np.ndarray, false: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """(B,) mean over 101 recalls of the precision envelope.

    Only true positives raise recall, so only precision at their places counts. A recall threshold r takes the
    precision at the first detection whose recall reaches r; so the j-th true positive counts once for every threshold
    between the recall before it and its own.
    """
    where = np.flatnonzero(true)
    if not len(where):
        return np.zeros(len(weights))
    wrong = np.flatnonzero(false)
    passed = np.zeros((len(weights), len(wrong) + 1))
    np.cumsum(weights[:, wrong], axis=1, out=passed[:, 1:])
    right = np.cumsum(weights[:, where], axis=1)
    wrong_before = passed[:, np.searchsorted(wrong, where)]
    precision = right / (right + wrong_before + np.spacing(1))
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = right / np.maximum(objects, 1)[:, None]
    reached = np.searchsorted(_RECALLS, recall.ravel(), side="right").reshape(recall.shape)
    return (envelope * np.diff(reached, axis=1, prepend=0)).sum(axis=1) / len(_RECALLS)


def _mean(values: np.ndarray) -> np.ndarray:
    """(B, ...) -> (B,) mean in percent over what is there, NaN if nothing is."""
    flat = values.reshape(len(values), -1)
    there = np.isfinite(flat)
    count = there.sum(axis=1)
    total = np.where(there, flat, 0).sum(axis=1)
    return np.divide(100 * total, count, out=np.full(len(flat), np.nan), where=count > 0)
