"""Torch's operations, by their names: what each makes of a channel that is 0."""

from collections.abc import Collection
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from repr_det.network.tracing import Operation, Value, values_in

CONVOLUTIONS = {"convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution", "miopen_convolution"}
_ATTENTIONS = ["attention_math", "flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"]
# Sums of products: a channel that is 0 adds nothing. Along which dimension of each argument; 0: it is added.
_PRODUCTS = {
    **dict.fromkeys(["mm", "bmm", "matmul"], (-1, -2)),
    **dict.fromkeys(["addmm", "baddbmm"], (0, -1, -2)),
    **{"linear": (-1, -1, 0), "mv": (-1, -1), "dot": (-1, -1), "addmv": (0, -1, -1)},
    **{f"_scaled_dot_product_{name}": (-1, -1, -2) for name in _ATTENTIONS},
}
READS = CONVOLUTIONS | _PRODUCTS.keys() | {"deform_conv2d", "_trilinear"}
# (input, weight, bias, ...)
NORMS = {
    *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"),
    *("_batch_norm_with_update", "_batch_norm_no_update", "miopen_batch_norm", "batch_norm_elemt", "native_group_norm"),
}
# Over positions: height and width come last.
OF_IMAGES = {
    *("max_pool2d", "max_pool2d_with_indices", "avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d"),
    *("adaptive_max_pool2d", "upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d"),
    *("upsample_bicubic2d", "_upsample_bilinear2d_aa", "reflection_pad2d", "replication_pad2d", "grid_sampler_2d"),
    *("roi_align", "_roi_align", "roi_pool"),
}
SUMS = {"mean", "sum", "amax", "linalg_vector_norm"}
PAD = "constant_pad_nd"
TRANSPOSES = {"permute", "transpose", "t"}
VIEWS = TRANSPOSES | {
    *("slice", "select", "split", "split_with_sizes", "unbind", "diagonal", "unfold", "expand", "as_strided", "view"),
    *("_unsafe_view", "_reshape_alias", "reshape", "squeeze", "unsqueeze"),
}
_DROPOUT = {"native_dropout", "_fused_dropout"}
# Numbers come to lie side by side, or one on the other.
JOINS = {"cat", "stack", "index_put", "slice_scatter", "select_scatter", "overlap"}
# Every output is a sum, a copy or the largest of some inputs.
MOVES = OF_IMAGES | SUMS | VIEWS | _DROPOUT | JOINS | {
    *(PAD, "index", "gather", "index_select", "flip", "repeat", "im2col", "roll", "pixel_shuffle"),
    *("pixel_unshuffle", "native_channel_shuffle", "channel_shuffle"),
}  # fmt: skip
# How many of the arguments are data; the others say where to look.
STEERED = {"deform_conv2d": 2, "grid_sampler_2d": 1, "roi_align": 1, "_roi_align": 1, "roi_pool": 1}
# Element by element, though torch does not tag them so, or torch 2.4 did not.
_ELEMENTWISE = {
    *("hardswish", "_prelu_kernel", "rrelu_with_noise", "rrelu_with_noise_functional", "celu", "elu", "hardshrink"),
    *("hardsigmoid", "hardtanh", "leaky_relu", "mish", "relu6", "selu", "softplus", "softshrink", "threshold"),
}


def is_elementwise(operation: Operation) -> bool:
    return torch.Tag.pointwise in operation.function.tags or operation.name in _ELEMENTWISE


def makes_zero(operation: Operation, zeros: Collection[int], *others: tuple[float, bool]) -> bool:
    """Tells whether an operation is elementwise and gives 0 if the values ``zeros`` are 0 and the rest are several
    numbers of the size of each of ``others`` (the second of a pair is for flags)."""
    if not is_elementwise(operation):
        return False
    places = {number: place for place, number in enumerate(dict.fromkeys(operation.inputs))}

    def stand_in(value: Value, other: tuple[float, bool]) -> Tensor:
        number = 0.0 if value.number in zeros else other[value.dtype == torch.bool]
        if value.dtype != torch.bool:
            number *= 1 + places[value.number] / 4
        dtype = torch.float32 if value.dtype.is_floating_point else value.dtype
        return torch.tensor([number], device="cpu").to(dtype)

    noted = (operation.arguments, operation.keywords)
    for other in others:
        arguments, keywords = tree_map_only(Value, partial(stand_in, other=other), noted)
        try:
            results = operation.function(*arguments, **keywords)
        except Exception:  # of torch, or of an operator that a user wrote in Python
            return False  # it does not take single numbers: nothing is shown
        if any(bool(result.any()) for result in tree_leaves(results)):
            return False
    return True


def is_sum(operation: Operation, zeros: Collection[int]) -> bool:
    """Tells whether the others come through whatever their sign, where ``zeros`` are 0: not so the larger of two."""
    others = [[makes_zero(operation, zeros, (number, flag)) for number in (1.3, -1.3)] for flag in (True, False)]
    return all(positive == negative for positive, negative in others)


def along(operation: Operation) -> set[int]:
    """The dimensions, counted from the end, along which values move or are put together; all if that is not known."""
    rank = max(len(value.shape) for value in values_in(operation.arguments)) + (operation.name == "stack")
    dims = argument(operation, "dim", "dims")
    if operation.name in OF_IMAGES:
        dims = [-1, -2]
    elif operation.name == PAD:
        dims = [-1 - place // 2 for place, size in enumerate(operation.arguments[1]) if size]
    elif operation.name in _DROPOUT | VIEWS or (dims is None and operation.name not in MOVES):
        return set()
    elif indices := argument(operation, "indices"):
        dims = [dim for dim, index in enumerate(indices) if index is not None and len(index.shape) == 1]
    dims = [dims] if isinstance(dims, int) else dims or range(rank)
    return {dim % rank - rank for dim in dims}


def summed(operation: Operation) -> list[tuple[Value, set[int]]]:
    """Each argument with its dimensions, counted from the end, over which products are summed: none if it is added."""
    dims = [{dim} - {0} for dim in _PRODUCTS.get(operation.name, ())]
    if operation.name in CONVOLUTIONS:
        (_, channels, *_), (_, _, *window) = (operation.arguments[i].shape for i in (0, 1))
        dims = [{place - len(window) for place, size in enumerate(window) if size > 1}, {1}, set()]
        if argument(operation, "groups") != channels:
            dims[0].add(-1 - len(window))
    pairs = zip_longest(operation.arguments, dims)
    return [(x, set(range(-len(x.shape), 0)) if over is None else over) for x, over in pairs if isinstance(x, Value)]


def argument(operation: Operation, *names: str) -> Any:
    """The argument of that name; None if it has none."""
    for place, known in enumerate(operation.function._schema.arguments):
        if known.name in names:
            given = operation.arguments[place : place + 1]
            return given[0] if given else operation.keywords.get(known.name, known.default_value)
    return None
