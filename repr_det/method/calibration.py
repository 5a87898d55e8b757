"""Norm statistics for re-initialised channels of convs behind FrozenBN, or behind BN in eval mode.

Such a norm never adapts, so a new filter behind it would be normalised with the statistics of the filter that is gone.
At the drop the moments of a channel after the norm are measured; at the restore its running mean and variance are set
so that the new channel has the same moments after the norm, on the same batches, layer by layer as the data flows. A
channel whose ReLU never opens would be as closed again: it gets the median moments of those of its layer that open.
"""

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from repr_det.method.distributed import mean_over_ranks
from repr_det.method.layers import FilterLayer
from repr_det.method.passes import TrainingPasses, undisturbed

# A channel whose standard deviation is below this share of its largest value is constant: it has no scale to match.
_CONSTANT = 1e-6


def measure_moments(
    layers: list[FilterLayer],
    rows: dict[str, Tensor],
    passes: TrainingPasses,
    num_batches: int,
    cycle: int,
    rectified: Container[FilterLayer] = (),
) -> dict[str, Tensor]:
    """The moments that channels are to have when they return: mean and standard deviation after the norm, over images
    and positions of all batches and ranks.

    Args:
        layers: those whose ``is_frozen``.
        rows: layer name -> (M,) channels that are to return.
        rectified: layers behind whose norm there is a ReLU and nothing else. A channel of theirs that is nowhere above
            0 is given the median, over the channels that are, of the means and of the deviations.

    Returns:
        layer name -> (2, M) float64 on the CPU: mean, standard deviation. Layers that the forward pass did not reach
        are missing.
    """
    moments: dict[str, Tensor] = {}

    def measure(layer: FilterLayer, output: Tensor) -> None:
        index = rows[layer.name]
        found = _moments(output[:, index]).cpu()
        if layer in rectified:
            opens = mean_over_ranks((output > 0).any(0).flatten(1).any(1).double()) > 0
            if opens.any() and not opens[index].all():
                typical = _moments(output[:, opens]).cpu().median(1, keepdim=True).values
                found = torch.where(opens[index].cpu(), found, typical)
        moments[layer.name] = found

    with undisturbed(passes.model, own_modes=True), _on_norm(layers, after=measure):
        _run_joined(passes, num_batches, cycle)
    return moments


def match_moments(
    layers: list[FilterLayer],
    rows: dict[str, Tensor],
    wanted: dict[str, Tensor],
    passes: TrainingPasses,
    num_batches: int,
    cycle: int,
) -> None:
    """Sets running mean and variance of ``rows`` so that their moments after the norm are ``wanted``, in one pass.

    With x the conv's output, w and b the frozen weight and bias: (x - m) / sqrt(v + eps) * w + b has standard deviation
    s where sqrt(v + eps) = |w| std(x) / s and mean mu where m = mean(x) - (mu - b) sqrt(v + eps) / w. Where w, s or
    std(x) is zero no scale can be matched: such a channel is normalised to zero mean and unit variance before w and b.
    """
    chosen: dict[str, tuple[Tensor, Tensor]] = {}

    def match(layer: FilterLayer, conv_output: Tensor) -> None:
        index = rows[layer.name]
        norm = layer.norm
        mean, std = _moments(conv_output[:, index])
        target_mean, target_std = wanted[layer.name].to(mean)
        weight = norm.weight[index].to(mean)
        bias = torch.zeros_like(mean) if norm.bias is None else norm.bias[index].to(mean)
        scale_free = (weight.abs() < 1e-12) | (target_std <= _CONSTANT * (1 + target_mean.abs())) | (std <= 0)
        sigma = torch.where(scale_free, std.clamp_min(1e-3), weight.abs() * std / target_std.clamp_min(1e-30))
        # The variance is stored, not sigma: eps bounds how small it can be.
        variance = (sigma**2 - norm.eps).clamp_min(0)
        sigma = (variance + norm.eps).sqrt()
        shift = torch.where(scale_free, 0, (target_mean - bias) * sigma / torch.where(scale_free, 1, weight))
        norm.running_mean[index] = (mean - shift).to(norm.running_mean)
        norm.running_var[index] = variance.to(norm.running_var)
        chosen[layer.name] = (norm.running_mean[index].clone(), norm.running_var[index].clone())

    matched = [layer for layer in layers if layer.name in wanted]
    with undisturbed(passes.model, own_modes=True), _on_norm(matched, before=match):
        _run_joined(passes, num_batches, cycle)
    with torch.no_grad():
        for layer in matched:
            if layer.name in chosen:
                layer.norm.running_mean[rows[layer.name]], layer.norm.running_var[rows[layer.name]] = chosen[layer.name]


class _AllReached(Exception):
    """Ends a forward pass: what follows the last layer that is looked at (FPN, heads, loss) need not be computed."""


def _run_joined(passes: TrainingPasses, num_batches: int, cycle: int) -> None:
    # One pass over all batches: later layers then see every batch through earlier ones that are already matched.
    with torch.no_grad(), suppress(_AllReached):
        passes.loss(passes.join(list(passes.batches(num_batches, cycle))))


def _moments(channels: Tensor) -> Tensor:
    """(N, M, H, W) -> (2, M) float64: mean and standard deviation over images, positions and ranks."""
    values = channels.transpose(0, 1).flatten(1).double()
    first = mean_over_ranks(values.mean(1))
    second = mean_over_ranks(((values - first[:, None]) ** 2).mean(1))
    return torch.stack([first, second.sqrt()])


@contextmanager
def _on_norm(
    layers: list[FilterLayer],
    before: Callable[[FilterLayer, Tensor], None] | None = None,
    after: Callable[[FilterLayer, Tensor], None] | None = None,
) -> Iterator[None]:
    """Calls ``before`` or ``after`` at the first call of each layer's norm, and ends the pass at the last one."""
    left = {layer.name for layer in layers}

    def look(layer: FilterLayer, function: Callable[[FilterLayer, Tensor], None], values: Tensor) -> None:
        if layer.name in left:
            left.remove(layer.name)
            function(layer, values)
            if not left:
                raise _AllReached

    handles = []
    for layer in layers:
        if before is not None:

            def pre(module: nn.Module, inputs: tuple, layer: FilterLayer = layer) -> None:
                look(layer, before, inputs[0])

            handles.append(layer.norm.register_forward_pre_hook(pre))
        if after is not None:

            def post(module: nn.Module, inputs: tuple, output: Tensor, layer: FilterLayer = layer) -> None:
                look(layer, after, output)

            handles.append(layer.norm.register_forward_hook(post))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
