"""Statistics of frozen norms behind new filters: give a channel after the norm the moments it had before the drop.

All is found from what goes into the norm, y = (x - m) / sqrt(v + eps) * w + b. J: filters of a layer; M: those of it
that leave or return.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress

import torch
from torch import Tensor, nn

from repr_det.method.distributed import gathered, to_cpu
from repr_det.method.errors import OptionError
from repr_det.method.holding import HeldFilters
from repr_det.method.layers import FilterLayer, Values, on_devices, values_of
from repr_det.method.options import RePrOptions
from repr_det.method.participants import Participants
from repr_det.method.passes import TrainingPasses
from repr_det.network.norms import BATCH, FROZEN, SILENT, epsilon
from repr_det.network.state import undisturbed

logger = logging.getLogger("repr_det.scheme")

_CONSTANT = 1e-6  # a standard deviation below this share of the mean has no scale
_SETTLED = 1e-5  # change of statistics, in standard deviations, that ends the search


class _AllReached(Exception):
    """Ends a forward pass."""


class FrozenNorms:
    """Norms that keep their statistics while their convs train; ``at_drop`` names the layers that had one then."""

    def __init__(
        self, options: RePrOptions, participants: Participants, model: nn.Module | None, passes: TrainingPasses | None
    ) -> None:
        self.at_drop: set[str] = set()
        self._recalibrates = options.frozen_norm == "recalibrate"
        self._watch = participants.watch
        self._model = model if passes is None else passes.model
        self._passes = passes
        self._number = options.calibration_batches or (0 if passes is None else passes.calibration_batches)

    def of(self, layers: Sequence[FilterLayer]) -> list[FilterLayer]:
        """The layers whose norm is frozen in training, also while the model is evaluated."""
        evaluates = self._model is not None and self._model.training != self._watch.trains
        with undisturbed(self._model, trains=self._watch.trains) if evaluates else nullcontext():
            return [layer for layer in layers if layer.is_frozen]

    def need_batches(self, layers: Sequence[FilterLayer]) -> bool:
        return self._recalibrates and bool(self.of(layers))

    def check(self, layers: Sequence[FilterLayer]) -> None:
        """Raises OptionError where batches are needed and missing."""
        if self._passes is None and self.need_batches(layers):
            first = self.of(layers)[0]
            kind = "FrozenBN" if first.kind == FROZEN else "BN in eval mode"
            raise OptionError(
                f"{kind} re-calibration looks at training batches (the norm of {first.name} keeps its statistics): "
                "give loader= and loss=, or passes=, or choose {frozen_norm} keep"
            )

    def before_drop(self, held: HeldFilters, layers: Sequence[FilterLayer], values: Values, cycle: int) -> Values:
        """Layer name -> "moments": mean and standard deviation of leaving channels after frozen norms, (2, M) float32
        on the CPU. Layers that no batch reaches are missing."""
        self.at_drop = {layer.name for layer in self.of(layers)}
        leaving = [layer for layer in held.layers if layer.name in self.at_drop]
        if not leaving or self._passes is None or not self._recalibrates:
            return {}
        found = self._moments_into(leaving, list(self._passes.batches(self._number, cycle)))
        after = {x.name: _moments_after(x, values[x.name], found[x.name]) for x in leaving if x.name in found}
        return {name: {"moments": both[:, held.masks[name]].float()} for name, both in after.items()}

    def can_renew(self, layers: Sequence[FilterLayer]) -> list[FilterLayer]:
        """Leaves out layers whose norm has been frozen since the drop, if no batches give statistics."""
        without = [] if self._passes is not None and self._recalibrates else self.of(layers)
        lost = [layer.name for layer in without if layer.name not in self.at_drop]
        for name in lost:
            logger.warning("RePr: filters of %s return as they were: its norm has been frozen since the drop", name)
        return [layer for layer in layers if layer.name not in lost]

    def after_return(self, held: HeldFilters, renewed: Sequence[FilterLayer], old: Values, cycle: int) -> None:
        """Gives new channels their old moments, again until it settles: each norm changes what the next one gets."""
        wanted = {layer.name: old[layer.name]["moments"] for layer in renewed if "moments" in old[layer.name]}
        for layer in self.of(renewed) if self._recalibrates else ():
            if layer.kind == BATCH and layer.name not in wanted:
                # Frozen since the drop: what BN does in training.
                wanted[layer.name] = torch.tensor([[0.0], [1.0]], device="cpu")
        layers = [layer for layer in renewed if layer.name in wanted]
        if not layers or self._passes is None:
            return
        batches = list(self._passes.batches(self._number, cycle))
        values = values_of(layers)
        before: Values = {}
        for _ in layers:
            found = self._moments_into(layers, batches)
            reached = [layer for layer in layers if layer.name in found]
            new = {}
            for layer in reached:
                name = layer.name
                new[name] = _statistics_for(layer, values[name], held.masks[name], wanted[name], found[name])
            moved = on_devices(new, reached)
            for layer in reached:
                for key, statistic in layer.running_statistics().items():
                    statistic.index_copy_(0, held.rows[layer.name], moved[layer.name][key].to(statistic))
            if before and all(_settled(new[name], before[name]) for name in new):
                return
            before = new

    def _moments_into(self, layers: Sequence[FilterLayer], batches: Sequence) -> dict[str, Tensor]:
        """Layer name -> mean, standard deviation, largest and smallest of what goes into its norm when it first runs in
        a pass, (4, J) float64 on the CPU, over images, positions and ranks."""
        seen: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
        left: set[str] = set()

        def note(name: str, images: Tensor) -> None:
            if name in left:
                left.remove(name)
                seen[name] += [_of_image(image.float()) for image in images]
                if not left:
                    raise _AllReached

        passes = self._passes
        with ExitStack() as stack:
            stack.enter_context(undisturbed(passes.model, True, self._watch.trains))
            stack.enter_context(torch.no_grad())
            for layer in layers:
                hook = layer.norm.register_forward_pre_hook(lambda _, inputs, name=layer.name: note(name, inputs[0]))
                stack.callback(hook.remove)
            for batch in batches:
                left.update(seen)
                with suppress(_AllReached):
                    passes.loss(batch)
        return _over_ranks(seen, layers[0].weight.device)


def _of_image(image: Tensor) -> Tensor:
    """(J, H, W) -> mean, variance, largest and smallest value, (4, J)."""
    mean = image.mean((1, 2))
    variance = (image - mean[:, None, None]).square_().mean((1, 2))
    return torch.stack([mean, variance, image.amax((1, 2)), image.amin((1, 2))])


def _over_ranks(seen: Mapping[str, list[Tensor]], device: torch.device) -> dict[str, Tensor]:
    own = {name: torch.stack(images) for name, images in seen.items() if images}
    everyone = gathered(dict(zip(own, to_cpu(list(own.values())), strict=True)), device)
    found = {}
    for name in seen:
        images = [theirs[name].double() for theirs in everyone if name in theirs]
        if images:
            means, variances, largest, smallest = torch.cat(images).unbind(1)
            mean = means.mean(0)
            std = (variances + (means - mean).square()).mean(0).sqrt()
            found[name] = torch.stack([mean, std, largest.amax(0), smallest.amin(0)])
    return found


def _settled(new: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> bool:
    sigma, old = (x["norm.running_var"].double().clamp_min(1e-12).sqrt() for x in (new, before))
    moved = (new["norm.running_mean"] - before["norm.running_mean"]).abs()
    return bool(((moved < _SETTLED * sigma) & ((sigma - old).abs() < _SETTLED * sigma)).all())


def _moments_after(layer: FilterLayer, values: Mapping[str, Tensor], found: Tensor) -> Tensor:
    """Mean and standard deviation (2, J); a channel that a ReLU closes has the medians of the others."""
    mean, std, largest, smallest = found
    weight, bias = _affine(values)
    gain = weight / (values["norm.running_var"].double() + epsilon(layer.norm)).sqrt()
    shift = bias - values["norm.running_mean"].double() * gain
    after = torch.stack([mean * gain + shift, std * gain.abs()])
    if layer.rectified:
        opens = torch.where(gain > 0, largest, smallest) * gain + shift > 0
        if opens.any():
            after[:, ~opens] = after[:, opens].median(1, keepdim=True).values
    return after


def _statistics_for(
    layer: FilterLayer, values: Mapping[str, Tensor], mask: Tensor, wanted: Tensor, found: Tensor
) -> dict[str, Tensor]:
    """Running mean m and variance v (M,) for the mean mu and deviation s that are ``wanted`` (2, M):
    sqrt(v + eps) = |w| std(x) / s, m = mean(x) - (mu - b) sqrt(v + eps) / w. If s or std(x) is 0, or w 0 or SILENT, x
    is normalised.
    """
    eps, (target_mean, target_std) = epsilon(layer.norm), wanted.double()
    mean, std = found[:2, mask]
    weight, bias = (tensor[mask] for tensor in _affine(values))
    scale_free = (weight.abs() < 2 * SILENT) | (target_std <= _CONSTANT * (1 + target_mean.abs())) | (std <= 0)
    sigma = torch.where(scale_free, std.clamp_min(1e-3), weight.abs() * std / target_std.clamp_min(1e-30))
    variance = (sigma.square() - eps).clamp_min(0)
    sigma = (variance + eps).sqrt()
    shift = torch.where(scale_free, 0, (target_mean - bias) * sigma / torch.where(scale_free, 1, weight))
    return {"norm.running_mean": (mean - shift).float(), "norm.running_var": variance.float()}


def _affine(values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    weight = values["norm.weight"].double()
    return weight, values.get("norm.bias", torch.zeros_like(weight)).double()
