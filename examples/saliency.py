"""Criteria of other papers, for ``RePr(..., criterion=SALIENCY["taylor"], loader=..., loss=...)``.

They are what the paper compares O_f with in its table of criteria; nothing that was measured recommends one of them.

Shape shorthand:
    J: filters of a layer

Every function takes ``(layers, context)`` and returns layer name -> (J,), the largest dropped first, averaged over the
ranks. Layers are not normalised against each other.
"""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from repr_det import FilterLayer
from repr_det.method.criteria import (
    Context,
    Criterion,
    Scores,
    finished,
    gradients_of,
    on_output,
    output_means,
    positions,
    run_batches,
)


def mean_activation(layers: Sequence[FilterLayer], context: Context) -> Scores:
    """Minus the mean output behind a ReLU, over images and positions."""
    means = output_means(layers, context, lambda output: output.relu())
    return _smallest_first(layers, "mean_activation", means)


def gradient(layers: Sequence[FilterLayer], context: Context) -> Scores:
    """Minus the mean |d loss / d w| over the weights of the filter and over batches, with the loss of a whole batch."""
    means = _gradient_means(
        layers, context, lambda x: [x.weight], lambda grad, _: grad.float().abs().flatten(1).mean(1)
    )
    return _smallest_first(layers, "gradient", means)


def hessian(layers: Sequence[FilterLayer], context: Context) -> Scores:
    """Minus the loss that removing the filter would cost to second order, 0.5 sum w^2 E[g^2].

    The sum goes over all trainable parameters of the filter (conv row, bias, norm). The Hessian is taken as diagonal
    and as the empirical Fisher information, with g the gradient of a whole batch, not of one example: E[g^2] is then
    smaller than with single examples by about the batch size, the same factor for all filters.
    """
    means = _gradient_means(
        layers,
        context,
        lambda x: [p for p in x.parameters() if p.requires_grad],
        lambda grad, value: 0.5 * (grad.float() * value.detach()).square().reshape(len(grad), -1).sum(1),
    )
    return _smallest_first(layers, "hessian", means)


def taylor(layers: Sequence[FilterLayer], context: Context) -> Scores:
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
            values = positions(F.relu(value) * gradient)
            calls.setdefault(layer.name, []).append((values.float().sum(2), values.shape[2]))

        # A hook on the tensor sees the gradient of its value now, also where a ReLU overwrites it later.
        output.register_hook(product)

    def on_loss(loss: Tensor) -> None:
        gradients_of(loss, [layer.weight for layer in layers])
        for name, parts in calls.items():
            # The calls of one pass see the same images, unless a head ran on different numbers of proposals.
            if len({len(sums) for sums, _ in parts}) == 1:
                parts = [(sum(sums for sums, _ in parts), sum(number for _, number in parts))]
            for sums, number in parts:
                if number:
                    total[name] = total.get(name, 0) + (sums / number).abs().sum(0)
                    count[name] = count.get(name, 0) + len(sums)
        calls.clear()

    with on_output(layers, see):
        run_batches(context, on_loss, gradients=True)
    return _smallest_first(layers, "taylor", {name: total[name] / n for name, n in count.items()})


def _gradient_means(
    layers: Sequence[FilterLayer],
    context: Context,
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
        for (name, value), gradient in zip(owned, gradients_of(loss, [p for _, p in owned]), strict=True):
            if gradient is not None:
                total[name] = total.get(name, 0) + of(gradient, value).float()

    run_batches(context, on_loss, gradients=True)
    return {name: value / batches for name, value in total.items()}


def _smallest_first(layers: Sequence[FilterLayer], name: str, found: dict[str, Tensor]) -> Scores:
    return finished(layers, name, {layer: -value for layer, value in found.items()})


SALIENCY = {
    "mean_activation": Criterion(mean_activation, needs_data=True),
    "gradient": Criterion(gradient, needs_data=True),
    "taylor": Criterion(taylor, needs_data=True),
    "hessian": Criterion(hessian, needs_data=True),
}
