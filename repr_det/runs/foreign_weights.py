"""Weights under other names than the model's: inside other dicts, prefixed, or in torchvision's and timm's names."""

import logging
import re
from collections.abc import Collection
from typing import Any

logger = logging.getLogger("repr_det.resume")
_DICTS = ("state_dict", "model_state_dict", "model_state", "model")
_PREFIXES = ("module.", "model.")
_FIRST_BLOCK = "layer1.0.conv1.weight"  # of torchvision's and timm's ResNets


def fit_names(checkpoint: dict[str, Any], names: Collection[str]) -> None:
    """Changes ``checkpoint["model"]`` in place so that its weights have this model's names, where none of them has: the
    dicts around them and common prefixes are taken off, names of torchvision's and timm's ResNets become Detectron2's.

    Args:
        checkpoint: {"model": weights, ...} as Detectron2 loads it.
        names: those of the model's parameters and buffers.
    """
    weights = checkpoint["model"]
    if not isinstance(weights, dict) or checkpoint.get("matching_heuristics") or not set(names).isdisjoint(weights):
        return
    done = []
    while (key := next((k for k in _DICTS if isinstance(weights.get(k), dict)), None)) is not None:
        weights = weights[key]
        done.append(f"taken from {key!r}")
    while set(names).isdisjoint(weights) and (prefix := _common_prefix(weights)):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
        done.append(f"prefix {prefix!r} taken off")
    if set(names).isdisjoint(weights) and (converted := _from_torchvision(weights)):
        weights = converted
        checkpoint["matching_heuristics"] = True
        done.append(
            "torchvision's and timm's names of a ResNet converted to Detectron2's (they expect INPUT.FORMAT RGB, "
            "MODEL.PIXEL_MEAN [123.675, 116.28, 103.53], MODEL.PIXEL_STD [58.395, 57.12, 57.375] and "
            "MODEL.RESNETS.STRIDE_IN_1X1 False)"
        )
    checkpoint["model"] = weights
    if done:
        logger.info("Names of the weights: %s", "; ".join(done))


def _common_prefix(weights: dict[str, Any]) -> str | None:
    return next((p for p in _PREFIXES if weights and all(str(name).startswith(p) for name in weights)), None)


def _from_torchvision(weights: dict[str, Any]) -> dict[str, Any] | None:
    """The convs and norms of a ResNet, alone or inside a larger model, in Detectron2's names; None where there is none,
    more than one, or one with another stem."""
    inside = [name.removesuffix(_FIRST_BLOCK) for name in weights if str(name).endswith(_FIRST_BLOCK)]
    if len(inside) != 1 or f"{inside[0]}conv1.weight" not in weights:
        return None
    own = {name.removeprefix(inside[0]): value for name, value in weights.items() if name.startswith(inside[0])}
    return {_converted(name): value for name, value in own.items() if re.match(r"(conv1|bn1|layer[1-4])\.", name)}


def _converted(name: str) -> str:
    name = re.sub(r"^(conv1|bn1)\.", r"stem.\1.", name)
    name = re.sub(r"^layer(\d)", lambda stage: f"res{int(stage.group(1)) + 1}", name)
    name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
    return name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
