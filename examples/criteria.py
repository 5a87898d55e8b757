"""A criterion of one's own for ``RePr(..., criterion=oracle)``: the oracle, by trying every filter (section 4).

For small networks: it removes each filter and looks at the loss, ``passes.loss`` averaged over batches and ranks, in
training mode and with the same random numbers every time. The paper's oracle looks at held-out images: give batches of
such images. A removed filter is zero in all its tensors; afterwards every value is as before.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from repr_det import FilterLayer
from repr_det.method.criteria import Context
from repr_det.method.distributed import mean_over_ranks
from repr_det.method.passes import TrainingPasses
from repr_det.network.state import preserved_random_state, undisturbed


def oracle(layer: FilterLayer, context: Context) -> Tensor:
    """A criterion, (J,): the filter whose removal hurts least comes first."""
    batches = list(context.passes.batches(context.num_batches, context.cycle))
    return -ablation(layer, context.passes, batches)


@torch.no_grad()
def ablation(layer: FilterLayer, passes: TrainingPasses, batches: Sequence[Any]) -> Tensor:
    """The increase of the loss when a filter alone is removed, (J,) float64: J + 1 passes over all batches."""
    with undisturbed(passes.model, own_modes=True):
        whole = _loss(passes, batches)
        losses = [_loss_without(layer, index, passes, batches) for index in range(layer.num_filters)]
    return torch.nan_to_num(torch.tensor(losses, dtype=torch.float64) - whole)


def _loss_without(layer: FilterLayer, index: int, passes: TrainingPasses, batches: Sequence[Any]) -> float:
    tensors = list(layer.tensors().values())
    values = [tensor[index].clone() for tensor in tensors]
    for tensor in tensors:
        tensor[index] = 0
    loss = _loss(passes, batches)
    for tensor, value in zip(tensors, values, strict=True):
        tensor[index] = value
    return loss


def _loss(passes: TrainingPasses, batches: Sequence[Any]) -> float:
    with preserved_random_state():
        total = sum(passes.loss(batch).double() for batch in batches) / len(batches)
    return mean_over_ranks(total.detach()).nan_to_num(torch.inf).item()
