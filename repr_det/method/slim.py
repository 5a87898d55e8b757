"""Runs the sub-network without computing its dropped channels: the masked network's numbers at a part of its FLOPs.

While filters are dropped their conv rows, biases and affine norm parameters are zero, so their channels are zero. Here
they are left out of every conv instead. Parameters stay as they are, and with them optimizer, DDP, checkpoints and
state-dict keys: every forward pass slices them, every backward pass scatters the gradients into full tensors.

What takes effect is bound to this model and to its weights being zero. A copy, a pickle, a trace, a script or an export
is the masked network with the weights that it holds, and so is the model itself while other weights are in it.

Shape shorthand:
    J: filters of a layer    K: filters of it that are computed    I: input channels of a conv that are computed
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from repr_det.method.blocks import CONV_FORWARDS, NORM_FORWARDS, known_blocks
from repr_det.method.layers import BATCH, FROZEN, FilterLayer, norm_kind
from repr_det.method.slices import Rows, Selection, add_channels, slice_of, sliced_conv

logger = logging.getLogger("repr_det.slim")

_PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")  # what a norm of NORM_FORWARDS holds for each channel

# Kept counts are rounded up to a multiple of this by channels that are dropped, which changes no number. oneDNN (AVX2)
# computes in blocks of 8 channels: R50's backbone took no longer with multiples of 8 or 16 than with odd counts, in
# spite of the additional FLOPs. The half-precision kernels of cuDNN want multiples of 8.
_MULTIPLE = 8

# How often a conv's forward and backward pass move a weight, reordering it for its kernels (docs/performance.md).
_MOVES = 14

_traced_slim = False


@contextmanager
def traced_slim() -> Iterator[None]:
    """Inside, traces see the slim network, for tools that count its operations; they are of no other use."""
    global _traced_slim
    before, _traced_slim = _traced_slim, True
    try:
        yield
    finally:
        _traced_slim = before


@dataclass(frozen=True)
class Work:
    """Operations of convs (2 a multiply-add) and bytes of weights and channels that are moved for them."""

    operations: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.operations + other.operations, self.bytes + other.bytes)


class SlimNetwork:
    """Replaces the forward passes of a model's convs by ones that compute kept channels only, until ``remove``.

    Outputs, gradients and the running statistics of kept channels are the masked network's up to rounding, in training
    and in evaluation, under autocast too. Inside a block that ``blocks`` knows the kept channels flow on
    to the next conv, which leaves out the same input channels, and those of the last conv are added onto the shortcut;
    FrozenBN is folded into the sliced convs and into the shortcut's. Every other conv (FPN, plain nets, deformable
    blocks, and a conv before a grouped one) computes its kept rows and scatters them into zeros; before GN or a norm
    class of its own the zeros come first, for it may look at all channels. Grouped convs, padding modes other than
    zeros and convs whose forward pass is not in ``blocks.CONV_FORWARDS`` stay masked.

    Module calls are kept, so forward hooks fire; inside a block they see kept channels only. Under ``torch.compile``,
    ``torch.func`` and forward-mode differentiation dropped channels are computed, as zeros.

    Where dropped filters turn out not to be zero (weights that were loaded, an average that was swapped in), their
    block or conv computes all channels until they are zero again; a warning says so. That is looked at whenever weights
    are loaded, and on the CPU and in evaluation at every pass. While a GPU trains, values that are written by other
    means go unnoticed until the restore.

    Args:
        model: on its final device, wrapped in DistributedDataParallel or not.
        layers: those whose filters are dropped; every tensor of a dropped filter must be zero while installed.
        masks: layer name -> (J,) bool, True = dropped; a layer that is missing keeps all its filters.
        multiple: what kept counts are rounded up to; 1 computes kept channels only.

    Raises:
        ValueError: a mask has the wrong length or drops all filters of a layer.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[FilterLayer], masks: Mapping[str, Tensor], multiple: int = _MULTIPLE
    ) -> None:
        self.model = model
        self.layers = list(layers)
        self.masks = dict(masks)
        self.multiple = multiple
        self._replaced: list[nn.Module] = []
        self._handles: list[Any] = []
        self._zeros: dict[nn.Module, _Zeros] = {}
        for layer in self.layers:
            mask = self.masks.get(layer.name)
            if mask is not None and (len(mask) != layer.num_filters or bool(mask.all())):
                raise ValueError(
                    f"the mask of {layer.name} must keep at least one of {layer.num_filters} filters, got "
                    f"{len(mask)} entries of which {int(mask.sum())} drop one"
                )

    @property
    def installed(self) -> bool:
        return bool(self._replaced)

    def install(self) -> None:
        """Takes effect with the next forward pass; a second call changes nothing."""
        if self.installed:
            return
        kept = {layer.conv: rows for layer in self.layers if (rows := self._kept(layer)) is not None}
        self._zeros = {x.conv: _Zeros(x, self.masks[x.name], self._warn) for x in self.layers if x.conv in kept}
        for zeros in self._zeros.values():
            for module in {zeros.layer.conv, zeros.layer.norm} - {None}:
                self._handles.append(module.register_load_state_dict_post_hook(_OnLoad(zeros)))
        for block, chain in known_blocks(self.model):
            self._install_block(block, chain, kept)
        for conv, rows in kept.items():
            self._install_conv(conv, rows, None, scatter=True)

    def remove(self) -> None:
        """Back to the masked network; a second call changes nothing."""
        for module in self._replaced:
            del module._compiled_call_impl
        for handle in self._handles:
            handle.remove()
        self._replaced, self._handles, self._zeros = [], [], {}

    def count(self) -> tuple["Work", "Work"]:
        """What the last forward pass and its backward pass take in the convs that leave out channels: slim, masked."""
        forwards = [module._compiled_call_impl.forward for module in self._replaced]
        works = [forward.count() for forward in forwards if isinstance(forward, _ConvForward)]
        return sum((slim for slim, _ in works), Work()), sum((masked for _, masked in works), Work())

    def __enter__(self) -> "SlimNetwork":
        self.install()
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _kept(self, layer: FilterLayer) -> Rows | None:
        """The rows to compute, or None where that is all of them or the conv has to stay masked."""
        mask = self.masks.get(layer.name)
        own_norm = getattr(layer.conv, "norm", None)
        if mask is None or not mask.any() or not _sliceable(layer.conv) or own_norm not in (None, layer.norm):
            return None
        mask = mask.to(layer.weight.device)
        extra = mask.nonzero().flatten()[: -int((~mask).sum()) % self.multiple]
        chosen = ~mask
        chosen[extra] = True
        if chosen.all():
            return None
        index = chosen.nonzero().flatten()
        inverse = torch.full_like(mask, len(index), dtype=torch.long)
        inverse[index] = torch.arange(len(index), device=index.device)
        return Rows(index, inverse.masked_fill(mask, len(index)))

    def _install_block(self, block: nn.Module, chain: list[nn.Module], kept: dict[nn.Module, Rows]) -> None:
        given = None
        zeros = [self._zeros[conv] for conv in chain if conv in kept]
        for conv, follower in zip(chain, [*chain[1:], None], strict=True):
            rows = kept.pop(conv, None)
            flows_on = (
                rows is not None
                and getattr(conv, "activation", None) is None
                and (getattr(conv, "norm", None) is None or _channelwise(conv.norm))
                and (follower is None or _sliceable(follower))
            )
            if rows is not None or given is not None:
                installed = self._install_conv(conv, rows, given, scatter=not flows_on, zeros=zeros)
            given = rows if flows_on else None
        if given is not None:
            shortcut = block.shortcut
            if shortcut is not None and shortcut not in kept and _sliceable(shortcut) and _folds(shortcut.norm):
                self._install_conv(shortcut, None, None, scatter=False)
            installed.block = _BlockForward(block, chain, given, zeros)
            self._replace(block, installed.block)

    def _install_conv(
        self,
        conv: nn.Module,
        rows: Rows | None,
        columns: Rows | None,
        scatter: bool,
        zeros: "Sequence[_Zeros] | None" = None,
    ) -> "_ConvForward":
        norm = getattr(conv, "norm", None)
        slices_norm = norm is not None and rows is not None and _channelwise(norm)
        if zeros is None:
            zeros = [self._zeros[conv]] if rows is not None else []
        forward = _ConvForward(conv, rows, columns, scatter and rows is not None, slices_norm, zeros)
        if slices_norm:
            self._replace(norm, _NormForward(norm, rows))
        self._replace(conv, forward)
        return forward

    def _warn(self, name: str) -> None:
        if not any(zeros.broken for zeros in self._zeros.values()):  # one line for all layers of a checkpoint
            logger.warning(
                "RePr: dropped filters are not zero any more (first seen: %s): other weights were written into the "
                "model in its sub-network phase. Their channels are computed until they are zero again; a restore "
                "needs them zero",
                name,
            )

    def _replace(self, module: nn.Module, forward: "_SlimForward") -> None:
        # Not ``module.forward``: this attribute is what a module's call looks at, what torch leaves out of copies and
        # pickles, and what compilers and scripts pass by.
        module._compiled_call_impl = _SlimCall(module, forward)
        self._replaced.append(module)


class _Zeros:
    """The dropped filters of a layer, and whether what makes their channels zero still is."""

    def __init__(self, layer: FilterLayer, mask: Tensor, warn: Callable[[str], None]) -> None:
        self.layer = layer
        self.warn = warn
        self.rows = mask.to(layer.weight.device).nonzero().flatten()
        self.parameters = {name: t for name, t in layer.tensors().items() if isinstance(t, nn.Parameter)}
        self.broken = False

    @torch.no_grad()
    def look(self) -> bool:
        """Whether the channels are zero by the values that the model holds now."""
        tensors = self.layer.tensors()
        if self.layer.kind in (BATCH, FROZEN):  # whatever comes out of the conv
            tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("norm.")}
        broken = any(bool(tensor.index_select(0, self.rows).any()) for tensor in tensors.values())
        if broken and not self.broken:
            self.warn(self.layer.name)
        self.broken = broken
        return not broken

    def hold(self, training: bool) -> bool:
        """The same at the start of a pass; while a GPU trains by what the last look found, for a look waits for it."""
        tensors = self.layer.tensors()
        if any(tensors[name] is not parameter for name, parameter in self.parameters.items()):
            return False  # torch.func.functional_call, or load_state_dict(assign=True)
        if training and torch.is_grad_enabled() and self.rows.is_cuda:
            return not self.broken
        return self.look()


class Absent:
    """Not there in deep copies and pickles: its place holds None, or what ``absent`` says."""

    @staticmethod
    def absent() -> Any:
        return None

    def __deepcopy__(self, memo: dict) -> Any:
        return self.absent()

    def __reduce__(self) -> tuple:
        return type(self).absent, ()


class _OnLoad(Absent):
    """Looks after weights have been loaded into a conv or its norm."""

    def __init__(self, zeros: _Zeros) -> None:
        self.zeros = zeros

    def __call__(self, module: nn.Module, incompatible_keys: Any) -> None:
        self.zeros.look()

    @staticmethod
    def absent() -> Any:
        return _nothing_on_load


def _nothing_on_load(module: nn.Module, incompatible_keys: Any) -> None:
    pass


class _SlimForward(ABC):
    """A forward pass of a module that stands in for its class's where ``takes`` says so."""

    @abstractmethod
    def takes(self, x: Tensor) -> bool: ...

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor: ...


class _SlimCall(Absent):
    """What calling a module does: its hooks as ever, and between them the slim forward pass where it applies."""

    def __init__(self, module: nn.Module, forward: _SlimForward) -> None:
        self.module = module
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        held = self.module.__dict__
        if (
            kwargs
            or len(args) != 1
            or "forward" in held
            or not _is_computed(args[0])
            or not self.forward.takes(args[0])
        ):
            return self.module._call_impl(*args, **kwargs)
        held["forward"] = self.forward
        try:
            return self.module._call_impl(*args)
        finally:
            held.pop("forward", None)


def _is_computed(x: Any) -> bool:
    """Whether nothing but autograd follows a pass: no tracer, compiler or exporter, which make a graph for later, nor
    torch.func and forward-mode differentiation, which know torch's own operations only."""
    if not torch.is_tensor(x) or torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad.unpack_dual(x).tangent is not None:
        return False
    return _traced_slim or not torch.jit.is_tracing()


def _sliceable(conv: nn.Module) -> bool:
    return (
        type(conv).forward in CONV_FORWARDS
        and "forward" not in conv.__dict__
        and conv._compiled_call_impl is None  # somebody has compiled it
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def _channelwise(norm: nn.Module) -> bool:
    return type(norm).forward in NORM_FORWARDS and "forward" not in norm.__dict__ and norm._compiled_call_impl is None


class _ConvForward(_SlimForward):
    """Forward pass of nn.Conv2d, or of a conv with its norm inside (Detectron2's), for some rows (all where None) and
    input channels.

    ``scatter`` puts the result into zeros at the dropped channels. Before a norm that is not sliced the zeros come
    first, after one that is they come last. So does a conv whose result goes to its ``block``, where that does not run
    its slim pass. ``zeros`` are what the passes of its block leave out: the first conv of them decides, the others go
    by what it gives them.
    """

    block: "_BlockForward | None" = None
    positions = 0  # images times places of the last pass

    def __init__(
        self,
        conv: nn.Conv2d,
        rows: Rows | None,
        columns: Rows | None,
        scatter: bool,
        slices_norm: bool,
        zeros: Sequence[_Zeros],
    ) -> None:
        self.conv = conv
        self.rows = rows
        self.of_weight = Selection(rows, columns, conv.weight[0, 0].numel())
        self.of_bias = Selection(rows)
        self.scatter = scatter
        self.slices_norm = slices_norm
        self.folds = _folds(getattr(conv, "norm", None))
        self.takes_part_of_input = columns is not None
        self.inputs = conv.in_channels if columns is None else len(columns.index)
        self.zeros = zeros

    def takes(self, x: Tensor) -> bool:
        if x.dim() != 4 or x.shape[1] != self.inputs:
            return False
        return self.takes_part_of_input or all([zeros.hold(self.conv.training) for zeros in self.zeros])

    def __call__(self, x: Tensor) -> Tensor:
        conv, rows = self.conv, self.rows
        norm, activation = getattr(conv, "norm", None), getattr(conv, "activation", None)
        # Somebody who looks at the norm's input or output wants it to be called.
        folds = self.folds and not norm._forward_hooks and not norm._forward_pre_hooks
        scale = shift = None
        if folds:
            scale, shift = _frozen_affine(norm)
            if rows is not None:
                scale, shift = scale.index_select(0, rows.index), shift.index_select(0, rows.index)
        bias = conv.bias
        if bias is not None and (rows is not None or folds):
            bias = slice_of(bias, self.of_bias, scale)
        if folds:
            bias = shift if bias is None else bias + shift
        x = sliced_conv(x, conv, self.of_weight, scale, bias)
        self.positions = x.shape[0] * x.shape[2:].numel()
        if self.slices_norm and not folds:
            x = norm(x)
        if self.scatter or (self.block is not None and not self.block.runs):
            x = add_channels(x.new_zeros(()).expand(x.shape[0], len(rows.inverse), *x.shape[2:]), x, rows.index)
        if norm is not None and not self.slices_norm and not folds:
            x = norm(x)
        return x if activation is None else activation(x)

    def count(self) -> tuple[Work, Work]:
        """See ``SlimNetwork.count``."""
        weight = self.conv.weight
        filters, taps = len(weight), weight[0, 0].numel()
        kept = filters if self.rows is None else len(self.rows.index)
        part, whole, size = kept * self.inputs * taps, weight.numel(), weight.element_size()
        moved = _MOVES * part
        if part < whole:  # a slice is read and written; its gradient padded, gathered and written in full
            moved += 4 * part + 2 * whole
        if self.scatter:  # fills the whole, adds the part, gathers its gradient; larger than any cache
            moved += 2 * self.positions * (filters + 5 * kept)
        flops = 3 * 2 * self.positions
        return Work(flops * part, size * moved), Work(flops * whole, size * _MOVES * whole)


def _folds(norm: nn.Module | None) -> bool:
    """Whether it is a FrozenBN that can become part of the conv before it."""
    return norm is not None and _channelwise(norm) and norm_kind(norm) == FROZEN


def _frozen_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """FrozenBN as x * scale + shift, each (J,)."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


class _NormForward(_SlimForward):
    """Forward pass of a norm over some of its channels: its class's own, on slices of what it holds for each."""

    def __init__(self, norm: nn.Module, rows: Rows) -> None:
        self.norm = norm
        self.rows = rows
        self.selection = Selection(rows)

    def takes(self, x: Tensor) -> bool:
        return x.dim() == 4 and x.shape[1] == len(self.rows.index)

    def __call__(self, x: Tensor) -> Tensor:
        held, index = self.norm.__dict__, self.rows.index
        parameters, buffers = held["_parameters"], held["_buffers"]
        sliced = {
            name: tensor.index_select(0, index) if name in _PER_CHANNEL and tensor is not None else tensor
            for name, tensor in buffers.items()
        }
        held["_parameters"] = {
            name: None if tensor is None else slice_of(tensor, self.selection) for name, tensor in parameters.items()
        }
        held["_buffers"] = sliced
        try:
            x = type(self.norm).forward(self.norm, x)
        finally:
            held["_parameters"], held["_buffers"] = parameters, buffers
        if self.norm.training and norm_kind(self.norm) != FROZEN:
            with torch.no_grad():
                for name in ("running_mean", "running_var"):
                    if buffers[name] is not None:
                        buffers[name].index_copy_(0, index, sliced[name])
        return x


class _BlockForward(_SlimForward):
    """Forward pass of a residual block whose last conv returns some channels only."""

    def __init__(self, block: nn.Module, chain: list[nn.Module], rows: Rows, zeros: Sequence[_Zeros]) -> None:
        self.block = block
        self.chain = chain
        self.rows = rows
        self.zeros = zeros
        self.runs = False

    def takes(self, x: Tensor) -> bool:
        return x.dim() == 4 and all([zeros.hold(self.block.training) for zeros in self.zeros])

    def __call__(self, x: Tensor) -> Tensor:
        out = x
        self.runs = True
        try:
            for number, conv in enumerate(self.chain):
                out = conv(F.relu_(out) if number else out)
        finally:
            self.runs = False
        shortcut = x if self.block.shortcut is None else self.block.shortcut(x)
        if out.shape[1] == shortcut.shape[1]:  # what its last conv computes if called with all channels
            return F.relu_(out + shortcut)
        return F.relu_(add_channels(shortcut, out, self.rows.index))
