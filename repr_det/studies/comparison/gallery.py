"""Detections of both arms beside the ground truth on the same validation images, as data for SVG overlays."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.data import MetadataCatalog
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from repr_det.studies.comparison.evaluation import evenly_spaced

SCORE_THRESHOLD = 0.5
IOU_THRESHOLD = 0.5
_LONGEST_SIDE = 640  # px; larger images are scaled down, the report holds them
_JPEG_QUALITY = 85


@dataclass
class Box:
    """One box to draw, XYWH in px of the image as embedded."""

    x: float
    y: float
    width: float
    height: float
    label: str
    correct: bool


@dataclass
class Panel:
    """One view of an image."""

    title: str
    boxes: list[Box]
    summary: str


@dataclass
class Picture:
    """An image with its panels: ground truth, baseline, RePr."""

    name: str
    width: int
    height: int
    jpeg: str  # base64
    panels: list[Panel]


def gallery(truth: COCO, dataset: str, arms: Sequence[tuple[str, list[dict[str, Any]]]], number: int) -> list[Picture]:
    """``number`` validation images, spread evenly over those with objects: chosen by place, not by result.

    Args:
        truth: annotations of ``dataset``.
        arms: (title, COCO results) of each arm.
    """
    root = Path(MetadataCatalog.get(dataset).get("image_root", ""))
    pictures = []
    for image_id in evenly_spaced([i for i in sorted(truth.imgs) if truth.imgToAnns[i]], number):
        entry = truth.imgs[image_id]
        image = cv2.imread(str(root / entry["file_name"]), cv2.IMREAD_COLOR)
        if image is None:
            continue
        scale = min(1.0, _LONGEST_SIDE / max(image.shape[:2]))
        if scale < 1:
            image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        coded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1]
        objects = truth.imgToAnns[image_id]
        panels = [_truth_panel(truth, objects, scale)]
        for title, detections in arms:
            mine = [d for d in detections if d["image_id"] == image_id and d["score"] >= SCORE_THRESHOLD]
            panels.append(_detections_panel(title, truth, objects, mine, scale))
        height, width = image.shape[:2]
        jpeg = base64.b64encode(coded.tobytes()).decode()
        pictures.append(Picture(Path(entry["file_name"]).name, width, height, jpeg, panels))
    return pictures


def correct_detections(objects: list[dict[str, Any]], detections: list[dict[str, Any]]) -> list[bool]:
    """Which detections, by falling score, find an object of their class that is still free (IoU of at least 0.5)."""
    if not objects or not detections:
        return [False] * len(detections)
    crowds = [int(o.get("iscrowd", 0)) for o in objects]
    overlaps = coco_mask.iou([d["bbox"] for d in detections], [o["bbox"] for o in objects], crowds)
    correct = [False] * len(detections)
    taken: set[int] = set()
    for d in np.argsort([-d["score"] for d in detections], kind="stable"):
        free = [
            o
            for o, one in enumerate(objects)
            if o not in taken and one["category_id"] == detections[d]["category_id"] and overlaps[d, o] >= IOU_THRESHOLD
        ]
        if free:
            best = max(free, key=lambda o: overlaps[d, o])
            correct[d] = True
            if not crowds[best]:
                taken.add(best)
    return correct


def _truth_panel(truth: COCO, objects: list[dict[str, Any]], scale: float) -> Panel:
    boxes = [_box(o["bbox"], scale, _class(truth, o), True) for o in objects]
    return Panel("ground truth", boxes, f"{len(boxes)} object{'s' * (len(boxes) != 1)}")


def _detections_panel(title: str, truth: COCO, objects: list, detections: list, scale: float) -> Panel:
    correct = correct_detections(objects, detections)
    boxes = [
        _box(d["bbox"], scale, f"{_class(truth, d)} {d['score']:.2f}", right)
        for d, right in zip(detections, correct, strict=True)
    ]
    missed = sum(not o.get("iscrowd", 0) for o in objects) - sum(correct)
    return Panel(title, boxes, f"{sum(correct)} correct, {len(boxes) - sum(correct)} false, {max(0, missed)} missed")


def _class(truth: COCO, entry: dict[str, Any]) -> str:
    return str(truth.cats[entry["category_id"]]["name"])


def _box(bbox: Sequence[float], scale: float, label: str, correct: bool) -> Box:
    return Box(*(round(v * scale, 1) for v in bbox), label, correct)
