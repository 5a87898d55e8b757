"""Which convs put out features: not those that put out predictions, nor those that compute a gate for other channels.

A channel of a prediction that is 0 is a statement (a probability of a half, a box that stays), and a gate's filters
scale channels that are somebody else's.
"""

import fnmatch
import re

from torch import nn

# Last parts of the names that Detectron2, torchvision, detrex and mmdetection give to convs that predict.
_PREDICTIONS = (
    *("cls_score", "bbox_pred", "objectness_logits", "anchor_deltas", "predictor", "*_predictor", "*_logits"),
    *("bbox_reg", "*ctrness", "*centerness", "*_pred", "rpn_cls", "rpn_reg", "retina_cls", "retina_reg"),
)
_PREDICTING_HEADS = ("classification_head", "regression_head")
_GATE_CLASS = re.compile(r"squeeze.*excit|^SE(Module|Layer|Block)?$|Effective_?SE", re.IGNORECASE)
_GATES = (nn.Sigmoid, nn.Hardsigmoid)
_POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


def why_not_features(model: nn.Module) -> dict[str, str]:
    """Name of a conv -> what it puts out instead of features; all other convs are missing."""
    gates = [_convs(prefix, module) for prefix, module in model.named_modules() if _is_gate(module)]
    found = {name: "a gate" for names in gates for name in names}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and _predicts(model, name, module):
            found.setdefault(name, "predictions")
    return found


def _predicts(model: nn.Module, name: str, conv: nn.Conv2d) -> bool:
    if conv.bias is None or getattr(conv, "norm", None) is not None:
        return False
    parent, _, last = name.rpartition(".")
    if any(fnmatch.fnmatchcase(last, pattern) for pattern in _PREDICTIONS):
        return True
    if not set(_PREDICTING_HEADS) & set(name.split(".")):
        return False
    siblings = model.get_submodule(parent)
    return siblings[-1] is conv if isinstance(siblings, nn.Sequential) else isinstance(siblings, nn.ModuleList)


def _is_gate(module: nn.Module) -> bool:
    """Squeeze and excitation: a mean over the image, 1x1 convs, a sigmoid."""
    if _GATE_CLASS.search(type(module).__name__):
        return True
    parts = [part for part in module.modules() if not list(part.children())]
    convs = [number for number, part in enumerate(parts) if isinstance(part, nn.Conv2d)]
    if not convs or any(parts[number].kernel_size != (1, 1) for number in convs):
        return False
    pools = [
        number for number, part in enumerate(parts) if isinstance(part, _POOLS) and part.output_size in (1, (1, 1))
    ]
    gates = [number for number, part in enumerate(parts) if isinstance(part, _GATES)]
    return bool(pools and gates) and pools[0] < convs[0]


def _convs(prefix: str, module: nn.Module) -> list[str]:
    return [f"{prefix}.{n}" if prefix else n for n, part in module.named_modules() if isinstance(part, nn.Conv2d)]
