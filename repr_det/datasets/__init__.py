"""Data sets: the embedded shapes data set, and the registration and checking of COCO-format data.

May import the method.
"""

from repr_det.datasets.classes import agree_on_classes, any_mapped
from repr_det.datasets.coco_format import CocoSummary, check_coco_format
from repr_det.datasets.evaluation import CocoEvaluator, merge_aliases
from repr_det.datasets.findings import listed
from repr_det.datasets.image_files import shared_images
from repr_det.datasets.registered import (
    check_registered,
    class_names,
    own_classes,
    register_builtin,
    register_coco_format,
)
from repr_det.datasets.shapes import CLASS_NAMES, build_shapes, generate_shapes

__all__ = [
    "CLASS_NAMES",
    "CocoEvaluator",
    "CocoSummary",
    "agree_on_classes",
    "any_mapped",
    "build_shapes",
    "check_coco_format",
    "check_registered",
    "class_names",
    "generate_shapes",
    "listed",
    "merge_aliases",
    "own_classes",
    "register_bccd",
    "register_builtin",
    "register_coco_format",
    "shared_images",
]
