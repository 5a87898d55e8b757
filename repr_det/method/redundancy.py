"""Filters that a network would not miss: copies of others, and those that put out nothing and learn nothing.

RePr as published drops a fixed share, whether or not so much is redundant. Where these are dropped instead, at most
that share, training without any is training without RePr, step for step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from repr_det.method.data_criteria import Scores, share_in_use
from repr_det.method.layers import FilterLayer
from repr_det.method.orthogonality import by_group, unit_filters
from repr_det.method.passes import TrainingPasses

NEAR_DUPLICATE = 0.9  # |cos| of two filters of which one says little that the other does not
NEVER = float("-inf")  # the score of a filter that is not to be dropped


def redundancy(layers: Sequence[FilterLayer], passes: TrainingPasses, num_batches: int, cycle: int) -> Scores:
    """Layer name -> (J,): infinity for a filter that is never in use on these batches (``share_in_use``), the cosine to
    the filter that says the same for a near-duplicate (``copies``), NEVER for all others."""
    in_use = share_in_use(layers, passes, num_batches, cycle)
    scores = {}
    for layer in layers:
        idle = in_use[layer.name] == 0
        score = by_group(copies, layer.conv.groups, layer.weight.detach(), idle)
        scores[layer.name] = score.masked_fill(idle, float("inf"))
    return scores


def copies(weight: Tensor, idle: Tensor) -> Tensor:
    """The cosine of each near-duplicate to the filter that stays for it.

    From the largest norm down every filter stays, unless its cosine to one that stays is above NEAR_DUPLICATE. Filters
    of opposite sign are no copies: behind a ReLU they say different things.

    Args:
        weight: (J, ...) filters of one layer, or of one group.
        idle: (J,) bool, filters that nothing is compared with.

    Returns:
        (J,) in (NEAR_DUPLICATE, 1], NEVER for filters that stay and for idle ones.
    """
    rows = unit_filters(weight)
    with torch.autocast(rows.device.type, enabled=False):
        cosines = (rows @ rows.T).fill_diagonal_(0).cpu()
    idle = idle.cpu()
    near = (cosines > NEAR_DUPLICATE) & ~idle
    stays = ~idle & ~near.any(1)
    for row in weight.flatten(1).norm(dim=1).sort(descending=True, stable=True).indices.tolist():
        if near[row].any() and not idle[row]:
            stays[row] = not (near[row] & stays).any()
    score = torch.where(near & stays, cosines, NEVER).amax(1)
    return score.masked_fill(stays | idle, NEVER).to(weight.device)
