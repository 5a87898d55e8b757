"""A small COCO-format folder, and edits that damage it."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image

from repr_det import datasets
from repr_det.commands.arguments import build_config
from repr_det.datasets.findings import Findings

SIZES = {1: (40, 30), 2: (30, 40), 5: (64, 64)}  # image id -> width, height


def annotations_of(boxes):
    """Annotations of (image id, category id, box [x, y, width, height])."""
    return [
        {"id": n, "image_id": i, "category_id": c, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for n, (i, c, box) in enumerate(boxes, 1)
    ]


class Folder:
    """Three images (the last without objects), four boxes, two classes; `content` is what the json will hold, or its
    bytes."""

    def __init__(self, root: Path) -> None:
        self.json, self.images = root / "truth.json", root / "images"
        self.images.mkdir(parents=True)
        for image_id, size in SIZES.items():
            Image.new("RGB", size, (image_id, 80, 120)).save(self.images / f"{image_id}.jpg")
        boxes = [(1, 3, [2, 3, 10, 12]), (1, 7, [20.5, 1, 15, 20]), (2, 3, [0, 0, 30, 40]), (2, 7, [5, 5, 9, 9])]
        self.content = {
            "images": [{"id": i, "file_name": f"{i}.jpg", "width": w, "height": h} for i, (w, h) in SIZES.items()],
            "annotations": annotations_of(boxes),
            "categories": [{"id": 3, "name": "cell"}, {"id": 7, "name": "plate"}],
        }

    def check(self, name=None, for_evaluation=True):
        if isinstance(self.content, bytes):
            self.json.write_bytes(self.content)
        elif self.content is not None:
            self.json.write_text(json.dumps(self.content))
        summary = datasets.check_coco_format(self.json, self.images, name)
        if for_evaluation:
            Findings(self.json, name).report(summary.gaps["evaluation"], summary.gaps["evaluation doubts"])
        return summary


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "data")


@pytest.fixture
def catalogs(monkeypatch):
    """Detectron2's catalogs; what a test registers is gone afterwards."""
    own = ("bccd_", "shapes_")
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", {k: v for k, v in catalog.data.items() if not k.startswith(own)})


@pytest.fixture
def mine(folder, catalogs, tmp_path):
    """``mine(KEY, VALUE, ..., edit=)``: a config that trains on the folder after a change of it."""

    def make(*opts: str, edit=lambda folder: None):
        edit(folder)
        folder.check(for_evaluation=False)
        own = [*SMALL, "DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "('mine',)", "OUTPUT_DIR", str(tmp_path / "run")]
        return build_config("baseline_r50_fpn.yaml", [*own, *opts], [["mine", str(folder.json), str(folder.images)]])

    return make


def change(edit):
    """``edit(folder, ...)``, called without the folder, is a change that is made in one later."""
    return lambda *args, **options: lambda folder: edit(folder, *args, **options)


@change
def put(folder, *where, **values):
    """Sets keys of an entry, or of all of the json; ... takes one away."""
    entry = folder.content
    for step in where:
        entry = entry[step]
    entry.update(values)
    for key in [key for key, value in values.items() if value is ...]:
        del entry[key]


image, annotation, category = partial(put, "images"), partial(put, "annotations"), partial(put, "categories")


@change
def every(folder, values):
    """``values(annotation)`` goes into each annotation."""
    for entry in folder.content["annotations"]:
        entry.update(values(entry))


def evaluate(evaluator, found):
    """COCO evaluation of a model that finds (record of an image, boxes, classes), the first box the most certain."""
    evaluator.reset()
    for record, boxes, classes in found:
        instances = Instances((record["height"], record["width"]), scores=torch.linspace(0.9, 0.5, len(boxes)))
        boxes = torch.tensor(boxes, dtype=torch.float).reshape(-1, 4)
        instances.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
        instances.pred_classes = torch.tensor(classes, dtype=torch.long)
        evaluator.process([record], [{"instances": instances}])
    return evaluator.evaluate().get("bbox", {})  # none without objects


def ap_of_the_truth(name):
    """Stock COCO evaluation of the true boxes of a registered data set."""
    found = [
        (record, *([truth[key] for truth in record["annotations"]] for key in ("bbox", "category_id")))
        for record in DatasetCatalog.get(name)
    ]
    return evaluate(COCOEvaluator(name, ("bbox",), distributed=False), found)["AP"]


def many(folder, count=60):
    """Boxes everywhere in the images, larger and smaller ones."""
    generator, boxes = np.random.default_rng(0), []
    for number in range(1, count + 1):
        image_id = [*SIZES][number % 3]
        extent = generator.uniform(0.1, 0.9, 2) * SIZES[image_id]
        corner = generator.uniform(0, 1, 2) * (SIZES[image_id] - extent)
        boxes.append((image_id, 3, [*corner.tolist(), *extent.tolist()]))
    folder.content["annotations"] = annotations_of(boxes)
