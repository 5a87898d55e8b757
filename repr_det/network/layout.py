"""Where the channels of a conv lie in a value."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from repr_det.network import operations
from repr_det.network.tracing import Operation, tensors_in


@dataclass(frozen=True)
class Layout:
    """Two values of one layout hold the same channel at every place.

    Attributes:
        dims: the dimensions along which channels lie, counted from the end, as in broadcasting.
        order: 0 if they lie there in their order; else the value in which they were last moved.
        span: places per channel: the positions of an image that is flattened for a linear layer.
    """

    dims: frozenset[int]
    order: int = 0
    span: int = 1


def laid_out(operation: Operation, inputs: Mapping[int, Layout], shapes: Mapping[int, Sequence[int]]) -> list[Layout]:
    """The layouts of the outputs, by those of the inputs; ``shapes`` are those of all values."""
    number, layout = next(iter(inputs.items()))
    before, along = shapes[number], operations.along(operation)
    dims = along.union(*(each.dims for each in inputs.values()))
    same = set(inputs.values()) == {layout}
    if same and operation.name in operations.VIEWS:
        return _viewed(layout, operation, before)

    stays = same and not layout.dims & along

    def of(output: int) -> Layout:
        shape, moves = shapes[output], operation.name in operations.RESHAPES
        if stays and not moves and (len(shape) == len(before) or (not along and len(shape) > len(before))):
            return layout
        anywhere = Layout(frozenset(dims if len(shape) == len(before) else range(-len(shape), 0)), output)
        return (stays and _reshaped(layout, _without(along, before, shape), output)) or anywhere

    return [of(output) for output in operation.outputs]


def _viewed(layout: Layout, operation: Operation, shape: Sequence[int]) -> list[Layout]:
    """As torch finds it, for a tensor with strides along channels only."""
    strides = [dim + 1 if dim - len(shape) in layout.dims else 0 for dim in range(len(shape))]
    strided = torch.empty(1, device="meta").as_strided(shape, strides)
    views = list(tensors_in(operation.function(strided, *operation.arguments[1:], **operation.keywords)))
    whole, *parts = [[pair for pair in zip(x.shape, x.stride(), strict=True) if pair[1]] for x in (strided, *views)]
    return [
        Layout(
            frozenset(dim - view.dim() for dim, stride in enumerate(view.stride()) if stride),
            output if view.storage_offset() or part != whole else layout.order,
            layout.span,
        )
        for view, part, output in zip(views, parts, operation.outputs, strict=True)
    ]


def _without(along: set[int], *shapes: Sequence[int]) -> list[list[int]]:
    """The shapes before and after, with dimensions ``along`` that come, go or change as 1."""
    rank = max(map(len, shapes))
    return [[1 if i - rank in along and len(x) == rank else size for i, size in enumerate(x)] for x in shapes]


def _reshaped(layout: Layout, shapes: Sequence[Sequence[int]], output: int) -> Layout | None:
    """Of (N, C, H, W) -> (N, C * H * W) and the like; None if the shapes hold different numbers of places."""
    before, after = ({i - len(x): (math.prod(x[i + 1 :]), math.prod(x[i:])) for i in range(len(x))} for x in shapes)
    if math.prod(shapes[0]) != math.prod(shapes[1]):
        return None
    held = [before[dim] for dim in layout.dims]  # how far apart in memory neighbours are, and the ends
    dims = {dim for dim, (near, far) in after.items() if any(near < end and start < far for start, end in held)}
    if len(held) == len(dims) == 1:
        (start, end), (near, far) = held[0], after[min(dims)]
        if end == far and near <= start:
            return Layout(frozenset(dims), layout.order, layout.span * start // near)
    return Layout(frozenset(dims), output)
