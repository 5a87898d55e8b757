"""Ranking criteria, one score a filter (RePr, sections 4 and 5), and the choice of filters to drop.

A criterion is a name in ``CRITERIA``, a function of a layer or of (layer, ``Context``) -> (J,), or a ``Criterion``; see
``examples/criteria.py`` and ``saliency.py``.

J: filters of a layer; N: images or proposals of a batch; P: positions, H * W.
"""

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from repr_det.method.distributed import mean_over_ranks, to_cpu
from repr_det.method.errors import OptionError, UserError
from repr_det.method.layers import FilterLayer
from repr_det.method.options import about_option
from repr_det.method.orthogonality import by_group, expected_overlap, inter_filter_orthogonality, unit_filters
from repr_det.method.passes import TrainingPasses
from repr_det.network.state import undisturbed
from repr_det.network.tracing import HookOfOne

Scores = dict[str, Tensor]  # layer name -> (J,)
NEAR_DUPLICATE = 0.9  # likeness of two filters of which one says little new
NEVER = float("-inf")  # is not to be dropped
_ROUNDING = 1e-9  # 0.3 * 10 must be 3 and 0.1 * 30 must not be 4
logger = logging.getLogger("repr_det.data_criteria")


@dataclass(frozen=True)
class Context:
    """The means of a criterion besides the filters: a CPU generator, ``num_batches`` training batches of ``cycle``."""

    generator: torch.Generator
    passes: TrainingPasses | None = None
    num_batches: int = 0
    cycle: int = 0
    trains: bool = True  # in training mode


@dataclass(frozen=True)
class Criterion:
    """Scores all layers at once; ``spares`` filters of minus infinity from every drop."""

    score: Callable[[Sequence[FilterLayer], Context], Scores]
    needs_data: bool = False
    spares: bool = False


def _of_function(function: Callable[..., Tensor]) -> Criterion:
    parameters = list(inspect.signature(function).parameters.values())
    takes_context = any(x.default is x.empty or x.name == "context" for x in parameters[1:2])
    name = getattr(function, "__name__", type(function).__name__)

    @torch.no_grad()
    def score(layers: Sequence[FilterLayer], context: Context) -> Scores:
        found = {}
        for layer in layers:
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
    def score(layers: Sequence[FilterLayer], context: Context) -> Scores:
        weights = to_cpu([layer.weight for layer in layers])
        return {x.name: by_group(function, x.conv.groups, weight) for x, weight in zip(layers, weights, strict=True)}

    return Criterion(score)


def calibrated_overlap(weight: Tensor) -> Tensor:
    """O_f over that of random directions, which differs with d."""
    return inter_filter_orthogonality(weight) / (expected_overlap(len(weight), weight[0].numel()) or 1)


def released_overlap(weight: Tensor) -> Tensor:
    """The overlap of the author's released code: |sum over j != f of (What What^T)[f, j]| / J, What = W / ||W||_F."""
    rows = torch.nan_to_num(weight.detach().cpu().double().flatten(1))
    rows = rows / rows.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return ((rows @ rows.sum(0) - rows.square().sum(1)) / len(rows)).abs()


def small_weight_norm(weight: Tensor) -> Tensor:
    """Minus the mean squared weight of the filter."""
    return -torch.nan_to_num(weight.detach().cpu().double().flatten(1)).square().mean(1)


def _random(layers: Sequence[FilterLayer], context: Context) -> Scores:
    return {x.name: torch.rand(x.num_filters, generator=context.generator, device="cpu") for x in layers}


def share_of_zeros(layers: Sequence[FilterLayer], context: Context) -> Scores:
    """APoZ: the share of outputs that a ReLU makes 0 (Hu et al. 2016, arXiv 1607.03250)."""
    return finished(layers, "apoz", output_means(layers, context, lambda output: output <= 0))


def redundancy(layers: Sequence[FilterLayer], context: Context) -> Scores:
    """``redundancy_by`` what training batches show."""
    return redundancy_by(layers, use_of_filters(layers, context))


def redundancy_by(layers: Sequence[FilterLayer], use: dict[str, tuple[Tensor, Tensor]]) -> Scores:
    """Infinity for an idle filter, likeness for near-duplicates (``copies``), NEVER for others.

    Args:
        use: see ``use_of_filters``.
    """
    scores = {}
    for layer in layers:
        idle, threshold = use[layer.name]
        weight, gamma = layer.weight.detach().cpu(), layer.tensors().get("norm.weight")
        if gamma is not None:
            weight = weight * gamma.detach().cpu().sign().view(-1, 1, 1, 1)
        score = by_group(copies, layer.conv.groups, weight, idle, threshold)
        scores[layer.name] = score.masked_fill(idle, float("inf"))
    return scores


def copies(weight: Tensor, idle: Tensor, threshold: Tensor) -> Tensor:
    """Likeness of near-duplicates to what stays for them: c / sqrt(1 + (t1 - t2)^2), c the cosine, t the thresholds.

    From the largest norm down a filter stays, unless it is more like one that stays than NEAR_DUPLICATE. Filters that
    stay, and idle ones, score NEVER.
    """
    rows = unit_filters(weight)
    difference = threshold[:, None].double() - threshold[None].double()
    likeness = ((rows @ rows.T) / (1 + difference.square()).sqrt()).fill_diagonal_(0)
    near = (likeness > NEAR_DUPLICATE) & ~idle
    stays = ~idle & ~near.any(1)
    for row in weight.flatten(1).norm(dim=1).sort(descending=True, stable=True).indices.tolist():
        if near[row].any() and not idle[row]:
            stays[row] = not (near[row] & stays).any()
    score = torch.where(near & stays, likeness, NEVER).amax(1)
    return score.masked_fill(stays | idle, NEVER)


def use_of_filters(layers: Sequence[FilterLayer], context: Context) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> which filters are idle (J,) bool, and thresholds (J,), on the CPU.

    An idle one puts out nothing above 0 and gets no gradient, on any rank, while others of its layer do. A threshold is
    mean over standard deviation of the channel before its activation.
    """
    counts: dict[str, int] = {}
    sums: Scores = {}
    outputs: Scores = {}
    gradients: Scores = {}

    def note(layer: FilterLayer, output: Tensor) -> None:
        values = positions(output.detach())
        if number := values.shape[0] * values.shape[2]:
            counts[layer.name] = counts.get(layer.name, 0) + number
            found = [_sum(values, lambda image: image), _sum(values, lambda image: image.float().square())]
            sums[layer.name] = sums.get(layer.name, 0) + torch.stack(found)
            _keep_largest(outputs, layer, values.amax((0, 2)))

    def on_loss(loss: Tensor) -> None:
        for layer, gradient in zip(layers, gradients_of(loss, [x.weight for x in layers]), strict=True):
            if gradient is not None:
                _keep_largest(gradients, layer, gradient.flatten(1).abs().amax(1))

    with on_output(layers, note):
        run_batches(context, on_loss, gradients=True)
    reached = [layer.name for layer in layers if layer.name in sums and layer.name in gradients]
    largest = [gradients[name].to(outputs[name].device) for name in reached]  # a layer's output may lie elsewhere
    found = to_cpu([torch.stack([*sums[x], outputs[x], own]) for x, own in zip(reached, largest, strict=True)])
    idle, thresholds = {}, {}
    for name, (total, squares, output, gradient) in zip(reached, found, strict=True):
        mean = total.double() / counts[name]
        deviation = (squares.double() / counts[name] - mean.square()).clamp_min(0).sqrt()
        thresholds[name] = mean / deviation.clamp_min(1e-12)
        idle[name] = ~((output > 0) | (gradient > 0)) & gradient.any()
    everywhere, threshold = _averaged(layers, idle), _averaged(layers, thresholds)
    return {layer.name: (everywhere[layer.name] == 1, threshold[layer.name]) for layer in layers}


def _keep_largest(found: Scores, layer: FilterLayer, new: Tensor) -> None:
    found[layer.name] = torch.maximum(found.get(layer.name, new.float()), new.float())


def _sum(values: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """(N, J, P) -> (J,) float32, one image at a time."""
    return torch.stack([of(image).float().sum(1) for image in values]).sum(0)


def output_means(layers: Sequence[FilterLayer], context: Context, of: Callable[[Tensor], Tensor]) -> Scores:
    """Mean of ``of`` (outputs of one image) over images, positions and runs; layers that did not run are missing."""
    total: Scores = {}
    count: dict[str, int] = {}

    def note(layer: FilterLayer, output: Tensor) -> None:
        values = positions(output.detach())
        if number := values.shape[0] * values.shape[2]:
            total[layer.name] = total.get(layer.name, 0) + _sum(values, of)
            count[layer.name] = count.get(layer.name, 0) + number

    with on_output(layers, note):
        run_batches(context, lambda loss: None, gradients=False)
    return {name: total[name] / count[name] for name in total}


def run_batches(context: Context, on_loss: Callable[[Tensor], None], gradients: bool) -> None:
    """Calls ``on_loss`` with the loss of every batch, with ``gradients`` for ``torch.autograd.grad``, which
    DistributedDataParallel does not see. UserError if the context has no passes."""
    passes = context.passes
    if passes is None:
        raise UserError("this criterion looks at training batches: give Context(passes=...)")
    with undisturbed(passes.model, True, context.trains), torch.set_grad_enabled(gradients):
        for batch in passes.batches(context.num_batches, context.cycle):
            on_loss(passes.loss(batch))


def gradients_of(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient by each parameter; None for one that is frozen or has no part in the loss."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True) if trained else ()
    by_parameter = dict(zip(trained, found, strict=True))
    return [by_parameter.get(parameter) for parameter in parameters]


def positions(output: Tensor) -> Tensor:
    """(N, J, H, W) or (J, H, W) -> (N, J, P)."""
    return (output if output.dim() > 3 else output[None]).flatten(2)


@contextmanager
def on_output(layers: Sequence[FilterLayer], call: Callable[[FilterLayer, Tensor], None]) -> Iterator[None]:
    """Calls ``call`` with a layer and its output whenever it runs."""
    with ExitStack() as stack:
        for layer in layers:
            module = layer.output_module()
            hook = HookOfOne(lambda _, inputs, output, layer=layer: call(layer, output))
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def finished(layers: Sequence[FilterLayer], criterion: str, found: Scores) -> Scores:
    """Averages scores over the ranks; a layer that never ran scores 0, with a warning."""
    missing = [layer.name for layer in layers if layer.name not in found]
    if missing:
        names = ", ".join(missing)
        logger.warning("RePr criterion %s: %s did not run in the training batches; they score 0", criterion, names)
    return _averaged(layers, found)


def _averaged(layers: Sequence[FilterLayer], found: Scores) -> Scores:
    """Averages scores over the ranks in one collective call. Missing and non-finite ones are 0."""
    sizes = {layer.name: layer.num_filters for layer in layers}
    parts = to_cpu([found.get(name, torch.zeros(size, device="cpu")) for name, size in sizes.items()])
    joined = mean_over_ranks(torch.cat([part.double() for part in parts]), layers[0].weight.device)
    joined = torch.where(torch.isfinite(joined), joined, 0).float()
    return dict(zip(sizes, joined.split(list(sizes.values())), strict=True))


CRITERIA = {
    "ortho": _of_weight(inter_filter_orthogonality),
    "ortho_calibrated": _of_weight(calibrated_overlap),
    "ortho_released": _of_weight(released_overlap),
    "weight_norm": _of_weight(small_weight_norm),
    "random": Criterion(_random),
    "apoz": Criterion(share_of_zeros, needs_data=True),
    "redundant": Criterion(redundancy, needs_data=True, spares=True),
}


def get_criterion(criterion: "str | Callable[..., Tensor] | Criterion") -> Criterion:
    """Raises OptionError for what is neither a name in CRITERIA nor a function."""
    if isinstance(criterion, Criterion):
        return criterion
    if callable(criterion):
        return _of_function(criterion)
    if criterion not in CRITERIA:
        raise OptionError(f"{{criterion}} must be one of {', '.join(sorted(CRITERIA))}, got {criterion!r}")
    return CRITERIA[criterion]


def drop_total(num_filters: int, drop_ratio: float) -> int:
    return math.floor(drop_ratio * num_filters + _ROUNDING)


def drop_cap(num_filters: int, max_drop_per_layer: float) -> int:
    """The most filters that a layer can lose: one always stays."""
    return max(0, min(num_filters - 1, math.ceil(max_drop_per_layer * num_filters - _ROUNDING)))


def check_capacity(sizes: dict[str, int], drop_ratio: float, max_drop_per_layer: float) -> None:
    """Raises OptionError if a share is out of range, or the caps leave too few filters."""
    about_option("drop_ratio").check("drop_ratio", drop_ratio)
    about_option("max_drop_per_layer").check("max_drop_per_layer", max_drop_per_layer)
    total = drop_total(sum(sizes.values()), drop_ratio)
    room = sum(drop_cap(size, max_drop_per_layer) for size in sizes.values())
    if room < total:
        raise OptionError(
            f"{{max_drop_per_layer}} {max_drop_per_layer} lets {room} of {sum(sizes.values())} filters be dropped, "
            f"{{drop_ratio}} {drop_ratio} needs {total} (one of a layer stays): raise the cap or lower the ratio"
        )


def select_filters(scores: dict[str, Tensor], drop_ratio: float, max_drop_per_layer: float = 1.0) -> dict[str, Tensor]:
    """The floor(drop_ratio * F) of all F filters with the highest scores, within the cap of each layer.

    Args:
        scores: layer name -> (J,). Ties go by the order of layers, then by index.
        max_drop_per_layer: share of a layer, rounded up.

    Returns:
        layer name -> (J,) bool on the device of the scores, True = drop.

    Raises:
        OptionError: see ``check_capacity``.
        ValueError: a score is NaN.
    """
    sizes = {name: len(score) for name, score in scores.items()}
    check_capacity(sizes, drop_ratio, max_drop_per_layer)
    candidates = []
    for name, score in scores.items():
        score = score.detach().double().cpu()
        missing = score.isnan().nonzero()
        if len(missing):
            raise ValueError(f"the score of filter {int(missing[0])} of {name} is NaN")
        beyond = score.sort(descending=True, stable=True).indices[drop_cap(len(score), max_drop_per_layer) :]
        candidates.append(score.index_fill(0, beyond, NEVER))
    ranked = torch.cat(candidates)
    worst = ranked.sort(descending=True, stable=True).indices[: drop_total(len(ranked), drop_ratio)]
    chosen = torch.zeros_like(ranked, dtype=torch.bool).index_fill(0, worst, True) & (ranked > NEVER)
    masks = zip(scores.items(), chosen.split(list(sizes.values())), strict=True)
    return {name: mask.to(score.device) for (name, score), mask in masks}
