"""The forward passes that the slim sub-network puts in place of those of convs, norms and residual blocks.

Shape shorthand:
    J: filters of a layer
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repr_det.method.blocks import CONV_FORWARDS, NORM_FORWARDS
from repr_det.method.layers import BATCH, FROZEN, FilterLayer, norm_kind
from repr_det.method.slices import Rows, Selection, add_channels, slice_of, sliced_conv

_PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")  # what a norm of NORM_FORWARDS holds for each channel

# How often a conv's forward and backward pass move a weight, reordering it for its kernels (docs/performance.md).
_MOVES = 14


@dataclass(frozen=True)
class Work:
    """Operations of convs (2 a multiply-add) and bytes of weights and channels that are moved for them."""

    operations: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.operations + other.operations, self.bytes + other.bytes)


class Zeros:
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


class SlimForward(ABC):
    """A forward pass of a module that stands in for its class's where ``takes`` says so."""

    @abstractmethod
    def takes(self, x: Tensor) -> bool: ...

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor: ...


def is_sliceable(conv: nn.Module) -> bool:
    return (
        type(conv).forward in CONV_FORWARDS
        and "forward" not in conv.__dict__
        and conv._compiled_call_impl is None  # somebody has compiled it
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def is_channelwise(norm: nn.Module) -> bool:
    return type(norm).forward in NORM_FORWARDS and "forward" not in norm.__dict__ and norm._compiled_call_impl is None


class ConvForward(SlimForward):
    """Forward pass of nn.Conv2d, or of a conv with its norm inside (Detectron2's), for some rows (all where None) and
    input channels.

    ``scatter`` puts the result into zeros at the dropped channels. Before a norm that is not sliced the zeros come
    first, after one that is they come last. So does a conv whose result goes to its ``block``, where that does not run
    its slim pass. ``zeros`` are what the passes of its block leave out: the first conv of them decides, the others go
    by what it gives them.
    """

    block: "BlockForward | None" = None
    positions = 0  # images times places of the last pass

    def __init__(
        self,
        conv: nn.Conv2d,
        rows: Rows | None,
        columns: Rows | None,
        scatter: bool,
        slices_norm: bool,
        zeros: Sequence[Zeros],
    ) -> None:
        self.conv = conv
        self.rows = rows
        self.of_weight = Selection(rows, columns, conv.weight[0, 0].numel())
        self.of_bias = Selection(rows)
        self.scatter = scatter
        self.slices_norm = slices_norm
        self.folds = is_foldable(getattr(conv, "norm", None))
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


def is_foldable(norm: nn.Module | None) -> bool:
    """Whether it is a FrozenBN that can become part of the conv before it."""
    return norm is not None and is_channelwise(norm) and norm_kind(norm) == FROZEN


def _frozen_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """FrozenBN as x * scale + shift, each (J,)."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


class NormForward(SlimForward):
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


class BlockForward(SlimForward):
    """Forward pass of a residual block whose last conv returns some channels only."""

    def __init__(self, block: nn.Module, chain: list[nn.Module], rows: Rows, zeros: Sequence[Zeros]) -> None:
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
