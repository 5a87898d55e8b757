"""Norm statistics for re-initialised channels of convs behind FrozenBN, or behind BN in eval mode.

Such a norm never adapts, so a new filter behind it would be normalised with the statistics of the filter that is gone.
At the drop the moments of a channel after the norm are measured; at the restore its running mean and variance are set
so that the new channel has the same moments after the norm, on the same batches, layer by layer as the data flows. A
channel whose ReLU never opens would be as closed again: it gets the median moments of those of its layer that open.

All is found from what goes into the norm, y = (x - m) / sqrt(v + eps) * w + b, in single precision, one image at a
time.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from repr_det.method.distributed import broadcast_, mean_over_ranks, to_cpu
from repr_det.method.errors import OptionError
from repr_det.method.holding import HeldFilters
from repr_det.method.layers import BATCH, FROZEN, FilterLayer
from repr_det.method.options import RePrOptions
from repr_det.method.participants import Participants
from repr_det.method.passes import TrainingPasses
from repr_det.network.state import undisturbed

logger = logging.getLogger("repr_det.scheme")

# A channel whose standard deviation is below this share of its largest value is constant: it has no scale to match.
_CONSTANT = 1e-6


class FrozenNorms:
    """The norms that keep their statistics while their convs train: FrozenBN, and BN in eval mode.

    Args:
        model: not wrapped; None where ``RePrScheme`` was built without it.
        passes: how to run training batches; None if there is none.

    Attributes:
        at_drop: names of the layers whose norm was frozen at the last drop, until their filters return.
    """

    def __init__(
        self, options: RePrOptions, participants: Participants, model: nn.Module | None, passes: TrainingPasses | None
    ) -> None:
        self.at_drop: set[str] = set()
        self._recalibrates = options.frozen_norm == "recalibrate"
        self._participants = participants
        self._model = model if passes is None else passes.model
        self._passes = passes
        self._batches = options.calibration_batches or (0 if passes is None else passes.calibration_batches)

    def of(self, layers: Sequence[FilterLayer]) -> list[FilterLayer]:
        """The layers whose norm keeps its statistics in training, also where the caller is evaluating now."""
        trains = self._participants.trains if self._passes is None else self._passes.trains
        if self._model is None or self._model.training == trains:
            return [layer for layer in layers if layer.is_frozen]
        with undisturbed(self._model, trains=trains):
            return [layer for layer in layers if layer.is_frozen]

    def need_batches(self, layers: Sequence[FilterLayer]) -> bool:
        """Tells whether new filters of these layers need statistics that training batches show."""
        return self._recalibrates and bool(self.of(layers))

    def check(self, layers: Sequence[FilterLayer]) -> None:
        """Raises OptionError where batches are needed and there are none."""
        if self._passes is None and self.need_batches(layers):
            first = self.of(layers)[0]
            kind = "FrozenBN" if first.kind == FROZEN else "BN in eval mode"
            raise OptionError(
                f"{kind} re-calibration looks at training batches (the norm of {first.name} keeps its statistics): "
                "give loader= and loss=, or passes=, or choose {frozen_norm} keep"
            )

    def before_drop(self, held: HeldFilters, layers: Sequence[FilterLayer], cycle: int) -> dict[str, Tensor]:
        """Notes which norms of ``layers`` are frozen. Returns the moments of the channels that leave, on the CPU."""
        frozen = self.of(layers)
        self.at_drop = {layer.name for layer in frozen}
        leaving = [layer for layer in held.layers if layer.name in self.at_drop]
        if not leaving or self._passes is None or not self._recalibrates:
            return {}
        found = measure_moments(leaving, held.rows, self._passes, self._batches, cycle)
        return dict(zip(found, to_cpu(list(found.values())), strict=True))

    def can_renew(self, layers: Sequence[FilterLayer]) -> list[FilterLayer]:
        """The layers whose new filters would get statistics of their own. A norm frozen since the drop has lost those
        of the channel; without training batches it is not known what others would be right."""
        lost = [] if self._passes is not None and self._recalibrates else self.of(layers)
        lost = [layer for layer in lost if layer.name not in self.at_drop]
        for layer in lost:
            logger.warning(
                "RePr: filters of %s return as they were: its norm has been frozen since the drop, and there are no "
                "training batches to find the statistics of new ones",
                layer.name,
            )
        return [layer for layer in layers if layer not in lost]

    def after_return(
        self, held: HeldFilters, renewed: Sequence[FilterLayer], moments: Mapping[str, Tensor], cycle: int
    ) -> None:
        """Sets the statistics of new filters so that their channels have ``moments``."""
        wanted = {layer.name: moments[layer.name] for layer in renewed if layer.name in moments}
        for layer in self.of(renewed) if self._recalibrates else ():
            if layer.kind == BATCH and layer.name not in wanted:
                # Frozen since the drop: what BN would do in training, mean 0 and deviation 1.
                number = len(held.rows[layer.name])
                wanted[layer.name] = torch.stack([torch.zeros(number), torch.ones(number)])
        if not wanted or self._passes is None:
            return
        layers = [layer for layer in renewed if layer.name in wanted]
        match_moments(layers, held.rows, wanted, self._passes, self._batches, cycle)
        statistics = [tensor for layer in layers for tensor in layer.running_statistics().values()]
        broadcast_(statistics, layers[0].weight.device)


def measure_moments(
    layers: Sequence[FilterLayer], rows: dict[str, Tensor], passes: TrainingPasses, num_batches: int, cycle: int
) -> dict[str, Tensor]:
    """The moments that channels are to have when they return: mean and standard deviation after the norm, over images
    and positions of all batches and ranks.

    Args:
        layers: those whose ``is_frozen``.
        rows: layer name -> (M,) channels that are to return.

    Returns:
        layer name -> (2, M) float32 on its device: mean, standard deviation. Layers that the forward pass did not reach
        are missing. A channel of a rectified layer that is nowhere above 0 has the median, over the channels that are,
        of the means and of the deviations.
    """
    moments: dict[str, Tensor] = {}

    def measure(layer: FilterLayer, values: Tensor) -> None:
        index = rows[layer.name]
        gain, shift = _affine(layer)
        mean, std = _moments(values)
        after = torch.stack([mean * gain + shift, std * gain.abs()])
        found = after[:, index]
        if layer.rectified:
            ends = torch.where(gain > 0, values.amax((0, 2, 3)), values.amin((0, 2, 3)))
            largest = ends.float() * gain + shift
            opens = mean_over_ranks((largest > 0).float()) > 0
            # CUDA has no deterministic median.
            middle = ((opens.sum() - 1) // 2).clamp_min(0)
            typical = torch.where(opens, after, torch.inf).sort(1).values.index_select(1, middle[None])
            closed = ~opens[index] & typical[0].isfinite()
            found = torch.where(closed, typical, found)
        moments[layer.name] = found

    with undisturbed(passes.model, True, passes.trains), _into_norms(layers, measure):
        _run_joined(passes, num_batches, cycle)
    return moments


def match_moments(
    layers: Sequence[FilterLayer],
    rows: dict[str, Tensor],
    wanted: dict[str, Tensor],
    passes: TrainingPasses,
    num_batches: int,
    cycle: int,
) -> None:
    """Sets running mean and variance of ``rows`` so that their moments after the norm are ``wanted``, in one pass.

    With w and b the frozen weight and bias the channel has standard deviation s where sqrt(v + eps) = |w| std(x) / s,
    and mean mu where m = mean(x) - (mu - b) sqrt(v + eps) / w. Where w, s or std(x) is zero no scale can be matched:
    such a channel is normalised to zero mean and unit variance before w and b.
    """
    chosen: dict[str, tuple[Tensor, Tensor]] = {}

    def match(layer: FilterLayer, values: Tensor) -> None:
        index = rows[layer.name]
        norm, eps = layer.norm, epsilon(layer.norm)
        mean, std = (part[index] for part in _moments(values))
        target_mean, target_std = wanted[layer.name].to(mean)
        weight = norm.weight[index].to(mean)
        bias = torch.zeros_like(mean) if norm.bias is None else norm.bias[index].to(mean)
        scale_free = (weight.abs() < 1e-12) | (target_std <= _CONSTANT * (1 + target_mean.abs())) | (std <= 0)
        sigma = torch.where(scale_free, std.clamp_min(1e-3), weight.abs() * std / target_std.clamp_min(1e-30))
        # The variance is stored, not sigma: eps bounds how small it can be.
        variance = (sigma**2 - eps).clamp_min(0)
        sigma = (variance + eps).sqrt()
        shift = torch.where(scale_free, 0, (target_mean - bias) * sigma / torch.where(scale_free, 1, weight))
        norm.running_mean.index_copy_(0, index, (mean - shift).to(norm.running_mean))
        norm.running_var.index_copy_(0, index, variance.to(norm.running_var))
        chosen[layer.name] = (norm.running_mean[index].clone(), norm.running_var[index].clone())

    matched = [layer for layer in layers if layer.name in wanted]
    with undisturbed(passes.model, True, passes.trains), _into_norms(matched, match):
        _run_joined(passes, num_batches, cycle)
    with torch.no_grad():
        for layer in matched:
            if layer.name in chosen:
                mean, variance = chosen[layer.name]
                layer.norm.running_mean.index_copy_(0, rows[layer.name], mean)
                layer.norm.running_var.index_copy_(0, rows[layer.name], variance)


def epsilon(norm: nn.Module) -> float:
    """Finds the number that a norm adds to the variance: by its output for ones at a variance of 0, unless it tells."""
    known = getattr(norm, "eps", None)
    if isinstance(known, float):
        return known
    probe = copy.deepcopy(norm).cpu().double().eval()
    with torch.no_grad():
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 0)):
            if getattr(probe, name) is not None:
                getattr(probe, name).fill_(value)
        gain = probe(torch.ones(1, len(probe.weight), 1, 1, dtype=torch.float64)).flatten()[0].item()
    return 1 / gain**2


class _AllReached(Exception):
    """Ends a forward pass: what follows the last layer that is looked at (FPN, heads, loss) need not be computed."""


def _run_joined(passes: TrainingPasses, num_batches: int, cycle: int) -> None:
    # One pass over all batches: later layers then see every batch through earlier ones that are already matched.
    with torch.no_grad(), suppress(_AllReached):
        passes.loss(passes.join(list(passes.batches(num_batches, cycle))))


def _affine(layer: FilterLayer) -> tuple[Tensor, Tensor]:
    """Gain and shift (J,) of a frozen norm."""
    norm = layer.norm
    gain = norm.weight.float() / (norm.running_var.float() + epsilon(norm)).sqrt()
    shift = -norm.running_mean.float() * gain
    return gain, shift if norm.bias is None else shift + norm.bias.float()


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """(N, J, H, W) -> mean and standard deviation, each (J,) float32, over images, positions and ranks."""
    mean = mean_over_ranks(torch.stack([image.float().mean((1, 2)) for image in values]).mean(0))
    squares = [(image.float() - mean[:, None, None]).square_().mean((1, 2)) for image in values]
    return mean, mean_over_ranks(torch.stack(squares).mean(0)).sqrt()


@contextmanager
def _into_norms(layers: Sequence[FilterLayer], look: Callable[[FilterLayer, Tensor], None]) -> Iterator[None]:
    """Calls ``look`` with what goes into each layer's norm the first time, and ends the pass at the last one."""
    left = {layer.name for layer in layers}

    def hook_of(layer: FilterLayer) -> Callable[[nn.Module, tuple], None]:
        def hook(module: nn.Module, inputs: tuple) -> None:
            if layer.name not in left:
                return
            left.remove(layer.name)
            look(layer, inputs[0])
            if not left:
                raise _AllReached

        return hook

    handles = [layer.norm.register_forward_pre_hook(hook_of(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
