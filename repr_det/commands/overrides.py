"""Overrides of a LazyConfig: a key that the config does not have is a typo unless it is said to be new."""

import difflib
import inspect
from typing import Any

from detectron2.utils.registry import locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf

from repr_det.datasets import listed
from repr_det.detectron.lazy import KEYS
from repr_det.method.errors import UserError


def refuse_unknown_keys(cfg: DictConfig, overrides: list[str]) -> None:
    """Raises UserError for an override ``path.key=value`` of a key that ``cfg`` does not have.

    Arguments that the ``_target_`` of a node takes may be added, so may what Detectron2 or this package reads; the keys
    of ``repr`` are checked where it is read. ``+path.key=value`` adds any key.
    """
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group
        if override.is_add() or key in KEYS or key.startswith("repr"):
            continue
        node, parts = cfg, key.split(".")
        for depth, part in enumerate(parts):
            known = _keys(node)
            if part in known:
                node = node._get_node(int(part) if isinstance(node, ListConfig) else part)
                continue
            if _takes(node, part):
                break
            where = ".".join(parts[:depth])
            close = [".".join(filter(None, (where, k))) for k in difflib.get_close_matches(part, known, n=2)]
            hint = f"did you mean {' or '.join(close)}?" if close else f"it has {listed(known)}"
            raise UserError(
                f"override {key}: the config has no {part!r} in {where or 'it'}; {hint} (+{key}=... adds a new key)"
            )


def _keys(node: Any) -> list[str]:
    if isinstance(node, ListConfig):
        return [str(i) for i in range(len(node))]
    return [str(key) for key in node] if isinstance(node, DictConfig) and OmegaConf.is_dict(node) else []


def _takes(node: Any, name: str) -> bool:
    """Tells whether the callable of a LazyCall has an argument of this name."""
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    try:
        parameters = inspect.signature(locate(target) if isinstance(target, str) else target).parameters
    except (TypeError, ValueError, ImportError):
        return False
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
