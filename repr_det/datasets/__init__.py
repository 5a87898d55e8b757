"""Data sets: the embedded shapes data set, and the registration and checking of COCO-format data."""

from repr_det.datasets.coco_format import CocoSummary, check_coco_format
from repr_det.datasets.evaluation import CocoEvaluator
from repr_det.datasets.findings import listed
from repr_det.datasets.image_files import shared_images
from repr_det.datasets.registered import (
    agree_on_classes,
    any_mapped,
    check_registered,
    class_names,
    own_classes,
    register_builtin,
    register_coco_format,
)
from repr_det.datasets.shapes import CLASS_NAMES, generate_shapes

__all__ = [
    "CLASS_NAMES",
    "CocoEvaluator",
    "CocoSummary",
    "agree_on_classes",
    "any_mapped",
    "check_coco_format",
    "check_registered",
    "class_names",
    "generate_shapes",
    "listed",
    "own_classes",
    "register_builtin",
    "register_coco_format",
    "shared_images",
]
