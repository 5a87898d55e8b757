"""The choice of filters to drop: the worst share of the whole network, with a cap on the share of any one layer."""

import math

import torch
from torch import Tensor

from repr_det.method.errors import OptionError
from repr_det.method.options import about_option

_ROUNDING = 1e-9  # 0.3 * 10 must be 3 and 0.1 * 30 must not be 4


def drop_total(num_filters: int, drop_ratio: float) -> int:
    """floor(drop_ratio * F)."""
    return math.floor(drop_ratio * num_filters + _ROUNDING)


def drop_cap(num_filters: int, max_drop_per_layer: float) -> int:
    """min(J - 1, ceil(max_drop_per_layer * J)): one filter always stays."""
    return max(0, min(num_filters - 1, math.ceil(max_drop_per_layer * num_filters - _ROUNDING)))


def check_capacity(sizes: dict[str, int], drop_ratio: float, max_drop_per_layer: float) -> None:
    """Raises OptionError if a share is out of range, or the caps leave too few filters to drop."""
    about_option("drop_ratio").check("drop_ratio", drop_ratio)
    about_option("max_drop_per_layer").check("max_drop_per_layer", max_drop_per_layer)
    total = drop_total(sum(sizes.values()), drop_ratio)
    room = sum(drop_cap(size, max_drop_per_layer) for size in sizes.values())
    if room < total:
        raise OptionError(
            f"{{max_drop_per_layer}} {max_drop_per_layer} lets {room} of {sum(sizes.values())} filters be dropped, "
            f"{{drop_ratio}} {drop_ratio} needs {total} (one of a layer stays): raise the cap or lower the ratio"
        )


def select_filters(scores: dict[str, Tensor], drop_ratio: float, max_drop_per_layer: float = 1.0) -> dict[str, Tensor]:
    """The floor(drop_ratio * F) filters with the highest scores over all layers, at most a capped number in any layer.

    Args:
        scores: layer name -> (J,), larger is dropped earlier, minus infinity never. Ties go by the order of the layers,
            then by index.
        drop_ratio: share of all F filters, in (0, 1).
        max_drop_per_layer: share of a layer that may be dropped, rounded up, in (0, 1]; one filter always stays.

    Returns:
        layer name -> (J,) bool on the device of the scores, True = drop.

    Raises:
        OptionError: a share is out of range, or the caps leave too few filters.
        ValueError: a score is NaN.
    """
    sizes = {name: len(score) for name, score in scores.items()}
    check_capacity(sizes, drop_ratio, max_drop_per_layer)
    candidates = []
    for name, score in scores.items():
        score = score.detach().double().cpu()
        if torch.isnan(score).any():
            raise ValueError(f"the score of filter {int(torch.isnan(score).nonzero()[0])} of {name} is NaN")
        order = score.sort(descending=True, stable=True).indices
        # Beyond its cap a layer has no candidates.
        candidates.append(score.index_fill(0, order[drop_cap(len(score), max_drop_per_layer) :], -math.inf))
    ranked = torch.cat(candidates)
    worst = ranked.sort(descending=True, stable=True).indices[: drop_total(len(ranked), drop_ratio)]
    chosen = torch.zeros(len(ranked), dtype=torch.bool).index_fill(0, worst, True) & (ranked > -math.inf)
    masks = zip(scores.items(), chosen.split(list(sizes.values())), strict=True)
    return {name: mask.to(score.device) for (name, score), mask in masks}
