"""What a filter is remembered by when it is dropped, and how the filters of one layer come back (RePr, section 3).

Shape shorthand:
    J: filters of a layer        M: filters of it that return        K = J - M: filters that stayed
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from repr_det.method.errors import UserError
from repr_det.method.holding import optimizer_state
from repr_det.method.layers import BATCH, FROZEN, GROUP, NONE, FilterLayer
from repr_det.method.orthogonality import (
    least_overlap_rows,
    overlap_of_unit_rows,
    overlap_with_returned,
    unit_filters,
)

SCALES = ("kept", "old", "unit")
FROZEN_NORM_MODES = ("recalibrate", "keep")
RETURNS = ("as_published", "median_gamma", "function_preserving")


def check_reinit(scale: str, frozen_norm: str, returns: str) -> None:
    """Raises UserError for a mode that does not exist."""
    for key, value, choices in (
        ("SCALE", scale, SCALES),
        ("FROZEN_NORM", frozen_norm, FROZEN_NORM_MODES),
        ("RETURN", returns, RETURNS),
    ):
        if value not in choices:
            raise UserError(f"REPR.REINIT.{key} must be one of {', '.join(choices)}, got {value!r}")


def remember(layer: FilterLayer, rows: Tensor, moments: Tensor | None = None) -> dict[str, Tensor]:
    """What ``bring_back`` needs of filters (M,) that are about to be dropped, on the CPU.

    Args:
        moments: (2, M) of their channels after a FrozenBN, see ``calibration.measure_moments``.
    """
    old = {"weight": layer.weight[rows].cpu()}
    if layer.kind == FROZEN:
        old["norm.weight"] = layer.norm.weight[rows].cpu()
        old["norm.bias"] = layer.norm.bias[rows].cpu()
    if moments is not None:
        old["moments"] = moments
    return old


def bring_back(
    layer: FilterLayer,
    mask: Tensor,
    old: Mapping[str, Tensor],
    scale: str,
    returns: str,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, float]:
    """Gives the dropped filters of a layer new directions of least overlap, and a norm as at the start.

    Args:
        mask: (J,) bool, True = returns.
        old: what ``remember`` kept of them.
        scale, returns: see ``RePrScheme``.
        generator: decides where the directions are not determined.

    Returns:
        O_f of the filters that stayed, among themselves (K,), and of all as they are now (J,); the largest |cos| of a
        new filter to a kept or an old one.
    """
    rows = mask.nonzero().flatten()
    before = old["weight"].to(layer.weight)
    kept = layer.weight[~mask]
    unit = unit_filters(torch.cat([kept, before]))
    overlap_kept = overlap_of_unit_rows(unit[: len(kept)])
    new = least_overlap_rows(unit, len(before), generator)
    found = unit @ new.T
    overlap = overlap_with_returned(overlap_kept, new, found[: len(kept)], mask)
    new = new.to(before).view_as(before)
    layer.weight[rows] = new * _new_norms(scale, kept, before)
    if layer.conv.bias is not None:
        layer.conv.bias[rows] = 0
    _reset_norm(layer, rows, mask, old, returns)
    return overlap_kept, overlap, found.abs().max().item()


def _new_norms(scale: str, kept: Tensor, before: Tensor) -> Tensor | float:
    """L2 norms of the new filters: one number, or (M, 1, ...)."""
    if scale == "kept":
        norms = kept.flatten(1).norm(dim=1)
        return norms[torch.isfinite(norms)].mean().nan_to_num(1.0)
    if scale == "old":
        return before.flatten(1).norm(dim=1).nan_to_num(1.0, 1.0).view(-1, *[1] * (before.dim() - 1))
    return 1.0


def _reset_norm(layer: FilterLayer, rows: Tensor, mask: Tensor, old: Mapping[str, Tensor], returns: str) -> None:
    norm = layer.norm
    if layer.kind == FROZEN:
        norm.weight[rows] = old["norm.weight"].to(norm.weight)
        norm.bias[rows] = old["norm.bias"].to(norm.bias)
    elif layer.kind != NONE:
        norm.weight[rows] = norm.weight[~mask].median() if returns == "median_gamma" else 1
        if norm.bias is not None:
            norm.bias[rows] = 0
    if layer.kind == BATCH and layer.running_statistics() is not None:
        norm.running_mean[rows] = 0
        norm.running_var[rows] = 1


def silence(layer: FilterLayer, rows: Tensor, reader: nn.Module | None, optimizer: torch.optim.Optimizer) -> None:
    """Keeps returned channels (M,) from changing what comes after them, until they are learnt ("function_preserving").

    Args:
        reader: the only conv that reads them, whose kernels for them become 0; None where they are added to a shortcut,
            and gamma becomes 0.
    """
    if reader is None:
        if layer.kind in (BATCH, GROUP):
            layer.norm.weight[rows] = 0
    elif reader.groups == 1:
        for tensor in (reader.weight, *optimizer_state(optimizer, reader.weight)):
            tensor.index_fill_(1, rows, 0)
