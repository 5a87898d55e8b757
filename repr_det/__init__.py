"""RePr (CVPR 2019) for Detectron2: drop the filters that overlap most, train the rest, bring them back orthogonal."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.3.0"

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError("repr_det needs PyTorch: pip install torch torchvision, or `make install`") from error

from repr_det.method.errors import UserError
from repr_det.method.layers import FilterLayer, find_filter_layers
from repr_det.method.loop import RePr, apply_repr
from repr_det.method.orthogonality import inter_filter_orthogonality, least_overlap_filters
from repr_det.method.schedule import RePrSchedule
from repr_det.method.scheme import RePrScheme

if TYPE_CHECKING:
    from repr_det.detectron.config import add_repr_config, validate_repr_config
    from repr_det.detectron.engine import Trainer
    from repr_det.detectron.hook import RePrHook

_DETECTRON2_NAMES = {
    "RePrHook": "repr_det.detectron.hook",
    "Trainer": "repr_det.detectron.engine",
    "add_repr_config": "repr_det.detectron.config",
    "validate_repr_config": "repr_det.detectron.config",
}
__all__ = [
    "FilterLayer",
    "RePr",
    "RePrHook",
    "RePrSchedule",
    "RePrScheme",
    "Trainer",
    "UserError",
    "add_repr_config",
    "apply_repr",
    "find_filter_layers",
    "inter_filter_orthogonality",
    "least_overlap_filters",
    "validate_repr_config",
]


def __getattr__(name: str) -> Any:
    """Loads on first use what needs Detectron2."""
    if name not in _DETECTRON2_NAMES:
        raise AttributeError(f"module 'repr_det' has no attribute {name!r}")
    try:
        module = import_module(_DETECTRON2_NAMES[name])
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("detectron2"):
            raise
        raise ImportError(
            f"repr_det.{name} needs Detectron2, which is not installed: run `make install` in the folder of repr_det, "
            "or follow https://detectron2.readthedocs.io/en/latest/tutorials/install.html"
        ) from error
    return getattr(module, name)
