"""The evaluator of a data set, chosen as in Detectron2's tools/train_net.py."""

import importlib.util
from collections.abc import Sequence

from detectron2 import evaluation
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from repr_det.datasets import CocoEvaluator
from repr_det.method.errors import UserError

# evaluator_type -> evaluator of a data set's name, a folder for files, and the config.
_EVALUATORS = {
    "coco": lambda name, folder, cfg: CocoEvaluator(
        name, output_dir=folder, kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS
    ),
    "sem_seg": lambda name, folder, _: evaluation.SemSegEvaluator(name, distributed=True, output_dir=folder),
    "pascal_voc": lambda name, folder, _: evaluation.PascalVOCDetectionEvaluator(name),
    "lvis": lambda name, folder, _: evaluation.LVISEvaluator(name, output_dir=folder),
    "cityscapes_instance": lambda name, folder, _: evaluation.CityscapesInstanceEvaluator(name),
    "cityscapes_sem_seg": lambda name, folder, _: evaluation.CityscapesSemSegEvaluator(name),
    "coco_panoptic_seg": lambda name, folder, _: evaluation.COCOPanopticEvaluator(name, folder),
}
_BEFORE = {"coco_panoptic_seg": ("sem_seg", "coco")}  # evaluated too
_NEEDS = {"lvis": "lvis", "coco_panoptic_seg": "panopticapi"}
_NEEDS |= dict.fromkeys(("cityscapes_instance", "cityscapes_sem_seg"), "cityscapesscripts")


def check_evaluators(names: Sequence[str]) -> None:
    """Raises UserError if a data set's evaluator_type is unknown, or a package is missing."""
    for name in names:
        kind = _kind(name)
        if kind not in _EVALUATORS:
            raise UserError(
                f"DATASETS.TEST {name} has evaluator_type {kind!r}, which is none of {', '.join(_EVALUATORS)}: "
                "register it with one of these, or override Trainer.build_evaluator"
            )
        if kind in _NEEDS and importlib.util.find_spec(_NEEDS[kind]) is None:
            raise UserError(f"DATASETS.TEST {name}: its evaluation ({kind}) needs the package {_NEEDS[kind]}")


def build_evaluator(name: str, folder: str, cfg: CfgNode) -> DatasetEvaluator:
    """Chooses by the evaluator_type of a registered data set, else "coco"; files go to ``folder``."""
    kind = _kind(name)
    made = [_EVALUATORS[each](name, folder, cfg) for each in (*_BEFORE.get(kind, ()), kind)]
    return made[0] if len(made) == 1 else DatasetEvaluators(made)


def _kind(name: str) -> str:
    return MetadataCatalog.get(name).get("evaluator_type", "coco")
