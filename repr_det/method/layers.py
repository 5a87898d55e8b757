"""Which convs take part in RePr, and what one filter of such a conv is.

A filter is one output channel: its row of the conv weight, its entry of the bias and its entries of the norm's affine
parameters (buffers for FrozenBN). Setting all of these to zero makes the channel exactly zero after conv and norm.
"""

import fnmatch
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from repr_det.method.errors import UserError
from repr_det.method.features import why_not_features
from repr_det.method.wiring import WiringWatch, norms_in_a_pass

logger = logging.getLogger("repr_det.layers")

BATCH, FROZEN, GROUP, NONE = "batch", "frozen", "group", "none"


def norm_kind(norm: nn.Module | None) -> str | None:
    """ "batch" (BN, SyncBN, naiveSyncBN), "frozen" (FrozenBN), "group" (GN), "none", or None where RePr cannot say what
    a dropped channel means there."""
    if norm is None or isinstance(norm, nn.Identity):
        return NONE
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return BATCH
    if isinstance(norm, nn.GroupNorm):
        return GROUP
    # torchvision and Detectron2 have a class each, of this name and with the same four buffers.
    return FROZEN if type(norm).__name__ == "FrozenBatchNorm2d" else None


@dataclass(eq=False)
class FilterLayer:
    """A conv that takes part, with the norm that follows it.

    Attributes:
        name: the conv's module name.
        conv: weight (J, C_in / groups, kh, kw), bias (J,) or None.
        norm: a module of J channels, or None.
        named: whether a user has said that this is its norm.
    """

    name: str
    conv: nn.Conv2d
    norm: Any = None  # to a type checker every attribute of an nn.Module may be a tensor or a module
    named: bool = False

    def __post_init__(self) -> None:
        if norm_kind(self.norm) is None:
            raise UserError(
                f"REPR cannot drop filters of {self.name}: its norm {type(self.norm).__name__} is none of BN, SyncBN, "
                f"FrozenBN and GN; add {self.name!r} to REPR.LAYERS.EXCLUDE or change MODEL.*.NORM"
            )
        if self.kind != NONE and self.norm.weight is None:
            raise UserError(
                f"REPR cannot drop filters of {self.name}: its norm {type(self.norm).__name__} has no weight "
                f"(affine=False) to switch a channel off with; add {self.name!r} to REPR.LAYERS.EXCLUDE"
            )
        if _moves_zero(getattr(self.norm, "act", None)):
            raise UserError(
                f"REPR cannot drop filters of {self.name}: the activation {type(self.norm.act).__name__} in its norm "
                f"{type(self.norm).__name__} does not map 0 to 0; add {self.name!r} to REPR.LAYERS.EXCLUDE"
            )
        if not _owns_weight(self.conv):
            raise UserError(
                f"REPR cannot drop filters of {self.name}: its weight is re-parametrised (weight norm, spectral norm, "
                f"pruning); add {self.name!r} to REPR.LAYERS.EXCLUDE"
            )

    @property
    def kind(self) -> str:
        """What the norm is: "batch", "frozen", "group" or "none", see ``norm_kind``."""
        return norm_kind(self.norm)  # type: ignore[return-value]

    @property
    def is_frozen(self) -> bool:
        """Whether the norm's statistics stay as they are while the conv trains: FrozenBN, and BN put into eval mode."""
        if self.kind == BATCH:
            return self.norm.running_mean is not None and self.conv.training and not self.norm.training
        return self.kind == FROZEN

    @property
    def num_filters(self) -> int:
        """J, the conv's output channels."""
        return self.conv.out_channels

    @property
    def weight(self) -> Tensor:
        """The conv's weight (J, C_in / groups, kh, kw)."""
        return self.conv.weight

    def of_group(self, group: int) -> slice:
        """The filters of a group of a grouped conv, all of which look at the same input channels."""
        size = self.num_filters // self.conv.groups
        return slice(group * size, (group + 1) * size)

    def tensors(self) -> dict[str, Tensor]:
        """Everything whose row f belongs to filter f and has to be zero while f is dropped: each (J, ...)."""
        found = {"weight": self.conv.weight, "bias": self.conv.bias}
        if self.kind != NONE:
            found["norm.weight"] = self.norm.weight
            found["norm.bias"] = self.norm.bias  # None where it was made without
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def parameters(self) -> Iterator[nn.Parameter]:
        """The members of ``tensors`` that an optimizer may move."""
        return (t for t in self.tensors().values() if isinstance(t, nn.Parameter))

    def moving_parameters(self) -> list[nn.Parameter]:
        """The parameters whose gradient is not zero by itself where the filter is zero.

        Behind BN and FrozenBN the gradient of a conv row and its bias is that of the norm's output times a gamma of
        exactly 0. GN computes its statistics from all channels of a group, and without a norm nothing is in between.
        """
        found = self.tensors()
        if self.kind in (BATCH, FROZEN):
            found = {name: tensor for name, tensor in found.items() if name.startswith("norm.")}
        return [t for t in found.values() if isinstance(t, nn.Parameter) and t.requires_grad]

    def running_statistics(self) -> tuple[Tensor, Tensor] | None:
        """Running mean and variance, each (J,), of a batch or frozen norm that keeps them."""
        if self.kind in (BATCH, FROZEN) and self.norm.running_mean is not None:
            return self.norm.running_mean, self.norm.running_var
        return None

    def output_module(self) -> nn.Module:
        """The module whose output is the channel after conv and norm (Detectron2 runs the norm inside the conv)."""
        if self.norm is None or getattr(self.conv, "norm", None) is self.norm:
            return self.conv
        return self.norm


@torch.no_grad()
def zero_rows_(tensors: Iterable[Tensor], rows: Tensor) -> None:
    """Sets rows (M,) of every tensor (J, ...) to exactly 0, whatever was there (NaN included)."""
    for tensor in tensors:
        tensor.index_fill_(0, rows, 0)


def find_filter_layers(
    model: nn.Module,
    include: Sequence[str],
    exclude: Sequence[str] = (),
    norms: Mapping[str, nn.Module | None] | None = None,
    sample: Any = None,
) -> list[FilterLayer]:
    """The trainable Conv2d modules whose names match, in the order of the model.

    Frozen convs, the offset convs of deformable blocks, convs that put out predictions and those of gates (squeeze and
    excitation) never take part. The norm of a conv is ``norms[name]`` where given, else its attribute ``norm``
    (Detectron2), else the one that its output goes into in a forward pass of ``sample``, else (no sample, or a conv
    that it does not reach) the module that directly follows it in its parent if that is a norm (torchvision's conv1,
    bn1 and nn.Sequential(conv, bn, ...)); a BN or GN over other channels is not its own.

    Args:
        model: not wrapped in DistributedDataParallel.
        include, exclude: fnmatch patterns on module names.
        norms: conv name -> the norm that follows it, for models of another shape.
        sample: what the model is called with once to see which norm follows which conv: a batch of images, or a tuple
            of several arguments. The model is left as it was.

    Raises:
        UserError: a module is lazy and has not run yet, or sharded (FSDP); no trainable conv matches the patterns, one
            has a norm or parametrisation that RePr cannot handle, or one shares a parameter with another module.
    """
    for key, patterns in (("INCLUDE", include), ("EXCLUDE", exclude)):
        if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns):
            raise UserError(f"REPR.LAYERS.{key} must be a list of patterns, got {patterns!r}")
    for name, module in model.named_modules():
        _check_whole(name, module)
    convs = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and not name.endswith("_offset")
    }
    trainable = [
        name
        for name, conv in convs.items()
        if (conv.weight.requires_grad if _owns_weight(conv) else any(p.requires_grad for p in conv.parameters()))
    ]
    matching = [n for n in trainable if _matches(n, include) and not _matches(n, exclude)]
    others = why_not_features(model)
    chosen = [name for name in matching if name not in others]
    left_out = _abbreviated([f"{name} ({others[name]})" for name in matching if name in others])
    if len(chosen) < len(matching):
        logger.warning("RePr: these put out something else than features and keep all their filters: %s", left_out)
    if not chosen:
        frozen = sum(_matches(name, include) for name in convs) - sum(_matches(n, include) for n in trainable)
        raise UserError(
            f"REPR.LAYERS.INCLUDE {list(include)} less EXCLUDE {list(exclude)} matches no trainable Conv2d"
            + (f" ({frozen} that match are frozen, see MODEL.BACKBONE.FREEZE_AT)" if frozen else "")
            + (f" (not filters: {left_out})" if matching else "")
            + f"; trainable here: {_abbreviated(trainable)}{_transformer(model)}"
        )
    known = dict(norms or {})
    if sample is not None:
        apart = {n: convs[n] for n in chosen if getattr(convs[n], "norm", None) is None and n not in known}
        known |= norms_in_a_pass(model, sample, apart, [m for m in model.modules() if _looks_like_a_norm(m)])
    layers = [
        FilterLayer(name, convs[name], _norm_of(model, name, convs[name], known), name in (norms or {}))
        for name in chosen
    ]
    _check_sharing(model, layers)
    return layers


def _check_sharing(model: nn.Module, layers: list[FilterLayer]) -> None:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    norms: dict[int, str] = {}
    for layer in layers:
        sharing = {name for p in layer.parameters() for name in owners.get(id(p), []) if len(owners[id(p)]) > 1}
        if layer.kind != NONE:
            sharing.add(norms.setdefault(id(layer.norm), layer.name))
        if others := sorted(sharing - {layer.name}):
            raise UserError(
                f"REPR cannot drop filters of {layer.name}: it shares its weight or norm with {others[0]}; "
                f"add {layer.name!r} to REPR.LAYERS.EXCLUDE"
            )


def _check_whole(name: str, module: nn.Module) -> None:
    """Raises UserError where parameters are not there yet (lazy modules), or not all on this process (FSDP)."""
    parameters = list(module.parameters(recurse=False))
    if any(is_lazy(parameter) for parameter in parameters):
        raise UserError(
            f"REPR: {name} ({type(module).__name__}) has no weight before its first forward pass: run one, then build "
            "the optimizer and RePr"
        )
    # fully_shard makes them DTensors; FullyShardedDataParallel keeps one flat parameter.
    if type(module).__name__ == "FullyShardedDataParallel" or any(hasattr(p, "device_mesh") for p in parameters):
        raise UserError(
            f"REPR: the parameters of {name or 'the model'} ({type(module).__name__}) are sharded over processes "
            "(FSDP); filters are compared and renewed whole: use DistributedDataParallel"
        )


def _owns_weight(conv: nn.Conv2d) -> bool:
    """Whether the weight is a parameter, not computed from others before every forward pass."""
    return "weight" in dict(conv.named_parameters(recurse=False))


def _transformer(model: nn.Module) -> str:
    """Where a model is built of attention: why there is nothing to drop in it."""
    kinds = [type(module).__name__ for module in model.modules() if "attention" in type(module).__name__.lower()]
    if not kinds:
        return ""
    return (
        f". This model is a transformer: RePr drops output channels of convolutions behind their norm, and its weights "
        f"are those of {kinds[0]} and linear layers; take a convolutional backbone"
    )


def _moves_zero(activation: nn.Module | None) -> bool:
    """Whether an activation inside a norm (timm's BatchNormAct2d) makes something of a channel that is zero."""
    if not isinstance(activation, nn.Module) or any(True for _ in activation.parameters()):
        return False  # one with parameters is a PReLU, which maps 0 to 0
    return bool(activation(torch.zeros(1, device="cpu")).count_nonzero())


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _abbreviated(names: list[str], most: int = 12) -> str:
    shown = ", ".join(names[:most]) or "none"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _norm_of(model: nn.Module, name: str, conv: nn.Conv2d, norms: Mapping[str, nn.Module | None]) -> Any:
    if name in norms:
        return norms[name]
    if getattr(conv, "norm", None) is not None:
        return conv.norm
    siblings = list(model.get_submodule(name.rpartition(".")[0]).children())
    # By identity: Module.__eq__ is identity, and a conv may stand in its parent under one name only.
    position = siblings.index(conv) + 1
    follower: Any = siblings[position] if position < len(siblings) else None
    kind = norm_kind(follower)
    if kind in (BATCH, GROUP):
        channels = follower.num_features if kind == BATCH else follower.num_channels
    elif kind == FROZEN:
        channels = len(follower.weight)  # torchvision's keeps no num_features
    else:
        # A norm of another kind is returned for FilterLayer to refuse.
        return follower if _looks_like_a_norm(follower) else None
    return follower if channels == conv.out_channels else None


def watched(layers: Sequence[FilterLayer], model: nn.Module | None) -> WiringWatch:
    """Watches that the norms of ``layers`` are those of their convs, and that no other norm of ``model`` is."""
    # Norms inside convs (Detectron2's) are called by these, and what a user has said is so.
    pairs = {x.name: (x.conv, x.norm) for x in layers if not x.named and getattr(x.conv, "norm", None) is None}
    taken = {layer.norm for layer in layers}
    modules = {} if model is None else dict(model.named_modules())
    others = {name: module for name, module in modules.items() if _looks_like_a_norm(module) and module not in taken}
    return WiringWatch(pairs, others, lambda conv, norm: _caller(modules, conv) == _caller(modules, norm))


def _caller(modules: Mapping[str, nn.Module], name: str) -> str:
    """The module whose forward pass calls that of this name: a list or dict of modules has none."""
    name = name.rpartition(".")[0]
    while name and isinstance(modules[name], (nn.ModuleList, nn.ModuleDict)):
        name = name.rpartition(".")[0]
    return name


def _looks_like_a_norm(module: nn.Module | None) -> bool:
    return norm_kind(module) not in (NONE, None) or "norm" in type(module).__name__.lower()
