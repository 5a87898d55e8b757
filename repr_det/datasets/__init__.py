"""The embedded shapes data set, and the registration and checking of COCO-format data."""

from repr_det.datasets.coco_format import check_coco_format
from repr_det.datasets.evaluation import CocoEvaluator
from repr_det.datasets.registered import check_registered, class_names, register_builtin, register_coco_format
from repr_det.datasets.shapes import CLASS_NAMES, generate_shapes

__all__ = ["CLASS_NAMES", "CocoEvaluator", "check_coco_format", "check_registered", "class_names", "generate_shapes"]
__all__ += ["register_builtin", "register_coco_format"]
