"""Filters that a network would not miss: copies of others, and those that put out nothing and learn nothing."""

from collections.abc import Sequence

import torch
from torch import Tensor

from repr_det.method.data_criteria import Scores, use_of_filters
from repr_det.method.layers import FilterLayer
from repr_det.method.orthogonality import by_group, unit_filters
from repr_det.method.passes import TrainingPasses
from repr_det.network.norms import NONE

NEAR_DUPLICATE = 0.9  # likeness of two filters of which one says little that the other does not
NEVER = float("-inf")  # the score of a filter that is not to be dropped


def redundancy(layers: Sequence[FilterLayer], passes: TrainingPasses, num_batches: int, cycle: int) -> Scores:
    """Filters that a network would not miss: infinity for one that is never in use on these batches
    (``use_of_filters``), the likeness to the filter that says the same for a near-duplicate (``copies``), NEVER for all
    others. Where a network has none of these, training with RePr is training without it, step for step."""
    use = use_of_filters(layers, passes, num_batches, cycle)
    scores = {}
    for layer in layers:
        idle, threshold = use[layer.name]
        sign = torch.ones(layer.num_filters) if layer.kind == NONE else layer.norm.weight.detach().cpu().sign()
        weight = layer.weight.detach().cpu() * sign.view(-1, 1, 1, 1)
        score = by_group(copies, layer.conv.groups, weight, idle, threshold)
        scores[layer.name] = score.masked_fill(idle, float("inf"))
    return scores


def copies(weight: Tensor, idle: Tensor, threshold: Tensor) -> Tensor:
    """The likeness of each near-duplicate to the filter that stays for it.

    Two filters are alike by the cosine c of their weights, taken with the sign of their gammas, and by their thresholds
    t, mean over standard deviation of what they put out: c / sqrt(1 + (t1 - t2)^2).

    From the largest norm down every filter stays, unless it is more like one that stays than NEAR_DUPLICATE. Filters
    that stay, and idle ones, score NEVER. Weights (J, ...) are those of one layer or group, on the CPU.
    """
    rows = unit_filters(weight)
    apart = threshold[:, None].double() - threshold[None].double()
    likeness = ((rows @ rows.T) / (1 + apart.square()).sqrt()).fill_diagonal_(0)
    near = (likeness > NEAR_DUPLICATE) & ~idle
    stays = ~idle & ~near.any(1)
    for row in weight.flatten(1).norm(dim=1).sort(descending=True, stable=True).indices.tolist():
        if near[row].any() and not idle[row]:
            stays[row] = not (near[row] & stays).any()
    score = torch.where(near & stays, likeness, NEVER).amax(1)
    return score.masked_fill(stays | idle, NEVER)
