"""Criteria of one's own for ``RePr(..., criterion=function)``: the oracle, by trying every filter (section 4).

The oracle is for small networks: it removes each filter and looks at the loss, ``passes.loss`` averaged over the given
batches and the ranks, in training mode and with the same random numbers every time. The paper's oracle looks at
held-out images: give batches of such images. A removed filter is zero in all its tensors; afterwards every value is as
before.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repr_det import FilterLayer, UserError
from repr_det.method.criteria import Context
from repr_det.method.distributed import mean_over_ranks
from repr_det.method.layers import zero_rows_
from repr_det.method.passes import TrainingPasses
from repr_det.network.state import preserved_random_state, undisturbed

MAX_FILTERS = 512


def oracle(layer: FilterLayer, context: Context) -> Tensor:
    """A criterion, (J,): the filter whose removal hurts least comes first."""
    batches = list(context.passes.batches(context.num_batches, context.cycle))
    return -ablation([layer], context.passes, batches)[layer.name]


@torch.no_grad()
def ablation(layers: Sequence[FilterLayer], passes: TrainingPasses, batches: Sequence[Any]) -> dict[str, Tensor]:
    """The increase of the loss when a filter alone is removed: F + 1 passes over all batches for F filters.

    Returns:
        layer name -> (J,) float64; negative where the network is better off without the filter.

    Raises:
        UserError: more than MAX_FILTERS filters, or no batches.
    """
    _check(layers, batches)
    increase = {}
    with undisturbed(passes.model, own_modes=True):
        whole = _loss(passes, batches)
        for layer in layers:
            losses = []
            for index in range(layer.num_filters):
                with _kept_values([layer]):
                    _remove(layer, index)
                    losses.append(_loss(passes, batches))
            increase[layer.name] = torch.nan_to_num(torch.tensor(losses, dtype=torch.float64) - whole)
    return increase


def _check(layers: Sequence[FilterLayer], batches: Sequence[Any]) -> None:
    number = sum(layer.num_filters for layer in layers)
    if number > MAX_FILTERS:
        raise UserError(
            f"the oracle tries every filter by itself and takes at most {MAX_FILTERS}, these layers have {number}: "
            "choose fewer, or another criterion"
        )
    if not batches:
        raise UserError("the oracle needs at least one batch, got none")


def _loss(passes: TrainingPasses, batches: Sequence[Any]) -> float:
    with preserved_random_state():
        total = sum(passes.loss(batch).double() for batch in batches) / len(batches)
    loss = mean_over_ranks(total.detach()).item()
    return loss if np.isfinite(loss) else float("inf")


def _remove(layer: FilterLayer, index: int) -> None:
    zero_rows_(layer.tensors().values(), torch.tensor([index], device=layer.weight.device))


@contextmanager
def _kept_values(layers: Sequence[FilterLayer]) -> Iterator[None]:
    tensors = [tensor for layer in layers for tensor in layer.tensors().values()]
    values = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
