"""The evaluator of a data set, chosen as Detectron2's own tools/train_net.py chooses it."""

import importlib.util
from collections.abc import Sequence

from detectron2 import evaluation
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from repr_det.datasets import CocoEvaluator
from repr_det.method.errors import UserError

_NEEDS = {
    "lvis": "lvis",
    "coco_panoptic_seg": "panopticapi",
    "cityscapes_instance": "cityscapesscripts",
    "cityscapes_sem_seg": "cityscapesscripts",
}
_KINDS = ("coco", "sem_seg", "pascal_voc", *_NEEDS)


def check_evaluators(names: Sequence[str]) -> None:
    """Raises UserError where a data set cannot be evaluated: its evaluator_type is unknown, or a package is missing."""
    for name in names:
        kind = _kind(name)
        if kind not in _KINDS:
            raise UserError(
                f"DATASETS.TEST {name} has evaluator_type {kind!r}, which is none of {', '.join(_KINDS)}: override "
                "Trainer.build_evaluator, or register it with one of these"
            )
        if kind in _NEEDS and importlib.util.find_spec(_NEEDS[kind]) is None:
            raise UserError(
                f"DATASETS.TEST {name}: its evaluation ({kind}) needs the package {_NEEDS[kind]}: install it"
            )


def build_evaluator(name: str, folder: str) -> DatasetEvaluator:
    """For a data set whose evaluator_type is one of Detectron2's; without one it is evaluated as COCO's.

    Args:
        name: a registered data set.
        folder: for the files that the evaluator writes.
    """
    kind, found = _kind(name), []
    if kind in ("sem_seg", "coco_panoptic_seg"):
        found.append(evaluation.SemSegEvaluator(name, distributed=True, output_dir=folder))
    if kind in ("coco", "coco_panoptic_seg"):
        found.append(CocoEvaluator(name, output_dir=folder))
    if kind == "coco_panoptic_seg":
        found.append(evaluation.COCOPanopticEvaluator(name, folder))
    if kind == "cityscapes_instance":
        found.append(evaluation.CityscapesInstanceEvaluator(name))
    if kind == "cityscapes_sem_seg":
        found.append(evaluation.CityscapesSemSegEvaluator(name))
    if kind == "pascal_voc":
        found.append(evaluation.PascalVOCDetectionEvaluator(name))
    if kind == "lvis":
        found.append(evaluation.LVISEvaluator(name, output_dir=folder))
    return found[0] if len(found) == 1 else DatasetEvaluators(found)


def _kind(name: str) -> str:
    return MetadataCatalog.get(name).get("evaluator_type", "coco")
