"""Weights that a run begins with: other names for the same layers, and filters that a sub-network holds as zeros."""

import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch

logger = logging.getLogger("repr_det.resume")
_DICTS = ("state_dict", "model_state_dict", "model_state", "model")
_PREFIXES = ("module.", "model.")
_FIRST_BLOCK = "layer1.0.conv1.weight"  # of torchvision's and timm's ResNets
_RENAMED = (
    (r"^(conv1|bn1)\.", r"stem.\1."),
    *((rf"^layer{stage}\.", f"res{stage + 1}.") for stage in (1, 2, 3, 4)),
    (r"\bbn(\d)\.", r"conv\1.norm."),
    (r"\bdownsample\.0\.", "shortcut."),
    (r"\bdownsample\.1\.", "shortcut.norm."),
)


def fit_names(checkpoint: dict[str, Any], names: Collection[str]) -> None:
    """Changes ``checkpoint["model"]`` in place if none of its weights has a name of this model.

    The dicts around the weights and common prefixes are taken off; names of torchvision's and timm's ResNets become
    Detectron2's.

    Args:
        checkpoint: {"model": weights, ...} as Detectron2 loads it.
        names: those of the model's parameters and buffers.
    """
    weights = checkpoint["model"]
    if not isinstance(weights, dict) or checkpoint.get("matching_heuristics") or not set(names).isdisjoint(weights):
        return
    while inner := [key for key in _DICTS if isinstance(weights.get(key), dict)]:
        weights = weights[inner[0]]
    while set(names).isdisjoint(weights) and (prefix := _common_prefix(weights)):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    roots = [str(name).removesuffix(_FIRST_BLOCK) for name in weights if str(name).endswith(_FIRST_BLOCK)]
    # One ResNet with the usual stem.
    if set(names).isdisjoint(weights) and len(roots) == 1 and f"{roots[0]}conv1.weight" in weights:
        weights = {
            _renamed(name.removeprefix(roots[0])): weights[name] for name in weights if name.startswith(roots[0])
        }
        checkpoint["matching_heuristics"] = True
        logger.info(
            "Names of a ResNet of torchvision or timm converted to Detectron2's: such weights expect INPUT.FORMAT RGB, "
            "MODEL.PIXEL_MEAN [123.675, 116.28, 103.53], MODEL.PIXEL_STD [58.395, 57.12, 57.375] and "
            "MODEL.RESNETS.STRIDE_IN_1X1 False"
        )
    checkpoint["model"] = weights


def _common_prefix(weights: dict[str, Any]) -> str:
    return next((p for p in _PREFIXES if weights and all(str(name).startswith(p) for name in weights)), "")


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def zero_filters(weights: Mapping[str, Any]) -> dict[str, list[int]]:
    """Conv -> the filters that are switched off: row, bias and the norm's affine exactly 0, as a drop leaves them.

    A conv whose filters are all zero is one that begins so (deformable offsets, a zero-initialised output), not one
    that lost some. Norms are found by name: ``X.norm`` of Detectron2, ``bnN`` of a ``convN``.
    """
    found = {}
    for name, value in weights.items():
        if not str(name).endswith(".weight") or getattr(value, "ndim", 0) != 4:
            continue
        conv = name.removesuffix(".weight")
        off = ~torch.as_tensor(value).flatten(1).any(1)
        if off.all() or not off.any():
            continue
        norms = (f"{conv}.norm", re.sub(r"conv(\d+)$", r"bn\1", conv))
        for key in (f"{conv}.bias", *(f"{norm}.{part}" for norm in norms for part in ("weight", "bias"))):
            if key != name and key in weights and len(weights[key]) == len(off):
                off &= torch.as_tensor(weights[key]) == 0
        if off.any():
            found[conv] = off.nonzero().flatten().tolist()
    return found
