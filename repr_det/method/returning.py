"""The return of M of the J filters of one layer (RePr, section 3)."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from repr_det.method.distributed import to_devices
from repr_det.method.holding import HeldFilters
from repr_det.method.layers import FilterLayer
from repr_det.method.optimizers import raise_squares_of_inputs_, restart_optimizer_state_
from repr_det.method.orthogonality import by_group, least_overlap_filters, unit_filters
from repr_det.network.norms import GROUP, SILENT

logger = logging.getLogger("repr_det.scheme")
Modules = Mapping[str, nn.Module]  # of the model, by name

# What a new filter begins with.
_FRESH = {"bias": 0.0, "norm.weight": 1.0, "norm.bias": 0.0, "norm.running_mean": 0.0, "norm.running_var": 1.0}


def new_filters(
    weight: Tensor, old: Tensor, mask: Tensor, groups: int, scale: str, generator: torch.Generator
) -> tuple[Tensor, float]:
    """Directions of least overlap, at the norm that ``scale`` says.

    Args:
        weight: (J, ...) now, on the CPU.
        old: (M, ...) before the drop.
        mask: (J,) bool, True = returns.

    Returns:
        (M, ...) new filters; the largest |cos| of one of them to a kept or an old filter.
    """

    def directions(now: Tensor, before: Tensor, out: Tensor) -> Tensor:
        return least_overlap_filters(now[~out].double(), before[out].double(), generator)

    def cosines(new: Tensor, before: Tensor, out: Tensor) -> Tensor:
        others = torch.cat([new[~out], before[out]])
        return (unit_filters(new[out]) @ unit_filters(others).T).abs().amax(1)

    before, after = weight.clone(), weight.clone()
    before[mask] = old.to(weight)
    unit = by_group(directions, groups, weight, before, mask).flatten(1)
    new = _of_norm(unit, _new_norms(scale, weight[~mask], old), weight.dtype).view_as(old)
    after[mask] = new
    return new, by_group(cosines, groups, after, before, mask).max().item()


def _new_norms(scale: str, kept: Tensor, old: Tensor) -> Tensor:
    """L2 norms (M,); 1 if kept and old filters are all zero."""
    own, others = (filters.double().flatten(1).norm(dim=1) for filters in (old, kept))
    usable, of_others = (torch.isfinite(sizes) & (sizes > 0) for sizes in (own, others))
    if scale == "unit":
        return torch.ones_like(own)
    fallback = others[of_others].mean()  # NaN of none
    if fallback.isnan():
        fallback = own[usable].mean().nan_to_num(1.0)
    return torch.where(usable, own, fallback) if scale == "old" else fallback.expand_as(own)


def _of_norm(unit: Tensor, norms: Tensor, dtype: torch.dtype) -> Tensor:
    """Unit rows (M, d) scaled to norms (M,), also after rounding to ``dtype``."""
    scaled = (unit * norms[:, None]).to(dtype)
    if dtype in (torch.float16, torch.bfloat16):
        rounded = scaled.double().norm(dim=1)
        scaled = (unit * (norms * torch.where(rounded > 0, norms / rounded, 1))[:, None]).to(dtype)
    lost = ~(scaled.double().norm(dim=1) > 0)  # a norm so small that every entry rounds to 0
    return torch.where(lost[:, None], unit.to(dtype), scaled)


@torch.no_grad()
def put_back(layer: FilterLayer, rows: Tensor, values: Mapping[str, Tensor]) -> None:
    """Gives filters (M,) ``values`` (M, ...) by the names of tensors, or those of a new filter."""
    for name, tensor in (layer.tensors() | layer.running_statistics()).items():
        if name in values:
            tensor.index_copy_(0, rows, values[name].to(tensor))
        else:
            tensor.index_fill_(0, rows, _FRESH[name])


def can_be_silent(layer: FilterLayer, modules: Modules, moved: Collection[Tensor]) -> bool:
    """Tells whether kernels or a gamma can silence returned channels until they learn. No norm may mix in others.

    Args:
        moved: the parameters that learn.
    """
    is_counted = layer.kind == GROUP and layer.norm.num_groups < layer.num_filters
    by_kernels = _kernels_can_be_silent(layer, modules, moved)
    return not is_counted and (by_kernels or _gamma_can_be_silent(layer, modules, moved))


@torch.no_grad()
def prepare_readers(
    layer: FilterLayer,
    modules: Modules,
    held: HeldFilters,
    optimizers: Sequence[Optimizer],
    silent: bool,
    moved: Collection[Tensor],
) -> None:
    """Keeps kernels on returned channels from stepping further than others, or makes the channels ``silent``
    ("function_preserving"): if convs and linear layers alone read them by kernels of 0, else by a tiny gamma.

    A filter of a grouped reader that would lose all of its kernels keeps them.
    """
    if silent and not _kernels_can_be_silent(layer, modules, moved):
        if _gamma_can_be_silent(layer, modules, moved):
            rows = held.rows[layer.name]
            layer.norm.weight.index_fill_(0, rows, SILENT)
            # A frozen norm has given the channel its old beta.
            if (beta := layer.tensors().get("norm.bias")) is not None:
                beta.index_fill_(0, rows, 0)
        return
    unchanged = 0
    for reader in aligned_readers(layer, modules)[0]:
        weight, mask = reader.weight, held.masks[layer.name]
        for within, returned, others in _kernels(reader, mask):
            if not silent:
                raise_squares_of_inputs_(optimizers, weight, returned, others, within)
            elif not len(others):
                unchanged += len(returned) * len(mask) // _inputs(reader)
            else:
                for tensor in (weight, weight.grad):
                    if tensor is not None:
                        tensor[within].index_fill_(1, returned, 0)
                restart_optimizer_state_(optimizers, weight, returned, others, 1, within)
    if unchanged:
        logger.warning("RePr: %d filters of %s return as published: all channels of a group", unchanged, layer.name)


def aligned_readers(layer: FilterLayer, modules: Modules) -> tuple[list[nn.Conv2d | nn.Linear], bool]:
    """The convs and linear layers that read only channels of the layer, and whether nothing else reads it."""
    found = []
    for reader in sorted(layer.readers, key=lambda reader: reader.name):
        module = modules.get(reader.name)
        # A weight that is computed from others cannot be set.
        own = isinstance(module, (nn.Conv2d, nn.Linear)) and "weight" in dict(module.named_parameters(recurse=False))
        if own and reader.aligned and reader.alone and _inputs(module) == layer.num_filters * reader.span:
            found.append(module)
    return found, len(found) == len(layer.readers)


def _inputs(reader: nn.Conv2d | nn.Linear) -> int:
    return reader.weight.shape[1] * getattr(reader, "groups", 1)


def _kernels(reader: nn.Conv2d | nn.Linear, mask: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields for every group of ``reader`` that sees a channel of ``mask`` (J,) its filters, their inputs of the mask,
    and the others. A linear layer may read several inputs of a channel."""
    number = getattr(reader, "groups", 1)
    filters = len(reader.weight) // number
    inputs = mask.repeat_interleave(_inputs(reader) // len(mask)).chunk(number)
    groups = [group for group, chosen in enumerate(inputs) if chosen.any()]
    parts = [part.nonzero().flatten() for group in groups for part in (inputs[group], ~inputs[group])]
    moved = to_devices(parts, [reader.weight.device] * len(parts))
    for group, returned, others in zip(groups, moved[::2], moved[1::2], strict=True):
        yield slice(group * filters, (group + 1) * filters), returned, others


def _kernels_can_be_silent(layer: FilterLayer, modules: Modules, moved: Collection[Tensor]) -> bool:
    readers, are_all = aligned_readers(layer, modules)
    can_spare = [reader.weight in moved and reader.weight.shape[1] > 1 for reader in readers]
    return bool(readers) and are_all and all(can_spare)


def _gamma_can_be_silent(layer: FilterLayer, modules: Modules, moved: Collection[Tensor]) -> bool:
    """Tells whether a gamma can. A depthwise conv behind it puts out a constant, which a ReLU may close for good."""
    readers = [modules.get(reader.name) for reader in layer.readers]
    is_alone = any(isinstance(reader, nn.Conv2d) and reader.weight.shape[1] == 1 for reader in readers)
    return not is_alone and layer.tensors().get("norm.weight") in moved
