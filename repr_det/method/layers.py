"""The convs that may participate. A filter is an output channel: its row of weight, bias and the norm's affine."""

import difflib
import fnmatch
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from repr_det.method.distributed import to_devices
from repr_det.method.errors import OptionError, UserError
from repr_det.method.options import DETECTRON2_LAYERS
from repr_det.network.norms import BATCH, FROZEN, NONE, is_norm, norm_kind
from repr_det.network.proof import Reader

logger = logging.getLogger("repr_det.layers")
Values = dict[str, dict[str, Tensor]]  # layer name -> name -> tensor
_MOST_NAMES = 12  # of convs in a message


@dataclass(eq=False)
class FilterLayer:
    """A conv of J filters, with the norm that follows it.

    Attributes:
        name: the conv's module name.
        norm: a module of J channels, or None.
        readers: what reads its channels, if a traced pass has shown that.
        rectified: whether a ReLU, and nothing else, follows the norm.
    """

    name: str
    conv: nn.Conv2d
    norm: Any = None  # an nn.Module, whose attributes a type checker cannot know
    norm_name: str | None = None
    readers: frozenset[Reader] = field(default_factory=frozenset)
    rectified: bool = False

    @property
    def kind(self) -> str:
        """See ``norm_kind``."""
        return norm_kind(self.norm)

    @property
    def is_frozen(self) -> bool:
        """True if the norm's statistics do not move now: FrozenBN, or BN in eval mode."""
        if self.kind == BATCH:
            return self.norm.running_mean is not None and not self.norm.training
        return self.kind == FROZEN

    @property
    def num_filters(self) -> int:
        """J."""
        return self.conv.out_channels

    @property
    def weight(self) -> Tensor:
        """(J, C_in / groups, kh, kw)."""
        return self.conv.weight

    def tensors(self) -> dict[str, Tensor]:
        """The tensors (J, ...) whose row f is zero while filter f is dropped."""
        found = {"weight": self.conv.weight, "bias": self.conv.bias}
        if self.kind != NONE:
            found |= {"norm.weight": self.norm.weight, "norm.bias": getattr(self.norm, "bias", None)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def parameters(self) -> Iterator[nn.Parameter]:
        """The members of ``tensors`` that an optimizer may move."""
        return (t for t in self.tensors().values() if isinstance(t, nn.Parameter))

    def running_statistics(self) -> dict[str, Tensor]:
        """Running mean and variance, each (J,), if the norm has them."""
        if self.kind not in (BATCH, FROZEN) or self.norm.running_mean is None:
            return {}
        return {"norm.running_mean": self.norm.running_mean, "norm.running_var": self.norm.running_var}

    def output_module(self) -> nn.Module:
        """The module that puts out the channel after conv and norm (Detectron2 runs the norm inside the conv)."""
        if self.norm is None or any(module is self.norm for module in self.conv.modules()):
            return self.conv
        return self.norm


@torch.no_grad()
def zero_rows_(tensors: Iterable[Tensor], rows: Tensor) -> None:
    """Sets rows to 0, also where they are NaN."""
    for tensor in tensors:
        tensor.index_fill_(0, rows.to(tensor.device), 0)


def values_of(layers: Sequence[FilterLayer]) -> Values:
    """All that belongs to filters, each (J, ...) on the CPU: no copy of what is there already."""
    values = {layer.name: layer.tensors() | layer.running_statistics() for layer in layers}
    return _moved(values, dict.fromkeys(values, torch.device("cpu")))


def on_devices(values: Values, layers: Sequence[FilterLayer]) -> Values:
    return _moved(values, {layer.name: layer.weight.device for layer in layers})


def _moved(values: Values, devices: Mapping[str, torch.device]) -> Values:
    named = [(layer, name) for layer in devices for name in values[layer]]
    moved = to_devices([values[layer][name] for layer, name in named], [devices[layer] for layer, _ in named])
    found: Values = {layer: {} for layer in devices}
    for (layer, name), tensor in zip(named, moved, strict=True):
        found[layer][name] = tensor
    return found


def find_filter_layers(
    model: nn.Module,
    include: Sequence[str],
    exclude: Sequence[str] = (),
    norms: Mapping[str, nn.Module | None] | None = None,
) -> list[FilterLayer]:
    """The trainable Conv2d modules whose names match, in the order of the model.

    Args:
        model: not wrapped in DistributedDataParallel.
        include, exclude: fnmatch patterns on module names.
        norms: conv name -> the norm that follows it; else its attribute ``norm``, or the next module of its parent if
            that is a norm of as many channels. ``RePr`` takes what a training pass shows.

    Raises:
        UserError: a module is lazy and has not run, or sharded (FSDP), or no trainable conv matches.
    """
    for key, patterns in (("layers", include), ("exclude", exclude)):
        is_list = isinstance(patterns, Sequence) and not isinstance(patterns, str)
        if not is_list or not all(isinstance(pattern, str) for pattern in patterns):
            raise OptionError(f"{{{key}}} must be a list of patterns, got {patterns!r}")
    names = {module: name for name, module in model.named_modules()}
    for module, name in names.items():
        _check_whole(name, module)
    convs = {name: module for module, name in names.items() if isinstance(module, nn.Conv2d)}
    trainable = [name for name, conv in convs.items() if any(p.requires_grad for p in conv.parameters())]
    chosen = [name for name in trainable if _matches(name, include) and not _matches(name, exclude)]
    if not chosen:
        frozen = sum(_matches(name, include) for name in convs.keys() - trainable)
        hint = f" ({frozen} that match are frozen)" if frozen else ""
        left_out = f" less {{exclude}} {list(exclude)}" if exclude else ""
        nearest = closest(include, trainable)
        others = f" and {len(nearest) - _MOST_NAMES} more" if len(nearest) > _MOST_NAMES else ""
        raise OptionError(
            f"{{layers}} {list(include)}{left_out} matches no trainable Conv2d{hint}; the closest trainable ones: "
            f"{', '.join(nearest[:_MOST_NAMES]) or 'none'}{others}{what_attention_means(model)}"
        )
    for pattern in (*include, *exclude):
        # A default is for one kind of backbone.
        if pattern not in DETECTRON2_LAYERS and not any(_matches(name, [pattern]) for name in convs):
            logger.warning("RePr: pattern %r matches no conv, such as %s", pattern, closest([pattern], list(convs))[:2])
    found = []
    for name in chosen:
        norm = norms[name] if norms is not None and name in norms else _norm_of(model, name, convs[name])
        found.append(FilterLayer(name, convs[name], norm, None if norm is None else names.get(norm)))
    return found


def closest(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """``names``, those most like the first of ``patterns`` first."""
    first = patterns[0].replace("*", "") if patterns else ""
    return sorted(names, key=lambda name: difflib.SequenceMatcher(None, first, name).ratio(), reverse=True)


def _check_whole(name: str, module: nn.Module) -> None:
    kind, parameters = type(module).__name__, list(module.parameters(recurse=False))
    if any(is_lazy(parameter) for parameter in parameters):
        raise UserError(
            f"{name} ({kind}) has no weight before its first forward pass: run one, then build the optimizer and RePr"
        )
    # fully_shard makes them DTensors; FullyShardedDataParallel keeps one flat parameter.
    if kind == "FullyShardedDataParallel" or any(hasattr(parameter, "device_mesh") for parameter in parameters):
        raise UserError(
            f"the parameters of {name or 'the model'} ({kind}) are sharded over processes (FSDP): use "
            "DistributedDataParallel"
        )


def what_attention_means(model: nn.Module) -> str:
    kinds = [type(module).__name__ for module in model.modules() if "attention" in type(module).__name__.lower()]
    if not kinds:
        return ""
    return f". This model has attention ({kinds[0]}), whose weights are in linear layers: take a convolutional backbone"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _norm_of(model: nn.Module, name: str, conv: nn.Conv2d) -> nn.Module | None:
    own = getattr(conv, "norm", None)
    if isinstance(own, nn.Module) and is_norm(own):
        return own
    siblings = list(model.get_submodule(name.rpartition(".")[0]).children())
    followers: Any = siblings[siblings.index(conv) + 1 :]
    if not followers or not is_norm(followers[0]) or followers[0].weight is None:
        return None
    return followers[0] if len(followers[0].weight) == conv.out_channels else None
