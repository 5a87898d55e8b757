"""COCO evaluation of data sets whose classes are mapped by name."""

import contextlib
import io
from typing import Any

from detectron2.data import Metadata, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from pycocotools.coco import COCO


class CocoEvaluator(COCOEvaluator):
    """Detectron2's, also for data sets that list a subset of the model's classes, number them otherwise, or give a
    class two ids: AP is the mean over the classes that the data set lists, and detections of the others do not count.
    No json needs the 'info' that pycocotools 2.0.9 and 2.0.10 ask for."""

    def __init__(self, dataset_name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(dataset_name, *args, **kwargs)
        metadata = MetadataCatalog.get(dataset_name)
        own = metadata.get("own_classes")
        if own is None:
            self._coco_api.dataset.setdefault("info", {})
            return
        merge_aliases(self._coco_api)
        numbers = dict(metadata.thing_dataset_id_to_contiguous_id)
        self._listed = set(numbers.values())
        self._class_names = list(own)
        # Detectron2 wants an id for every class of the model; those that are made up here are never written.
        absent = set(range(len(metadata.thing_classes))) - self._listed
        numbers |= {max(own.values()) + 1 + i: number for i, number in enumerate(sorted(absent))}
        self._metadata = Metadata(**metadata.as_dict() | {"thing_dataset_id_to_contiguous_id": numbers})

    def _eval_predictions(self, predictions: list[dict], img_ids: Any = None) -> None:
        if hasattr(self, "_listed"):
            predictions = [
                x | {"instances": [i for i in x["instances"] if i["category_id"] in self._listed]} for x in predictions
            ]
        super()._eval_predictions(predictions, img_ids)

    def _derive_coco_results(self, coco_eval: Any, iou_type: str, class_names: list[str] | None = None) -> dict:
        # COCO's axis of classes is sorted by category id.
        return super()._derive_coco_results(coco_eval, iou_type, getattr(self, "_class_names", class_names))


def merge_aliases(truth: COCO) -> None:
    """Leave, in place, the lowest id of several categories with one name; and add the 'info' that pycocotools needs."""
    truth.dataset.setdefault("info", {})
    names = {category["id"]: category["name"] for category in truth.dataset["categories"]}
    lowest = {name: min(i for i in names if names[i] == name) for name in names.values()}
    if len(lowest) == len(names):
        return
    truth.dataset["categories"] = [
        category for category in truth.dataset["categories"] if category["id"] in lowest.values()
    ]
    for annotation in truth.dataset["annotations"]:
        annotation["category_id"] = lowest[names[annotation["category_id"]]]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
