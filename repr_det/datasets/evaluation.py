"""COCO evaluation of data sets whose classes are mapped by name."""

from typing import Any

from detectron2.data import Metadata, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from pycocotools.coco import COCO

from repr_det.datasets.coco_format import lowest_ids
from repr_det.datasets.objects import outline


class CocoEvaluator(COCOEvaluator):
    """Detectron2's evaluator, also for data sets that list a subset of the model's classes, number them otherwise, give
    one two ids, or list others without objects. AP is the mean over their own classes; detections of no other count."""

    def __init__(self, dataset_name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(dataset_name, *args, **kwargs)
        truth = self._coco_api
        truth.dataset.setdefault("info", {})  # pycocotools 2.0.9 and 2.0.10 ask for it
        _keep_what_can_be_learned(truth)
        metadata = MetadataCatalog.get(dataset_name)
        classes = {i: c for i, c in metadata.get("own_classes", {}).items() if c in metadata.thing_classes}
        lowest = lowest_ids(classes)
        # The model's number of a class -> the data set's.
        self._own_numbers = {metadata.thing_classes.index(name): number for number, name in enumerate(lowest)}
        if classes:
            ids = {i: number for number, i in enumerate(lowest.values())}
            self._metadata = Metadata(thing_classes=list(lowest), thing_dataset_id_to_contiguous_id=ids)
            # A class with two ids has the lower one. No evaluation reads what this changes of pycocotools' index.
            truth.dataset["categories"] = [entry for entry in truth.dataset["categories"] if entry["id"] in ids]
            for annotation in truth.dataset.get("annotations", ()):
                annotation["category_id"] = lowest[classes[annotation["category_id"]]]

    def _eval_predictions(self, predictions: list[dict], img_ids: Any = None) -> None:
        if self._own_numbers:
            for prediction in predictions:
                found = [one for one in prediction["instances"] if one["category_id"] in self._own_numbers]
                for one in found:
                    one["category_id"] = self._own_numbers[one["category_id"]]
                prediction["instances"] = found
        super()._eval_predictions(predictions, img_ids)


def _keep_what_can_be_learned(truth: COCO) -> None:
    """Leaves out what training leaves out: polygons of less than 3 points, objects with no other ones, flat boxes."""
    for annotations in truth.imgToAnns.values():
        kept = []
        for entry in annotations:
            given = entry.get("segmentation")
            if isinstance(given, list):
                entry["segmentation"] = outline(given)
            if all(entry.get("bbox", ())[2:]) and (not given or entry["segmentation"]):
                kept.append(entry)
        annotations[:] = kept
