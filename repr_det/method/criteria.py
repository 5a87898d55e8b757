"""Ranking criteria: one score a filter, the largest is dropped first (RePr, section 4 and the table of 5).

A criterion is a name in ``CRITERIA``, or a function of one layer:

    def smallest_first(layer: FilterLayer) -> Tensor:          # (J,)
        return -layer.weight.flatten(1).norm(dim=1)

    RePr(model, optimizer, total_steps, criterion=smallest_first)

A function of (layer, context) gets a ``Context`` too, and a ``Criterion`` scores all layers at once. A filter of score
minus infinity is never dropped. ``examples/criteria.py`` and ``saliency.py`` have more.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repr_det.method.data_criteria import Scores, share_of_zeros
from repr_det.method.distributed import to_cpu
from repr_det.method.errors import OptionError, UserError
from repr_det.method.layers import FilterLayer
from repr_det.method.orthogonality import by_group, expected_overlap, inter_filter_orthogonality
from repr_det.method.passes import TrainingPasses
from repr_det.method.redundancy import redundancy


@dataclass(frozen=True)
class Context:
    """The things that a criterion may look at besides the layers: a generator of the CPU, and training batches (their
    number, and the cycle that says which)."""

    generator: torch.Generator
    passes: TrainingPasses | None = None
    num_batches: int = 0
    cycle: int = 0


@dataclass(frozen=True)
class Criterion:
    """``score(layers, context)`` -> layer name -> (J,).

    Attributes:
        needs_data: whether it runs training batches.
        spares: whether it has filters (score minus infinity) that no drop takes.
    """

    score: Callable[[Sequence[FilterLayer], Context], Scores]
    needs_data: bool = False
    spares: bool = False


def _of_function(function: Callable[..., Tensor]) -> Criterion:
    takes_context = len(inspect.signature(function).parameters) > 1
    name = getattr(function, "__name__", type(function).__name__)

    def score(layers: Sequence[FilterLayer], context: Context) -> Scores:
        found = {}
        for layer in layers:
            with torch.no_grad():
                scores = function(layer, context) if takes_context else function(layer)
            if not torch.is_tensor(scores) or scores.shape != (layer.num_filters,) or scores.isnan().any():
                what = tuple(scores.shape) if torch.is_tensor(scores) else type(scores).__name__
                raise UserError(
                    f"criterion= {name} must return a tensor of {layer.num_filters} scores without NaN for "
                    f"{layer.name}, got {what}"
                )
            found[layer.name] = scores.detach()
        return found

    return Criterion(score, spares=True)


def _of_weight(function: Callable[[Tensor], Tensor]) -> Criterion:
    """A function of one layer's weight, (J, ...) -> (J,); of a grouped conv it sees the filters of one group at a
    time."""

    def score(layers: Sequence[FilterLayer], context: Context) -> Scores:
        weights = to_cpu([layer.weight for layer in layers])
        return {x.name: by_group(function, x.conv.groups, weight) for x, weight in zip(layers, weights, strict=True)}

    return Criterion(score)


def _of_batches(
    name: str, function: Callable[[Sequence[FilterLayer], TrainingPasses, int, int], Scores], spares: bool = False
) -> Criterion:
    """A function of layers, passes, number of batches and cycle."""

    def score(layers: Sequence[FilterLayer], context: Context) -> Scores:
        if context.passes is None:
            raise UserError(f"criterion {name!r} looks at training batches: give Context(passes=...)")
        return function(layers, context.passes, context.num_batches, context.cycle)

    return Criterion(score, needs_data=True, spares=spares)


def calibrated_overlap(weight: Tensor) -> Tensor:
    """O_f over its expectation for random directions, so that layers of different d compare: about 1 untrained."""
    if len(weight) == 1:
        return torch.zeros(1)
    return inter_filter_orthogonality(weight) / expected_overlap(len(weight), weight[0].numel())


def released_overlap(weight: Tensor) -> Tensor:
    """The score that the author's released code computes instead of the paper's O_f: the matrix is scaled by one norm,
    and the signed projections are averaged before the absolute value: |mean_j (What What^T - I)[f, j]|,
    What = W / ||W||_F."""
    rows = torch.nan_to_num(weight.detach().cpu().double().flatten(1))
    rows = rows / rows.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return ((rows @ rows.sum(0) - 1) / len(rows)).abs()


def small_weight_norm(weight: Tensor) -> Tensor:
    """Minus the mean squared weight of the filter: the smallest filters are dropped first."""
    return -torch.nan_to_num(weight.detach().cpu().double().flatten(1)).square().mean(1)


def _random(layers: Sequence[FilterLayer], context: Context) -> Scores:
    return {x.name: torch.rand(x.num_filters, generator=context.generator) for x in layers}


CRITERIA = {
    "ortho": _of_weight(inter_filter_orthogonality),
    "ortho_calibrated": _of_weight(calibrated_overlap),
    "ortho_released": _of_weight(released_overlap),
    "weight_norm": _of_weight(small_weight_norm),
    "random": Criterion(_random),
    "apoz": _of_batches("apoz", share_of_zeros),
    "redundant": _of_batches("redundant", redundancy, spares=True),
}
_OF_EXAMPLES = ("mean_activation", "gradient", "taylor", "hessian")  # names until version 0.2.0


def get_criterion(criterion: "str | Callable[..., Tensor] | Criterion") -> Criterion:
    """Raises OptionError for a name that is not in CRITERIA, or what is neither a name nor a function."""
    if isinstance(criterion, Criterion):
        return criterion
    if callable(criterion):
        return _of_function(criterion)
    if criterion not in CRITERIA:
        gone = " (since version 0.3.0 it is in examples/saliency.py)" if criterion in _OF_EXAMPLES else ""
        raise OptionError(f"{{criterion}} must be one of {', '.join(sorted(CRITERIA))}, got {criterion!r}{gone}")
    return CRITERIA[criterion]
