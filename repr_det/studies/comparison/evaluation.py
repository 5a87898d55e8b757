"""Ground truth and predictions of finished runs, and AP on training images for the train/val gap."""

import contextlib
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, build_detection_test_loader
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.evaluation.evaluator import inference_context
from detectron2.modeling import build_model
from pycocotools.coco import COCO

from repr_det.commands.data import classes_of_run
from repr_det.commands.data_checks import check_datasets
from repr_det.datasets import check_registered, merge_aliases
from repr_det.detectron.config import add_repr_config
from repr_det.method.errors import UserError
from repr_det.runs.files import FINAL_CHECKPOINT, write_atomically
from repr_det.studies.comparison.matches import average_precision, match
from repr_det.studies.comparison.records import read_config

PREDICTIONS_FILE = Path("inference") / "coco_instances_results.json"

logger = logging.getLogger(__name__)


def load_truth(name: str) -> COCO:
    """The annotations of a registered data set.

    Raises:
        UserError: it is not registered, or has no COCO json.
    """
    check_registered(name)
    path = getattr(MetadataCatalog.get(name), "json_file", None)
    if path is None or not Path(path).is_file():
        raise UserError(f"the data set {name} has no COCO json file ({path})")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(path)
    merge_aliases(truth)
    return truth


def load_validation_truth(folder: Path) -> COCO:
    """The annotations of DATASETS.TEST of a run.

    Raises:
        UserError: they are not at hand, or their classes are not those that the run was trained with.
    """
    cfg = load_config(folder)
    classes_of_run(cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, eval_only=True, folder=folder)
    check_datasets(cfg, eval_only=True)
    return load_truth(cfg.DATASETS.TEST[0])


def read_predictions(folder: Path) -> list[dict[str, Any]] | None:
    """The detections of the last evaluation in ``folder``, or None where there is no file."""
    path = folder / PREDICTIONS_FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}): evaluate the run again with --eval-only") from error
    return [d for d in found if "bbox" in d]


def load_config(folder: Path) -> CfgNode:
    """The config that a run was trained with."""
    cfg = get_cfg()
    add_repr_config(cfg)
    cfg.merge_from_other_cfg(CfgNode(read_config(folder)))
    if torch.device(cfg.MODEL.DEVICE).type == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    return cfg


def train_ap(folder: Path, images: int, cache: Path) -> float | None:
    """AP of a run's model_final.pth on ``images`` of its own training images, without augmentation, in percent.

    The images are spread evenly over the first data set of DATASETS.TRAIN.

    Args:
        cache: a json file that remembers the results of earlier calls.

    Returns:
        None where the run has no model_final.pth.

    Raises:
        UserError: the data set is not registered.
    """
    checkpoint = folder / FINAL_CHECKPOINT
    if images < 1 or not checkpoint.is_file():
        return None
    key = f"{folder}, {images} images, {checkpoint.stat().st_mtime_ns}"
    known = json.loads(cache.read_text(encoding="utf-8")) if cache.is_file() else {}
    if key not in known:
        logger.info("AP on %d training images of %s", images, folder)
        known[key] = _train_ap(folder, images)
        write_atomically(cache, json.dumps(known, indent=1))
    return known[key]


def _train_ap(folder: Path, images: int) -> float | None:
    cfg = load_config(folder)
    check_datasets(cfg)
    name = cfg.DATASETS.TRAIN[0]
    truth = load_truth(name)
    dicts = evenly_spaced(DatasetCatalog.get(name), images)
    loader = build_detection_test_loader(dataset=dicts, mapper=DatasetMapper(cfg, is_train=False), num_workers=0)
    with _quiet():
        model = build_model(cfg)
        DetectionCheckpointer(model).load(str(folder / FINAL_CHECKPOINT))
    to_id = {v: k for k, v in MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id.items()}
    detections = []
    with inference_context(model), torch.no_grad():
        for batch in loader:
            for image, output in zip(batch, model(batch), strict=True):
                detections += instances_to_coco_json(output["instances"].to("cpu"), image["image_id"])
    detections = [d | {"category_id": to_id[d["category_id"]]} for d in detections if d["category_id"] in to_id]
    ids = [d["image_id"] for d in dicts]
    result = average_precision(match(truth, detections, ids), np.ones((1, len(ids))), areas=("all",))
    value = float(result.metrics["AP"][0])
    return value if np.isfinite(value) else None


def evenly_spaced(items: list, number: int) -> list:
    """At most ``number`` of the items, spread evenly over the list."""
    if number >= len(items):
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, number).round().astype(int)]


@contextlib.contextmanager
def _quiet():
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
