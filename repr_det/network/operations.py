"""What torch's operations, by their names, make of a channel that is 0."""

import math
from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from repr_det.network.tracing import Operation, Value

CONVOLUTIONS = {"convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution", "miopen_convolution"}
# Sums of products: a channel that is 0 adds nothing.
READS = CONVOLUTIONS | {
    *("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "addmv", "mv", "dot", "_scaled_dot_product_attention_math"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu", "deform_conv2d"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention", "_trilinear"),
}
# (input, weight, bias, ...)
NORMS = {
    *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"),
    *("_batch_norm_with_update", "_batch_norm_no_update", "miopen_batch_norm", "batch_norm_elemt", "native_group_norm"),
}
# Every output is a sum, a copy or the largest of inputs of one channel.
OF_A_CHANNEL = {
    *("max_pool2d", "max_pool2d_with_indices", "avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d"),
    *("adaptive_max_pool2d", "upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d"),
    *("upsample_bicubic2d", "_upsample_bilinear2d_aa", "native_dropout", "_fused_dropout", "reflection_pad2d"),
    *("replication_pad2d", "grid_sampler_2d", "flip", "roi_align", "_roi_align", "roi_pool"),
}
# The same, but channels need not stay where they were.
OF_CHANNELS = {
    *("cat", "stack", "view", "_unsafe_view", "_reshape_alias", "reshape", "permute", "transpose", "t", "expand"),
    *("slice", "select", "split", "split_with_sizes", "unbind", "squeeze", "unsqueeze", "as_strided", "index"),
    *("gather", "index_select", "index_put", "slice_scatter", "select_scatter", "repeat", "unfold", "im2col", "roll"),
    *("diagonal", "mean", "sum", "amax", "pixel_shuffle", "pixel_unshuffle", "native_channel_shuffle"),
    "linalg_vector_norm",
}
SUMS = {"mean", "sum", "amax", "linalg_vector_norm"}
PAD = "constant_pad_nd"
MOVES = OF_A_CHANNEL | OF_CHANNELS | {PAD}
# How many of the arguments are data; the others say where to look.
STEERED = {"deform_conv2d": 2, "grid_sampler_2d": 1, "roi_align": 1, "_roi_align": 1, "roi_pool": 1}
# Element by element, though torch does not tag them so.
_ELEMENTWISE = {"hardswish", "_prelu_kernel", "rrelu_with_noise", "rrelu_with_noise_functional"}


def is_elementwise(operation: Operation) -> bool:
    return torch.Tag.pointwise in operation.function.tags or operation.name in _ELEMENTWISE


def makes_zero(operation: Operation, zeros: Collection[int], *others: tuple[float, bool]) -> bool:
    """Tells whether an operation is elementwise and gives 0 if the values ``zeros`` are 0 and the rest is each of
    ``others`` (the second of a pair is for flags)."""
    if not is_elementwise(operation):
        return False

    def stand_in(value: Value, other: tuple[float, bool]) -> Tensor:
        number = 0.0 if value.number in zeros else other[value.dtype == torch.bool]
        dtype = torch.float32 if value.dtype.is_floating_point else value.dtype
        return torch.tensor([number], device="cpu").to(dtype)

    noted = (operation.arguments, operation.keywords)
    for other in others:
        arguments, keywords = tree_map_only(Value, partial(stand_in, other=other), noted)
        try:
            results = tree_leaves(operation.function(*arguments, **keywords))
        except (RuntimeError, TypeError, IndexError):  # NotImplementedError is a RuntimeError
            return False  # it does not take single numbers: nothing is shown
        if any(bool(result.any()) for result in results):
            return False
    return True


def is_over_positions(operation: Operation) -> bool:
    """Tells whether a mean or sum of (N, C, H, W) goes over height and width alone."""
    if operation.name not in SUMS or len(operation.arguments) < 2:
        return False
    dimensions = operation.arguments[1]
    return isinstance(dimensions, (list, tuple)) and bool(dimensions) and set(dimensions) <= {2, 3, -1, -2}


def flattened(operation: Operation) -> int | None:
    """The positions of a channel, where (N, C, H, W) becomes (N, C * H * W); else None."""
    if operation.name not in ("view", "_unsafe_view", "reshape", "_reshape_alias"):
        return None
    before, after = operation.arguments[0].shape, operation.arguments[1]
    positions = math.prod(before[2:])
    flat = len(before) > 2 and len(after) == 2 and after[0] in (before[0], -1)
    return positions if flat and after[1] in (before[1] * positions, -1) else None
