"""The convs that may take part in RePr, and what one filter of such a conv is.

A filter is one output channel: its row of the conv weight and its entries of the bias and the norm's affine parameters.
"""

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from repr_det.method.distributed import to_cpu, to_devices
from repr_det.method.errors import OptionError, UserError
from repr_det.network.norms import BATCH, FROZEN, NONE, is_norm, norm_kind
from repr_det.network.proof import Reader

Values = dict[str, dict[str, Tensor]]  # layer name -> name -> tensor


@dataclass(eq=False)
class FilterLayer:
    """A conv that takes part, with the norm that follows it.

    Attributes:
        name: the conv's module name.
        conv: weight (J, C_in / groups, kh, kw), bias (J,) or None.
        norm: a module of J channels, or None.
        norm_name: its module name, or None.
        readers: who reads its channels, where a traced pass has shown that.
        rectified: whether a ReLU, and nothing else, follows the norm.
    """

    name: str
    conv: nn.Conv2d
    norm: Any = None  # to a type checker every attribute of an nn.Module may be a tensor or a module
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
        """J, the conv's output channels."""
        return self.conv.out_channels

    @property
    def weight(self) -> Tensor:
        """The conv's weight (J, C_in / groups, kh, kw)."""
        return self.conv.weight

    def tensors(self) -> dict[str, Tensor]:
        """Everything whose row f has to be zero while filter f is dropped: each (J, ...)."""
        found = {"weight": self.conv.weight, "bias": self.conv.bias}
        if self.kind != NONE:
            found["norm.weight"] = self.norm.weight
            found["norm.bias"] = self.norm.bias  # None where it was made without
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def parameters(self) -> Iterator[nn.Parameter]:
        """The members of ``tensors`` that an optimizer may move."""
        return (t for t in self.tensors().values() if isinstance(t, nn.Parameter))

    def running_statistics(self) -> dict[str, Tensor]:
        """Running mean and variance, each (J,), of a norm that keeps them."""
        names = ("running_mean", "running_var") if self.kind in (BATCH, FROZEN) else ()
        found = {f"norm.{name}": getattr(self.norm, name) for name in names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def output_module(self) -> nn.Module:
        """The module whose output is the channel after conv and norm (Detectron2 runs the norm inside the conv)."""
        if self.norm is None or any(module is self.norm for module in self.conv.modules()):
            return self.conv
        return self.norm


@torch.no_grad()
def zero_rows_(tensors: Iterable[Tensor], rows: Tensor) -> None:
    """Sets rows (M,) of every tensor (J, ...) to exactly 0, whatever was there (NaN included)."""
    for tensor in tensors:
        tensor.index_fill_(0, rows.to(tensor.device), 0)


def values_of(layers: Sequence[FilterLayer]) -> Values:
    """All that belongs to the filters of layers, each (J, ...) on the CPU: by one transfer, or as it is there."""
    named = [
        (layer.name, name, tensor)
        for layer in layers
        for name, tensor in {**layer.tensors(), **layer.running_statistics()}.items()
    ]
    found: Values = {layer.name: {} for layer in layers}
    for (layer, name, _), value in zip(named, to_cpu([tensor for *_, tensor in named]), strict=True):
        found[layer][name] = value
    return found


def on_devices(values: Values, layers: Sequence[FilterLayer]) -> Values:
    """Values of layers, each on the device of its layer, by one transfer."""
    named = [(layer, name) for layer in layers for name in values[layer.name]]
    tensors = [values[layer.name][name] for layer, name in named]
    found: Values = {layer.name: {} for layer in layers}
    moved = to_devices(tensors, [layer.weight.device for layer, _ in named])
    for (layer, name), value in zip(named, moved, strict=True):
        found[layer.name][name] = value
    return found


def find_filter_layers(
    model: nn.Module,
    include: Sequence[str],
    exclude: Sequence[str] = (),
    norms: Mapping[str, nn.Module | None] | None = None,
) -> list[FilterLayer]:
    """The trainable Conv2d modules whose names match, in the order of the model, with the norms that they seem to have.

    The norm of a conv is ``norms[name]`` where given, else its attribute ``norm``, else the next module in its parent
    if that is a norm of as many channels. ``RePr`` and ``RePrHook`` go by what a training pass shows instead.

    Args:
        model: not wrapped in DistributedDataParallel.
        include, exclude: fnmatch patterns on module names.
        norms: conv name -> the norm that follows it, for models of another shape.

    Raises:
        UserError: a module is lazy and has not run yet, or sharded (FSDP), or no trainable conv matches the patterns.
    """
    for key, patterns in (("layers", include), ("exclude", exclude)):
        if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns):
            raise OptionError(f"{{{key}}} must be a list of patterns, got {patterns!r}")
    for name, module in model.named_modules():
        _check_whole(name, module)
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    trainable = [name for name, conv in convs.items() if any(p.requires_grad for p in conv.parameters())]
    chosen = [name for name in trainable if _matches(name, include) and not _matches(name, exclude)]
    if not chosen:
        raise OptionError(_nothing_matches(model, convs, trainable, include, exclude))
    names = {module: name for name, module in model.named_modules()}
    found = []
    for name in chosen:
        norm = norms[name] if norms is not None and name in norms else _norm_of(model, name, convs[name])
        found.append(FilterLayer(name, convs[name], norm, None if norm is None else names.get(norm)))
    return found


def _nothing_matches(
    model: nn.Module, convs: Mapping[str, nn.Module], trainable: list[str], include: Sequence[str], exclude: Any
) -> str:
    frozen = sum(_matches(name, include) for name in convs) - sum(_matches(name, include) for name in trainable)
    left_out = f" less {{exclude}} {list(exclude)}" if exclude else ""
    hint = f" ({frozen} that match are frozen)" if frozen else ""
    nearest = _abbreviated(closest(include, trainable))
    return (
        f"{{layers}} {list(include)}{left_out} matches no trainable Conv2d{hint}; the closest trainable ones: {nearest}"
        f"{what_attention_means(model)}"
    )


def closest(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """``names`` in order of how much they have in common with the first of ``patterns``."""
    import difflib

    first = patterns[0].replace("*", "") if patterns else ""

    def likeness(name: str) -> float:
        return difflib.SequenceMatcher(None, first, name).ratio()

    return sorted(names, key=likeness, reverse=True)


def _check_whole(name: str, module: nn.Module) -> None:
    """Raises UserError where parameters are not there yet (lazy modules), or not all on this process (FSDP)."""
    parameters = list(module.parameters(recurse=False))
    if any(is_lazy(parameter) for parameter in parameters):
        raise UserError(
            f"{name} ({type(module).__name__}) has no weight before its first forward pass: run one, then build the "
            "optimizer and RePr"
        )
    # fully_shard makes them DTensors; FullyShardedDataParallel keeps one flat parameter.
    if type(module).__name__ == "FullyShardedDataParallel" or any(hasattr(p, "device_mesh") for p in parameters):
        raise UserError(
            f"the parameters of {name or 'the model'} ({type(module).__name__}) are sharded over processes (FSDP); "
            "filters are compared and renewed whole: use DistributedDataParallel"
        )


def what_attention_means(model: nn.Module) -> str:
    """A sentence on a model that is built of attention, in which there is next to nothing to drop; else nothing."""
    kinds = [type(module).__name__ for module in model.modules() if "attention" in type(module).__name__.lower()]
    if not kinds:
        return ""
    return (
        f". This model has attention ({kinds[0]}): RePr drops output channels of convolutions, and most of its weights "
        f"are those of linear layers; take a convolutional backbone"
    )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _abbreviated(names: list[str], most: int = 12) -> str:
    shown = ", ".join(names[:most]) or "none"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _norm_of(model: nn.Module, name: str, conv: nn.Conv2d) -> nn.Module | None:
    own = getattr(conv, "norm", None)
    if isinstance(own, nn.Module) and is_norm(own):
        return own
    siblings = list(model.get_submodule(name.rpartition(".")[0]).children())
    position = siblings.index(conv) + 1
    follower: Any = siblings[position] if position < len(siblings) else None
    if follower is None or not is_norm(follower) or follower.weight is None:
        return None
    return follower if len(follower.weight) == conv.out_channels else None
