"""The places of a conv's channels in a value."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from repr_det.network import operations
from repr_det.network.tracing import Operation, Value


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


def laid_out(operation: Operation, inputs: Mapping[int, Layout], values: Mapping[int, Value]) -> list[Layout]:
    """The layouts of the outputs, by those of the inputs."""
    number, layout = next(iter(inputs.items()))
    along = operations.along(operation)
    dims = along.union(*(each.dims for each in inputs.values()))
    same = set(inputs.values()) == {layout}
    stays = same and not layout.dims & along

    def of(output: int) -> Layout:
        shape = values[output].shape
        more = len(shape) - len(values[number].shape)
        if same and operation.name in operations.VIEWS:
            return _viewed(layout, operation.arguments[0], values[output])
        if stays and (more == 0 or (more > 0 and not along)):
            return layout
        if stays and abs(more) == len(along):  # these dimensions come or go
            sign = -1 if more > 0 else 1
            return replace(layout, dims=frozenset(dim + sign * sum(x >= dim for x in along) for dim in layout.dims))
        return Layout(frozenset(range(-len(shape), 0) if more else dims), output)

    return [of(output) for output in operation.outputs]


def _viewed(layout: Layout, before: Value, after: Value) -> Layout:
    """Through a view, in which channels stay where they are in memory."""
    old, new = (
        {dim - len(value.shape): (step, step * value.shape[dim]) for dim, step in enumerate(value.steps)}
        for value in (before, after)
    )
    held = [old[dim] for dim in layout.dims & old.keys()]  # from the second channel to the end
    dims = frozenset(dim for dim, (near, far) in new.items() if any(near < end and start < far for start, end in held))
    if len(held) == len(dims) == 1:
        (start, end), (near, far) = held[0], new[min(dims)]
        if end == far and near <= start:
            return Layout(dims, layout.order, layout.span * start // near)
    return Layout(dims, after.number)
