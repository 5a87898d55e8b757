"""Ground truth and detections of finished runs: AP on training images, and pictures of both arms side by side."""

import base64
import contextlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, build_detection_test_loader
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.evaluation.evaluator import inference_context
from detectron2.modeling import build_model
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from repr_det.commands.data import classes_of_run
from repr_det.commands.data_checks import check_datasets
from repr_det.datasets import check_registered, merge_aliases
from repr_det.method.errors import UserError
from repr_det.runs.files import FINAL_CHECKPOINT, write_atomically
from repr_det.studies.comparison.matches import average_precision, match
from repr_det.studies.comparison.records import read_config

PREDICTIONS_FILE = Path("inference") / "coco_instances_results.json"
SCORE_THRESHOLD = 0.5
IOU_THRESHOLD = 0.5
_LONGEST_SIDE = 640  # px; larger images are scaled down, the report holds them
_JPEG_QUALITY = 85


def load_truth(name: str) -> COCO:
    """The annotations of a data set; refuses one that is not registered, or has no COCO json."""
    check_registered(name)
    path = getattr(MetadataCatalog.get(name), "json_file", None)
    if path is None or not Path(path).is_file():
        raise UserError(f"the data set {name} has no COCO json file ({path})")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(path)
    merge_aliases(truth)
    return truth


def load_validation_truth(folder: Path) -> COCO:
    """The annotations of DATASETS.TEST of a run; refuses other classes than those that it was trained with."""
    cfg = read_config(folder)
    classes_of_run(cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, eval_only=True, folder=folder)
    check_datasets(cfg, eval_only=True)
    return load_truth(cfg.DATASETS.TEST[0])


def read_predictions(folder: Path) -> list[dict[str, Any]] | None:
    """The detections of the last evaluation in ``folder``, or None if there is no file."""
    path = folder / PREDICTIONS_FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}): evaluate the run again with --eval-only") from error
    return [d for d in found if "bbox" in d]


def train_ap(folder: Path, images: int, cache: Path) -> float:
    """AP of a run's model_final.pth on ``images`` of its own training images, without augmentation, in percent.

    The images are spread evenly over the first data set of DATASETS.TRAIN.

    Args:
        cache: a json file that remembers the results of earlier calls.

    Returns:
        NaN if the run has no model_final.pth, or the images no object.
    """
    checkpoint = folder / FINAL_CHECKPOINT
    if images < 1 or not checkpoint.is_file():
        return math.nan
    key = f"{folder}, {images} images, {checkpoint.stat().st_mtime_ns}"
    known = json.loads(cache.read_text(encoding="utf-8")) if cache.is_file() else {}
    if key not in known:
        ap = _train_ap(read_config(folder).clone(), checkpoint, images)
        known[key] = ap if math.isfinite(ap) else None
        write_atomically(cache, json.dumps(known, indent=1))
    return math.nan if known[key] is None else known[key]


def evenly_spaced(items: list, number: int) -> list:
    """At most ``number`` of the items, spread evenly over the list."""
    if number >= len(items):
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, number).round().astype(int)]


def _train_ap(cfg: CfgNode, checkpoint: Path, images: int) -> float:
    cfg.defrost()
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    check_datasets(cfg)
    name = cfg.DATASETS.TRAIN[0]
    truth = load_truth(name)
    dicts = evenly_spaced(DatasetCatalog.get(name), images)
    loader = build_detection_test_loader(dataset=dicts, mapper=DatasetMapper(cfg, is_train=False), num_workers=0)
    model = build_model(cfg)
    DetectionCheckpointer(model).load(str(checkpoint))
    to_id = {v: k for k, v in MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id.items()}
    detections = []
    with inference_context(model), torch.no_grad():
        for batch in loader:
            for image, output in zip(batch, model(batch), strict=True):
                detections += instances_to_coco_json(output["instances"].to("cpu"), image["image_id"])
    detections = [d | {"category_id": to_id[d["category_id"]]} for d in detections if d["category_id"] in to_id]
    ids = [d["image_id"] for d in dicts]
    return float(average_precision(match(truth, detections, ids), np.ones((1, len(ids))))["AP"][0])


def gallery(truth: COCO, dataset: str, arms: Mapping[str, Sequence[dict]], number: int) -> list[dict[str, Any]]:
    """``number`` validation images, spread evenly over those with objects: chosen by place, not by result.

    Args:
        truth: annotations of ``dataset``.
        arms: title -> COCO results.

    Returns:
        name, width, height, jpeg (base64) of every image, and panels: title, summary, boxes.
    """
    root = Path(MetadataCatalog.get(dataset).image_root)
    pictures = []
    for image_id in evenly_spaced([i for i in sorted(truth.imgs) if truth.imgToAnns[i]], number):
        entry = truth.imgs[image_id]
        image = cv2.imread(str(root / entry["file_name"]))
        if image is None:
            continue
        scale = min(1.0, _LONGEST_SIDE / max(image.shape[:2]))
        if scale < 1:
            image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        coded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1]
        objects = truth.imgToAnns[image_id]
        boxes = [_box(truth, one, scale, "truth") for one in objects]
        summary = f"{len(boxes)} object{'s' * (len(boxes) != 1)}"
        panels = [{"title": "ground truth", "summary": summary, "boxes": boxes}]
        for title, detections in arms.items():
            mine = [d for d in detections if d["image_id"] == image_id and d["score"] >= SCORE_THRESHOLD]
            panels.append({"title": title, **_panel(truth, objects, mine, scale)})
        height, width = image.shape[:2]
        jpeg = base64.b64encode(coded.tobytes()).decode()
        name = Path(entry["file_name"]).name
        pictures.append({"name": name, "width": width, "height": height, "jpeg": jpeg, "panels": panels})
    return pictures


def correct_detections(objects: Sequence[dict], detections: Sequence[dict]) -> list[bool]:
    """Tells which detections, by falling score, find an object of their class that is still free (IoU >= 0.5)."""
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


def _panel(truth: COCO, objects: Sequence[dict], detections: Sequence[dict], scale: float) -> dict[str, Any]:
    correct = correct_detections(objects, detections)
    boxes = []
    for detection, right in zip(detections, correct, strict=True):
        box = _box(truth, detection, scale, "correct" if right else "false")
        boxes.append(box | {"label": f"{box['label']} {detection['score']:.2f}"})
    missed = max(0, sum(not o.get("iscrowd", 0) for o in objects) - sum(correct))
    return {
        "boxes": boxes,
        "summary": f"{sum(correct)} correct, {len(boxes) - sum(correct)} false, {missed} missed",
    }


def _box(truth: COCO, entry: dict[str, Any], scale: float, kind: str) -> dict[str, Any]:
    x, y, width, height = (round(v * scale, 1) for v in entry["bbox"])
    label = str(truth.cats[entry["category_id"]]["name"])
    return {"x": x, "y": y, "width": width, "height": height, "label": label, "kind": kind}
