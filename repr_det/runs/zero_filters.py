"""Filters that a sub-network checkpoint holds as zeros: they would stay dead in a run that begins with it."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from repr_det.method.errors import UserError


def zero_filters(weights: Mapping[str, Any]) -> dict[str, list[int]]:
    """Conv -> the filters that are switched off: row, bias and the norm's affine exactly 0, as a drop leaves them.

    A conv whose filters are all zero is one that begins so (deformable offsets, a zero-initialised output), not one
    that lost some. Norms are found by name: ``X.norm`` of Detectron2, ``bnN`` of a ``convN``.
    """
    found = {}
    for name, value in weights.items():
        if not name.endswith(".weight") or getattr(value, "ndim", 0) != 4:
            continue
        conv = name.removesuffix(".weight")
        off = ~_rows(value).any(1)
        if not off.any() or off.all():
            continue
        norm = next((n for n in (f"{conv}.norm", re.sub(r"conv(\d+)$", r"bn\1", conv)) if f"{n}.weight" in weights), "")
        affine = [f"{conv}.bias", f"{norm}.weight", f"{norm}.bias"] if norm != conv else [f"{conv}.bias"]
        for key in affine:
            if key in weights and len(weights[key]) == len(off):
                off &= ~_rows(weights[key]).any(1)
        if off.any():
            found[conv] = off.nonzero().flatten().tolist()
    return found


def refuse_zero_filters(weights: Mapping[str, Any], source: str) -> None:
    """Raises UserError where some filters of ``weights`` are switched off."""
    if not (found := zero_filters(weights)):
        return
    name, filters = next(iter(found.items()))
    raise UserError(
        f"MODEL.WEIGHTS {source!r} holds {sum(map(len, found.values()))} filters that are zero with their norm, "
        f"{len(filters)} of them in {name}: a sub-network, whose dropped filters would stay dead in a new run; give a "
        "checkpoint from outside the sub-network phase, or continue that run with --resume"
    )


def _rows(value: Any) -> Tensor:
    return torch.as_tensor(value).flatten(1) if value.ndim > 1 else torch.as_tensor(value)[:, None]
