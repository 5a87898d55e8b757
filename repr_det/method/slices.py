"""Parts of tensors and convs on them, with gradients in the tensor's own shape: what ``slim`` computes with.

All can be differentiated as often as torch's own. A slice is a gather, and its gradient a gather from a padded copy:
each writes its result once.

Shape shorthand:
    J, K: rows of a tensor, those that are taken        C: input channels of a conv weight
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Rows(NamedTuple):
    """Which of the J rows of a tensor are computed.

    Attributes:
        index: (K,) ascending.
        inverse: (J,) position of a row in ``index``, K for those that are dropped, also where they are computed.
    """

    index: Tensor
    inverse: Tensor


class Selection:
    """Rows of tensors (J, ...) and, of conv weights (J, C, kh, kw), input channels; None takes all."""

    def __init__(self, rows: Rows | None, columns: Rows | None = None, taps: int = 1) -> None:
        self.rows = rows
        self.columns = columns
        self.taken = self.put_back = None
        if rows is not None and columns is not None and taps > 1:
            # One gather instead of two, in both directions, on a weight seen as a table of kernels (J * C, kh * kw).
            width, padded = len(columns.inverse), len(columns.index) + 1
            self.taken = (rows.index[:, None] * width + columns.index).flatten().int()
            self.put_back = (rows.inverse[:, None] * padded + columns.inverse).flatten().int()

    def take(self, tensor: Tensor) -> Tensor:
        if self.taken is not None:
            kernels = tensor.reshape(-1, tensor.shape[2:].numel()).index_select(0, self.taken)
            return kernels.view(len(self.rows.index), len(self.columns.index), *tensor.shape[2:])
        if self.rows is not None:
            tensor = tensor.index_select(0, self.rows.index)
        return tensor if self.columns is None else tensor.index_select(1, self.columns.index)

    def put(self, part: Tensor, scale: Tensor | None, shape: torch.Size) -> Tensor:
        """``take`` turned round: part * scale in a tensor of ``shape``, 0 elsewhere."""
        # Gathering from a copy with a zero row and column at the end writes the large tensor once; zeros and adding
        # into them, what autograd does after index_select, pass over it three times and took 2.3 times as long.
        part = part.reshape(len(part), part.shape[1] if part.dim() > 1 else 1, -1)
        count, width, taps = part.shape
        padded = part.new_empty(count + (self.rows is not None), width + (self.columns is not None), taps)
        if scale is None:
            padded[:count, :width] = part
        else:
            torch.mul(part, scale.view(-1, 1, 1), out=padded[:count, :width])
        padded[count:] = 0
        padded[:, width:] = 0
        if self.put_back is not None:
            return padded.view(-1, taps).index_select(0, self.put_back).view(shape)
        if self.columns is not None:
            padded = padded.index_select(1, self.columns.inverse)
        return (padded if self.rows is None else padded.index_select(0, self.rows.inverse)).view(shape)


class _Slice(torch.autograd.Function):
    """``selection.take(tensor)`` times scale (K,), which takes no gradient; that of ``tensor`` is zero outside."""

    @staticmethod
    def forward(ctx, tensor: Tensor, selection: Selection, scale: Tensor | None) -> Tensor:
        ctx.shape, ctx.selection = tensor.shape, selection
        ctx.save_for_backward(scale)
        return _take(tensor, selection, scale)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return _Put.apply(grad, ctx.selection, ctx.saved_tensors[0], ctx.shape), None, None


class _Put(torch.autograd.Function):
    """``selection.put``, the gradient of ``_Slice``, whose gradient is ``_Slice`` again."""

    @staticmethod
    def forward(ctx, part: Tensor, selection: Selection, scale: Tensor | None, shape: torch.Size) -> Tensor:
        ctx.selection = selection
        ctx.save_for_backward(scale)
        return selection.put(part, scale, shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return _Slice.apply(grad, ctx.selection, ctx.saved_tensors[0]), None, None, None


def _take(tensor: Tensor, selection: Selection, scale: Tensor | None) -> Tensor:
    taken = selection.take(tensor)
    if scale is None:
        return taken
    return torch.mul(taken, _along_rows(scale, taken), out=None if taken is tensor else taken)


def _along_rows(scale: Tensor, like: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (like.dim() - 1))


def slice_of(tensor: Tensor, selection: Selection, scale: Tensor | None = None) -> Tensor:
    """``selection.take(tensor)``, its rows times ``scale`` (K,)."""
    if torch.jit.is_tracing():  # FLOP counters: the tracer does not know the Function
        tensor = selection.take(tensor)
        return tensor if scale is None else tensor * _along_rows(scale, tensor)
    return _Slice.apply(tensor, selection, scale)


class _SlicedConv(torch.autograd.Function):
    """``conv2d(x, _Slice(weight) , bias)`` that slices anew for the backward pass instead of keeping the slice."""

    @staticmethod
    def forward(
        ctx, x: Tensor, tensor: Tensor, bias: Tensor | None, selection: Selection, scale: Tensor | None, options: tuple
    ) -> Tensor:
        ctx.save_for_backward(x, tensor, scale)
        ctx.selection, ctx.options = selection, options
        ctx.bias_shape = None if bias is None else list(bias.shape)
        return F.conv2d(x, _take(tensor, selection, scale), bias, *options)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        x, tensor, scale = ctx.saved_tensors
        part = _Slice.apply(tensor, ctx.selection, scale)
        mask = [*ctx.needs_input_grad[:2], ctx.bias_shape is not None and ctx.needs_input_grad[2]]
        of_x, of_part, of_bias = torch.ops.aten.convolution_backward(
            grad, x, part, ctx.bias_shape, *ctx.options, False, [0, 0], 1, mask
        )
        of_tensor = _Put.apply(of_part, ctx.selection, scale, tensor.shape) if mask[1] else None
        return of_x, of_tensor, of_bias, None, None, None


def sliced_conv(x: Tensor, conv: nn.Conv2d, selection: Selection, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """``conv`` of ``x`` by the ``slice_of`` its weight, and by a bias that is sliced already."""
    options = (conv.stride, conv.padding, conv.dilation)
    if torch.is_autocast_enabled(x.device.type) or torch.jit.is_tracing() or isinstance(conv.padding, str):
        return F.conv2d(x, slice_of(conv.weight, selection, scale), bias, *options)
    return _SlicedConv.apply(x, conv.weight, bias, selection, scale, options)


class _AddChannels(torch.autograd.Function):
    """``add_channels`` that keeps nothing but the index; autograd of index_add keeps the part as well."""

    @staticmethod
    def forward(ctx, whole: Tensor, part: Tensor, index: Tensor) -> Tensor:
        ctx.index = index
        return whole.to(part.dtype, copy=True).index_add_(1, index, part)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return grad if ctx.needs_input_grad[0] else None, grad.index_select(1, ctx.index), None


def add_channels(whole: Tensor, part: Tensor, index: Tensor) -> Tensor:
    """``whole`` (N, J, H, W) plus ``part`` (N, K, H, W) at the channels ``index``; ``whole`` itself stays."""
    if torch.jit.is_tracing():
        return whole.to(part.dtype).index_add(1, index, part)
    return _AddChannels.apply(whole, part, index)
