"""Criteria that look at training batches: what a channel puts out, and how the loss depends on a filter.

Shape shorthand:
    J: filters of a layer        N: examples of a batch (images; proposals in a head that runs on them)
    P: positions of the output, H * W

Every function takes ``(layers, passes, num_batches, cycle)`` and returns layer name -> (J,) float32, the largest
dropped first, averaged over the ranks. The output of a channel is what ``FilterLayer.output_module`` puts out, with a
ReLU on a copy: in Detectron2's blocks the ReLU comes later and in place, and behind the last conv of a block only after
the shortcut is added. A layer that runs several times in one forward pass (a RetinaNet head, over the levels) counts
all its positions; one that never runs scores 0 with a warning. A score that is not finite counts as 0.

Training is left undisturbed (``passes.undisturbed``), and gradients come from ``torch.autograd.grad``, so that neither
``.grad`` nor DistributedDataParallel's reducer notices. Layers are not normalised against each other.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repr_det.method.distributed import mean_over_ranks, to_cpu
from repr_det.method.layers import FilterLayer
from repr_det.method.passes import TrainingPasses
from repr_det.network.state import undisturbed

Scores = dict[str, Tensor]
logger = logging.getLogger("repr_det.data_criteria")


def low_activation(layers: Sequence[FilterLayer], passes: TrainingPasses, num_batches: int, cycle: int) -> Scores:
    """Minus the mean output over images and positions."""
    means = _output_means(layers, passes, num_batches, cycle, lambda output: output.relu())
    return _finished(layers, "mean_activation", {name: -mean for name, mean in means.items()})


def share_of_zeros(layers: Sequence[FilterLayer], passes: TrainingPasses, num_batches: int, cycle: int) -> Scores:
    """APoZ: the share of zeros in the output over images and positions (Hu et al. 2016, arXiv 1607.03250)."""
    means = _output_means(layers, passes, num_batches, cycle, lambda output: output <= 0)
    return _finished(layers, "apoz", means)


def use_of_filters(
    layers: Sequence[FilterLayer], passes: TrainingPasses, num_batches: int, cycle: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> (J,) bool and (J,), on the CPU: whether a filter is idle, and its threshold.

    A filter is idle if it puts out nothing above 0 and gets no gradient, on any rank, while others of its layer do: one
    behind a ReLU that never opens. Where a whole layer gets no gradient there may have been no example for it, and no
    filter of it is idle. The threshold is mean over standard deviation of the channel before its activation.
    """
    counts: dict[str, float] = {}
    sums: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}

    def see(layer: FilterLayer, output: Tensor) -> None:
        values = _positions(output.detach())
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
        for layer, gradient in zip(layers, _gradients(loss, [layer.weight for layer in layers]), strict=True):
            if gradient is not None:
                largest = gradient.flatten(1).abs().amax(1).float()
                before = gradients.get(layer.name)
                gradients[layer.name] = largest if before is None else torch.maximum(before, largest)

    with _on_output(layers, see):
        _run(passes, num_batches, cycle, on_loss, gradients=True)
    reached = [layer.name for layer in layers if layer.name in sums and layer.name in gradients]
    found = to_cpu([sums[name] for name in reached] + [gradients[name] for name in reached])
    used, thresholds = {}, {}
    for name, (total, squares, largest), gradient in zip(reached, found, found[len(reached) :], strict=False):
        mean = total.double() / counts[name]
        deviation = (squares.double() / counts[name] - mean.square()).clamp_min(0).sqrt()
        thresholds[name] = mean / deviation.clamp_min(1e-12)
        used[name] = ((largest > 0) | (gradient > 0)).double() if gradient.any() else torch.ones_like(mean)
    in_use = _finished(layers, "redundant", {x.name: torch.ones(x.num_filters) for x in layers} | used)
    zero = {layer.name: torch.zeros(layer.num_filters) for layer in layers}
    threshold = _finished(layers, "redundant", zero | thresholds)
    return {layer.name: (in_use[layer.name] == 0, threshold[layer.name]) for layer in layers}


def _sum(values: Tensor, squared: bool = False) -> Tensor:
    """(N, J, P) -> (J,) float32, one image at a time."""
    each = [image.float().square() if squared else image.float() for image in values]
    return torch.stack([image.sum(1) for image in each]).sum(0)


def small_gradient(layers: Sequence[FilterLayer], passes: TrainingPasses, num_batches: int, cycle: int) -> Scores:
    """Minus the mean |d loss / d w| over the weights of the filter and over batches, with the loss of a whole batch."""
    means = _gradient_means(
        layers, passes, num_batches, cycle, lambda x: [x.weight], lambda grad, _: grad.float().abs().flatten(1).mean(1)
    )
    return _finished(layers, "gradient", {name: -mean for name, mean in means.items()})


def small_fisher(layers: Sequence[FilterLayer], passes: TrainingPasses, num_batches: int, cycle: int) -> Scores:
    """Minus the loss that removing the filter would cost to second order, 0.5 sum w^2 E[g^2].

    The sum goes over all trainable parameters of the filter (conv row, bias, norm). The Hessian is taken as diagonal
    and as the empirical Fisher information, with g the gradient of a whole batch, not of one example: E[g^2] is then
    smaller than with single examples by about the batch size, the same factor for all filters.
    """
    means = _gradient_means(
        layers,
        passes,
        num_batches,
        cycle,
        lambda x: [p for p in x.parameters() if p.requires_grad],
        lambda grad, value: 0.5 * (grad.float() * value.detach()).square().reshape(len(grad), -1).sum(1),
    )
    return _finished(layers, "hessian", {name: -mean for name, mean in means.items()})


def small_taylor(layers: Sequence[FilterLayer], passes: TrainingPasses, num_batches: int, cycle: int) -> Scores:
    """Minus |output x d loss / d output|: averaged over the positions of an example, absolute, averaged over examples
    (Molchanov et al. 2017, arXiv 1611.06440, eq. 8, without their l2 normalisation of layers, eq. 11)."""
    total: dict[str, Tensor] = {}
    count: dict[str, int] = {}
    calls: dict[str, list[tuple[Tensor, int]]] = {}

    def see(layer: FilterLayer, output: Tensor) -> None:
        if not output.requires_grad:
            return
        # Behind a ReLU in place the tensor holds the activation by then; elsewhere it may hold anything: a copy does.
        value = output.detach() if layer.rectified else F.relu(output.detach())

        def product(gradient: Tensor) -> None:
            values = _positions(F.relu(value) * gradient)
            calls.setdefault(layer.name, []).append((values.float().sum(2), values.shape[2]))

        # A hook on the tensor sees the gradient of its value now, also where a ReLU overwrites it later.
        output.register_hook(product)

    def on_loss(loss: Tensor) -> None:
        _gradients(loss, [layer.weight for layer in layers])
        for name, parts in calls.items():
            # The calls of one pass see the same images, unless a head ran on different numbers of proposals.
            if len({len(sums) for sums, _ in parts}) == 1:
                parts = [(sum(sums for sums, _ in parts), sum(positions for _, positions in parts))]
            for sums, positions in parts:
                if positions:
                    total[name] = total.get(name, 0) + (sums / positions).abs().sum(0)
                    count[name] = count.get(name, 0) + len(sums)
        calls.clear()

    with _on_output(layers, see):
        _run(passes, num_batches, cycle, on_loss, gradients=True)
    return _finished(layers, "taylor", {name: -total[name] / n for name, n in count.items()})


def _output_means(
    layers: Sequence[FilterLayer],
    passes: TrainingPasses,
    num_batches: int,
    cycle: int,
    of: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Mean of ``of(output)`` over images and positions, (J,); layers that did not run are missing."""
    total: dict[str, Tensor] = {}
    count: dict[str, int] = {}

    def see(layer: FilterLayer, output: Tensor) -> None:
        values = _positions(of(output.detach()))
        if number := values.shape[0] * values.shape[2]:
            total[layer.name] = total.get(layer.name, 0) + _sum(values)
            count[layer.name] = count.get(layer.name, 0) + number

    with _on_output(layers, see):
        _run(passes, num_batches, cycle, lambda loss: None, gradients=False)
    return {name: total[name] / count[name] for name in total}


def _gradient_means(
    layers: Sequence[FilterLayer],
    passes: TrainingPasses,
    num_batches: int,
    cycle: int,
    parameters_of: Callable[[FilterLayer], list[Tensor]],
    of: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Mean over batches of ``of(gradient, value)`` -> (J,), summed over the parameters of a layer."""
    owned = [(layer.name, parameter) for layer in layers for parameter in parameters_of(layer)]
    total: dict[str, Tensor] = {}
    batches = 0

    def on_loss(loss: Tensor) -> None:
        nonlocal batches
        batches += 1
        for (name, value), gradient in zip(owned, _gradients(loss, [p for _, p in owned]), strict=True):
            if gradient is not None:
                total[name] = total.get(name, 0) + of(gradient, value).float()

    _run(passes, num_batches, cycle, on_loss, gradients=True)
    return {name: value / batches for name, value in total.items()}


def _gradients(loss: Tensor, parameters: list[Tensor]) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(loss, parameters, allow_unused=True)


def _run(
    passes: TrainingPasses, num_batches: int, cycle: int, on_loss: Callable[[Tensor], None], gradients: bool
) -> None:
    with undisturbed(passes.model, True, passes.trains), torch.set_grad_enabled(gradients):
        for batch in passes.batches(num_batches, cycle):
            on_loss(passes.loss(batch))


def _positions(output: Tensor) -> Tensor:
    """(N, J, H, W) -> (N, J, P); a single image without N too."""
    return (output if output.dim() > 3 else output[None]).flatten(2)


@contextmanager
def _on_output(layers: Sequence[FilterLayer], see: Callable[[FilterLayer, Tensor], None]) -> Iterator[None]:
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


def _finished(layers: Sequence[FilterLayer], criterion: str, found: dict[str, Tensor]) -> Scores:
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
