"""What a filter is remembered by when it is dropped, and how the filters of one layer come back (RePr, section 3).

Shape shorthand:
    J: filters of a layer        M: filters of it that return        K = J - M: filters that stayed
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from repr_det.method.errors import UserError
from repr_det.method.layers import BATCH, GROUP, FilterLayer
from repr_det.method.optimizers import restart_optimizer_state_
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


def remember(layer: FilterLayer, rows: Tensor, frozen_norm: bool, moments: Tensor | None = None) -> dict[str, Tensor]:
    """What ``bring_back`` needs of filters (M,) that are about to be dropped, on the CPU.

    Args:
        frozen_norm: whether the norm keeps its statistics, so that its affine is to come back as it was.
        moments: (2, M) of their channels after a frozen norm, see ``calibration.measure_moments``.
    """
    old = {"weight": layer.weight[rows].cpu()}
    if frozen_norm:
        old["norm.weight"] = layer.norm.weight[rows].cpu()
        if layer.norm.bias is not None:
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
    norms = _new_norms(scale, layer.weight[~mask], before)
    found = []
    for group in range(layer.conv.groups):  # filters of other groups look at other channels
        members = layer.of_group(group)
        mine = (rows >= members.start) & (rows < members.stop)
        found.append(_directions(layer.weight[members], mask[members], before[mine], norms[mine], generator))
    new, overlap_kept, overlap, cosines = zip(*found, strict=True)
    layer.weight[rows] = torch.cat(new).view_as(before)
    if layer.conv.bias is not None:
        layer.conv.bias[rows] = 0
    _reset_norm(layer, rows, mask, old, returns)
    return torch.cat(overlap_kept), torch.cat(overlap), max(cosines)


def _directions(
    weight: Tensor, mask: Tensor, before: Tensor, norms: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, float]:
    """New filters (M, d) of the given norms (M,) as they are stored; and what ``bring_back`` returns."""
    kept = weight[~mask]
    unit = unit_filters(torch.cat([kept, before]))
    if not len(before):
        overlap_kept = overlap_of_unit_rows(unit)
        return before.flatten(1), overlap_kept, overlap_kept, 0.0
    new, found, overlap_kept = least_overlap_rows(unit, len(before), generator, len(kept))
    stored = _of_norm(new, norms, weight.dtype)
    if stored.dtype != new.dtype:
        new = unit_filters(stored)
        found = unit @ new.T
    overlap = overlap_with_returned(overlap_kept, new, found[: len(kept)], mask)
    return stored, overlap_kept, overlap, found.abs().max().item()


def _new_norms(scale: str, kept: Tensor, before: Tensor) -> Tensor:
    """L2 norms (M,) of the new filters, never 0: where kept and old filters are all zero they are 1."""

    def norms(filters: Tensor) -> Tensor:
        return (filters if filters.dtype == torch.float64 else filters.float()).flatten(1).norm(dim=1)

    def mean(filters: Tensor) -> Tensor:
        sizes = norms(filters)
        return sizes[torch.isfinite(sizes) & (sizes > 0)].mean()  # NaN of none

    own = norms(before)
    if scale == "unit":
        return torch.ones_like(own)
    fallback = mean(kept)
    if fallback.isnan():
        fallback = mean(before).nan_to_num(1.0)
    return torch.where(torch.isfinite(own) & (own > 0), own, fallback) if scale == "old" else fallback.expand_as(own)


def _of_norm(unit: Tensor, norms: Tensor, dtype: torch.dtype) -> Tensor:
    """Unit rows (M, d) scaled to norms (M,), which they have after rounding to ``dtype`` too."""
    scaled = (unit * norms[:, None]).to(dtype)
    if dtype in (torch.float16, torch.bfloat16):
        rounded = scaled.float().norm(dim=1)
        scaled = (unit * (norms * torch.where(rounded > 0, norms / rounded, 1))[:, None]).to(dtype)
    lost = ~(scaled.to(unit.dtype).norm(dim=1) > 0)  # a norm so small that every entry rounds to 0
    return torch.where(lost[:, None], unit.to(dtype), scaled)


def _reset_norm(layer: FilterLayer, rows: Tensor, mask: Tensor, old: Mapping[str, Tensor], returns: str) -> None:
    norm = layer.norm
    if "norm.weight" in old:
        norm.weight[rows] = old["norm.weight"].to(norm.weight)
        if "norm.bias" in old:
            norm.bias[rows] = old["norm.bias"].to(norm.bias)
        return
    if layer.kind in (BATCH, GROUP):
        norm.weight[rows] = norm.weight[~mask].median() if returns == "median_gamma" else 1
        if norm.bias is not None:
            norm.bias[rows] = 0
    if layer.kind == BATCH and layer.running_statistics() is not None:
        norm.running_mean[rows] = 0
        norm.running_var[rows] = 1


def can_be_silent(layer: FilterLayer, reader: nn.Module | None) -> bool:
    """Whether something can be learnt that keeps a returned channel of the layer from changing what follows: kernels of
    the only conv that reads it, or gamma where it is added to a shortcut (``reader`` None)."""
    if reader is None:
        return layer.kind in (BATCH, GROUP) and layer.norm.weight.requires_grad
    return reader.weight.requires_grad and reader.in_channels > reader.groups


def silence(layer: FilterLayer, mask: Tensor, reader: nn.Module | None, optimizers: Sequence[Optimizer]) -> int:
    """Keeps returned channels from changing what comes after them, until they are learnt ("function_preserving").

    Args:
        mask: (J,) bool, True = returned.
        reader: the only conv that reads them, whose kernels for them become 0; None where they are added to a shortcut,
            and gamma becomes 0.

    Returns:
        The number of channels for which that is not possible: no filter of the reader may lose all of its kernels, so
        not where ``can_be_silent`` says no, nor all channels of a group of a grouped reader.
    """
    if not can_be_silent(layer, reader):
        return int(mask.sum())
    if reader is None:
        layer.norm.weight[mask] = 0
        return 0
    loud = 0
    weight, filters = reader.weight, reader.out_channels // reader.groups
    for group, returned in enumerate(mask.chunk(reader.groups)):
        if returned.all():
            loud += len(returned)
        elif returned.any():
            rows = slice(group * filters, (group + 1) * filters)
            for tensor in (weight, weight.grad):
                if tensor is not None:
                    tensor[rows].index_fill_(1, returned.nonzero().flatten(), 0)
            restart_optimizer_state_(optimizers, weight, returned, rows, dim=1)
    return loud
