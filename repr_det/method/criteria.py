"""Ranking criteria by name: one score a filter, the largest is dropped first (RePr, section 4 and the table of 5)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repr_det.method import data_criteria, oracle
from repr_det.method.data_criteria import Scores
from repr_det.method.errors import UserError
from repr_det.method.layers import FilterLayer
from repr_det.method.orthogonality import by_group, expected_overlap, inter_filter_orthogonality
from repr_det.method.passes import TrainingPasses
from repr_det.method.redundancy import redundancy


@dataclass(frozen=True)
class Context:
    """What a criterion may look at besides the layers.

    Attributes:
        generator: source of randomness.
        passes: how to run training batches; None where there is none.
        num_batches: how many of them (REPR.CRITERION_BATCHES).
        cycle: which batches.
    """

    generator: torch.Generator
    passes: TrainingPasses | None = None
    num_batches: int = 0
    cycle: int = 0


@dataclass(frozen=True)
class Criterion:
    """``score(layers, context)`` -> layer name -> (J,); ``needs_data`` where it runs training batches, ``max_filters``
    where it is too slow for more, ``spares`` where it has filters (score ``redundancy.NEVER``) that no drop takes."""

    score: Callable[[Sequence[FilterLayer], Context], Scores]
    needs_data: bool = False
    max_filters: int | None = None
    spares: bool = False


CRITERIA: dict[str, Criterion] = {}


def get_criterion(name: str, num_filters: int = 0) -> Criterion:
    """Raises UserError for a name that is not in CRITERIA, or a criterion that is too slow for so many filters."""
    if name not in CRITERIA:
        raise UserError(f"REPR.CRITERION must be one of {', '.join(sorted(CRITERIA))}, got {name!r}")
    most = CRITERIA[name].max_filters
    if most is not None and num_filters > most:
        raise UserError(f"REPR.CRITERION {name!r} takes at most {most} filters, REPR.LAYERS has {num_filters}")
    return CRITERIA[name]


def _of_weight(name: str) -> Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]:
    """Registers a function of one layer's weight, (J, ...) -> (J,), as a criterion; of a grouped conv it sees the
    filters of one group at a time."""

    def register(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        CRITERIA[name] = Criterion(
            lambda layers, _: {x.name: by_group(function, x.conv.groups, x.weight.detach()) for x in layers}
        )
        return function

    return register


_of_weight("ortho")(inter_filter_orthogonality)


@_of_weight("ortho_calibrated")
def calibrated_overlap(weight: Tensor) -> Tensor:
    """O_f over its expectation for random directions, so that layers of different d compare: about 1 untrained."""
    num_filters = len(weight)
    if num_filters == 1:
        return weight.new_zeros(1)
    return inter_filter_orthogonality(weight) / expected_overlap(num_filters, weight[0].numel())


@_of_weight("ortho_released")
def released_overlap(weight: Tensor) -> Tensor:
    """What the author's released code computes instead of the paper's O_f: the matrix is scaled by one norm, and the
    signed projections are averaged before the absolute value: |mean_j (What What^T - I)[f, j]|, What = W / ||W||_F."""
    rows = torch.nan_to_num(weight.detach().flatten(1).float())
    rows = rows / rows.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return ((rows @ rows.sum(0) - 1) / len(rows)).abs()


@_of_weight("weight_norm")
def small_weight_norm(weight: Tensor) -> Tensor:
    """Minus the mean squared weight of the filter: the smallest filters are dropped first."""
    return -torch.nan_to_num(weight.detach().flatten(1).float()).square().mean(1)


def _random(layers: Sequence[FilterLayer], context: Context) -> Scores:
    device = context.generator.device
    return {x.name: torch.rand(x.num_filters, generator=context.generator, device=device) for x in layers}


CRITERIA["random"] = Criterion(_random)


def _of_batches(
    name: str,
    function: Callable[[Sequence[FilterLayer], TrainingPasses, int, int], Scores],
    max_filters: int | None = None,
    spares: bool = False,
) -> None:
    """Registers a function of layers, passes, number of batches and cycle as a criterion."""

    def score(layers: Sequence[FilterLayer], context: Context) -> Scores:
        if context.passes is None:
            raise UserError(f"REPR.CRITERION {name!r} looks at training batches: give Context(passes=...)")
        return function(layers, context.passes, context.num_batches, context.cycle)

    CRITERIA[name] = Criterion(score, needs_data=True, max_filters=max_filters, spares=spares)


def _oracle(layers: Sequence[FilterLayer], passes: TrainingPasses, num_batches: int, cycle: int) -> Scores:
    increase = oracle.ablation(layers, passes, list(passes.batches(num_batches, cycle)))
    return {layer.name: -increase[layer.name].to(layer.weight.device) for layer in layers}


_of_batches("mean_activation", data_criteria.low_activation)
_of_batches("apoz", data_criteria.share_of_zeros)
_of_batches("gradient", data_criteria.small_gradient)
_of_batches("taylor", data_criteria.small_taylor)
_of_batches("hessian", data_criteria.small_fisher)
_of_batches("redundant", redundancy, spares=True)
# The filter whose removal hurts least on these batches comes first.
_of_batches("oracle", _oracle, oracle.MAX_FILTERS)


def correlation_with_oracle(
    layers: Sequence[FilterLayer], context: Context, criteria: Sequence[str]
) -> dict[str, float]:
    """Spearman's rank correlation of criteria with the oracle over the filters of all layers (the paper's figure 4).

    Args:
        context: its batches are what criteria and oracle look at; held-out images for the paper's oracle.
        criteria: names in CRITERIA.

    Returns:
        criterion -> correlation in [-1, 1]; NaN where all scores of a criterion are equal.
    """
    reference = get_criterion("oracle").score(layers, context)
    return {name: oracle.rank_correlation(get_criterion(name).score(layers, context), reference) for name in criteria}
