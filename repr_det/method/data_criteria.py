"""Criteria that look at training batches: what a channel puts out, and whether the loss depends on a filter.

Shape shorthand:
    J: filters of a layer        N: examples of a batch (images; proposals in a head that runs on them)
    P: positions of the output, H * W

A criterion takes ``(layers, passes, num_batches, cycle)`` and returns layer name -> (J,) float32, the largest dropped
first, averaged over the ranks. A layer that runs several times in a pass counts all its positions; one that never runs
scores 0 with a warning.

Gradients come from ``torch.autograd.grad``: neither ``.grad`` nor DistributedDataParallel's reducer notices.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from repr_det.method.distributed import mean_over_ranks, to_cpu
from repr_det.method.layers import FilterLayer
from repr_det.method.passes import TrainingPasses
from repr_det.network.state import undisturbed

Scores = dict[str, Tensor]
logger = logging.getLogger("repr_det.data_criteria")


def share_of_zeros(layers: Sequence[FilterLayer], passes: TrainingPasses, num_batches: int, cycle: int) -> Scores:
    """APoZ: the share of outputs that a ReLU makes 0 (Hu et al. 2016, arXiv 1607.03250)."""
    means = output_means(layers, passes, num_batches, cycle, lambda output: output <= 0)
    return finished(layers, "apoz", means)


def use_of_filters(
    layers: Sequence[FilterLayer], passes: TrainingPasses, num_batches: int, cycle: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> (J,) bool and (J,), on the CPU: whether a filter is idle, and its threshold.

    A filter is idle if it puts out nothing above 0 and gets no gradient, on any rank, while others of its layer do.
    Where none of them does there may have been no example for the layer. The threshold is mean over standard deviation
    of the channel before its activation.
    """
    counts: dict[str, float] = {}
    sums: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}

    def see(layer: FilterLayer, output: Tensor) -> None:
        values = positions(output.detach())
        number = values.shape[0] * values.shape[2]
        if not number:
            return
        found = torch.stack([_sum(values), _sum(values, squared=True), values.amax((0, 2)).float()])
        before = sums.get(layer.name)
        if before is not None:
            found = torch.cat([before[:2] + found[:2], torch.maximum(before[2:], found[2:])])
        sums[layer.name] = found
        counts[layer.name] = counts.get(layer.name, 0) + number

    def on_loss(loss: Tensor) -> None:
        weights = [layer.weight for layer in layers]
        for layer, gradient in zip(layers, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
            if gradient is not None:
                largest = gradient.flatten(1).abs().amax(1).float()
                before = gradients.get(layer.name)
                gradients[layer.name] = largest if before is None else torch.maximum(before, largest)

    with on_output(layers, see):
        run_batches(passes, num_batches, cycle, on_loss, gradients=True)
    reached = [layer.name for layer in layers if layer.name in sums and layer.name in gradients]
    found = to_cpu([sums[name] for name in reached] + [gradients[name] for name in reached])
    used, thresholds = {}, {}
    for name, (total, squares, largest), gradient in zip(reached, found, found[len(reached) :], strict=False):
        mean = total.double() / counts[name]
        deviation = (squares.double() / counts[name] - mean.square()).clamp_min(0).sqrt()
        thresholds[name] = mean / deviation.clamp_min(1e-12)
        used[name] = ((largest > 0) | (gradient > 0)).double() if gradient.any() else torch.ones_like(mean)
    in_use = finished(layers, "redundant", {x.name: torch.ones(x.num_filters) for x in layers} | used)
    zero = {layer.name: torch.zeros(layer.num_filters) for layer in layers}
    threshold = finished(layers, "redundant", zero | thresholds)
    return {layer.name: (in_use[layer.name] == 0, threshold[layer.name]) for layer in layers}


def _sum(values: Tensor, squared: bool = False) -> Tensor:
    """(N, J, P) -> (J,) float32, one image at a time."""
    each = [image.float().square() if squared else image.float() for image in values]
    return torch.stack([image.sum(1) for image in each]).sum(0)


def output_means(
    layers: Sequence[FilterLayer],
    passes: TrainingPasses,
    num_batches: int,
    cycle: int,
    of: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Layer name -> (J,), the mean of ``of(output)`` over images and positions; layers that did not run are missing."""
    total: dict[str, Tensor] = {}
    count: dict[str, int] = {}

    def see(layer: FilterLayer, output: Tensor) -> None:
        values = positions(of(output.detach()))
        if number := values.shape[0] * values.shape[2]:
            total[layer.name] = total.get(layer.name, 0) + _sum(values)
            count[layer.name] = count.get(layer.name, 0) + number

    with on_output(layers, see):
        run_batches(passes, num_batches, cycle, lambda loss: None, gradients=False)
    return {name: total[name] / count[name] for name in total}


def run_batches(
    passes: TrainingPasses, num_batches: int, cycle: int, on_loss: Callable[[Tensor], None], gradients: bool
) -> None:
    """Calls ``on_loss`` with the loss of every batch; ``gradients`` says whether it can be differentiated."""
    with undisturbed(passes.model, True, passes.trains), torch.set_grad_enabled(gradients):
        for batch in passes.batches(num_batches, cycle):
            on_loss(passes.loss(batch))


def positions(output: Tensor) -> Tensor:
    """(N, J, H, W) -> (N, J, P); a single image without N too."""
    return (output if output.dim() > 3 else output[None]).flatten(2)


@contextmanager
def on_output(layers: Sequence[FilterLayer], see: Callable[[FilterLayer, Tensor], None]) -> Iterator[None]:
    """Calls ``see`` with every layer and what its channels put out, whenever it runs."""
    handles = []
    for layer in layers:

        def hook(module: nn.Module, inputs: tuple, output: Tensor, layer: FilterLayer = layer) -> None:
            see(layer, output)

        handles.append(layer.output_module().register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def finished(layers: Sequence[FilterLayer], criterion: str, found: dict[str, Tensor]) -> Scores:
    """The scores of all layers, averaged over the ranks in one collective call."""
    missing = [layer.name for layer in layers if layer.name not in found]
    if missing:
        logger.warning(
            "RePr criterion %s: %s took no part in the training batches that it looked at; their filters score 0",
            criterion,
            ", ".join(missing),
        )
    zero = {layer.name: torch.zeros(layer.num_filters) for layer in layers}
    parts = to_cpu([found.get(name, zero[name]) for name in zero])
    joined = mean_over_ranks(torch.cat([part.double() for part in parts]), layers[0].weight.device)
    joined = torch.where(torch.isfinite(joined), joined, 0).float()
    return dict(zip(zero, joined.split([layer.num_filters for layer in layers]), strict=True))
