"""A proof of which convs can lose filters: by one traced training pass (``tracing``), in any network.

A filter of a conv can be dropped where setting its rows to zero silences it: its row of the conv's weight and bias, and
of the norm behind it. From these zeros the proof follows the values of the pass. It looks for

1. a weight that convolutions alone read, as it is;
2. an output that goes into one norm and nowhere else, a norm that gets nothing else; or into no norm;
3. behind that, until the next convolution or matrix product, operations that make 0 of 0;
4. at least one such reader, and no channel that leaves the network.

The pass tells more of each conv, in any network: its norm, and the convs that read its channels.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from repr_det.network.operations import (
    CONVOLUTIONS,
    COPIES,
    ELEMENTWISE,
    MOVES,
    NORMS,
    OF_CHANNELS,
    PAD,
    READS,
    STEERED,
    SUMS,
)
from repr_det.network.tracing import Operation, Trace, Value, values_in

_STAND_INS = ((0.7, True), (-1.3, False))  # for values, and flags, that nothing is known of
_ZEROS = ((0.0, True), (0.0, False))


@dataclass(frozen=True)
class Reader:
    """A module that reads the channels of a conv by a convolution or a matrix product.

    Attributes:
        name: of the module; "" where none of those that were watched was running.
        aligned: whether its inputs are the conv's channels in their order.
        alone: whether nothing else has been added to what it reads.
        span: how many inputs each channel is: the positions of the image, where it is flattened for a linear layer.
    """

    name: str
    aligned: bool
    alone: bool
    span: int = 1


@dataclass
class Verdict:
    """The findings of the proof about a conv.

    Attributes:
        norm: name of the norm behind it, or None.
        reason: why its filters cannot be dropped; "" where they can.
        readers: who reads its channels.
        rectified: whether what comes behind its norm is a ReLU, and nothing else.
        ran: whether it was in the pass.
    """

    norm: str | None = None
    reason: str = ""
    readers: set[Reader] = field(default_factory=set)
    rectified: bool = False
    ran: bool = True


def prove(trace: Trace, left: set[int], convs: list[str], norms: Collection[str]) -> dict[str, Verdict]:
    """Follows the zeros of each conv through a pass.

    Args:
        trace: of the pass.
        left: numbers of the values that left the network.
        convs: names of watched modules.
        norms: names of the watched modules that are norms.

    Returns:
        conv name -> verdict.
    """
    graph = _Graph(trace, left, norms)
    return {name: _Follow(graph, name).verdict() for name in convs}


def first_that_refuses(everyone: Sequence[Mapping[str, Verdict]]) -> dict[str, Verdict]:
    """The verdicts of several processes together: a conv can lose filters where all have shown it."""
    agreed = dict(everyone[0])
    for theirs in everyone[1:]:
        for name, verdict in theirs.items():
            if name not in agreed or (verdict.reason and not agreed[name].reason):
                agreed[name] = verdict
    return agreed


class _Graph:
    """The operations of a pass that count for its result, by what they read."""

    def __init__(self, trace: Trace, left: set[int], norms: Collection[str]) -> None:
        self.operations = trace.operations
        self.parameters = trace.parameters
        self.constants = trace.constants
        self.left = left
        self.norms = norms
        self.users: dict[int, list[int]] = defaultdict(list)
        self.calls: dict[str, set[int]] = defaultdict(set)
        for place in self._live():
            operation = self.operations[place]
            for number in set(operation.inputs):
                self.users[number].append(place)
            if operation.modules:
                self.calls[operation.modules[-1]].add(operation.call)

    def _live(self) -> list[int]:
        """Places of the operations that what leaves the network depends on: not of those that count or log."""
        wanted, found = set(self.left), []
        for place in range(len(self.operations) - 1, -1, -1):
            operation = self.operations[place]
            if wanted.intersection(operation.outputs):
                found.append(place)
                wanted.update(operation.inputs)
        return found[::-1]

    def copies(self, number: int) -> set[int]:
        """The value and what is a copy of it, of another type say."""
        found, waiting = {number}, [number]
        while waiting:
            for place in self.users[waiting.pop()]:
                operation = self.operations[place]
                if operation.name in COPIES:
                    new = set(operation.outputs) - found
                    found |= new
                    waiting += new
        return found

    def readers_of(self, numbers: set[int]) -> list[Operation]:
        """The operations, other than copies, that read one of the values."""
        places = sorted({place for number in numbers for place in self.users[number]})
        return [self.operations[place] for place in places if self.operations[place].name not in COPIES]


@dataclass(frozen=True)
class _State:
    """The channel of a dropped filter in a value.

    Attributes:
        reason: why it is not 0 there; "" where it is.
        aligned, alone, span: see ``Reader``.
    """

    reason: str = ""
    aligned: bool = True
    alone: bool = True
    span: int = 1


class _Refused(Exception):
    pass


class _Follow:
    """Follows the zeros of one conv."""

    def __init__(self, graph: _Graph, name: str) -> None:
        self.graph = graph
        self.name = name
        self.found = Verdict()
        self.states: dict[int, _State] = {}
        self.own: set[int] = set()  # the rows that are set to 0, in the conv and its norm
        self.inside: set[int] = set()  # values made in the conv and its norm
        self.first: list[Operation] = []  # what comes behind them

    def verdict(self) -> Verdict:
        try:
            convolutions = self._convolutions()
            self.found.norm = self._norm(convolutions)
            self._follow()
            self.found.rectified = bool(self.first) and all(map(self._closes, self.first))
            if not self.found.readers:
                raise _Refused("nothing was seen to read its channels")
        except _Refused as refused:
            self.found.reason = str(refused)
        return self.found

    def _convolutions(self) -> list[Operation]:
        """Those that read the weight; all that read it must be such."""
        weight = self.graph.parameters.get(f"{self.name}.weight")
        uses = [] if weight is None else self.graph.readers_of(self.graph.copies(weight))
        if not uses:
            self.found.ran = False
            raise _Refused("it has not run in a training pass, or computes with another weight than its own")
        for use in uses:
            if use.name not in CONVOLUTIONS or not self._is_weight(use, weight):
                raise _Refused(f"its weight goes through {use.name} before it is used")
            if use.modules[-1:] != (self.name,):
                other = use.modules[-1] if use.modules else "another part of the network"
                raise _Refused(f"{other} computes with its weight too")
        return uses

    def _is_weight(self, use: Operation, weight: int) -> bool:
        copies = self.graph.copies(weight)
        return use.arguments[1].number in copies and use.arguments[0].number not in copies

    def _norm(self, convolutions: list[Operation]) -> str | None:
        """The norm that the outputs go into, alone and nowhere else."""
        names: set[str | None] = set()
        for convolution in convolutions:
            users = self.graph.readers_of(self.graph.copies(convolution.outputs[0]))
            inside = {self._norm_around(user) for user in users}
            if None in inside and len(inside) > 1:
                raise _Refused("its output goes into a norm and elsewhere")
            names |= inside
        if len(names) > 1:
            raise _Refused("several norms follow it")
        norm = next(iter(names), None)
        if norm is not None and len(self.graph.calls[norm]) != len(convolutions):
            raise _Refused(f"its norm {norm} is that of others too")
        return norm

    def _norm_around(self, user: Operation) -> str | None:
        around = [module for module in user.modules if module in self.graph.norms and module != self.name]
        return around[-1] if around else None

    def _follow(self) -> None:
        for module in (self.name, self.found.norm):
            for key in ("weight", "bias"):
                number = self.graph.parameters.get(f"{module}.{key}")
                if number is not None:
                    self.own |= self.graph.copies(number)
        self.states = dict.fromkeys(self.own, _State())
        waiting = sorted({place for number in self.own for place in self.graph.users[number]})
        done: set[int] = set()
        while waiting:
            place = heapq.heappop(waiting)
            if place in done:
                continue
            done.add(place)
            operation = self.graph.operations[place]
            state = self._after(operation)
            if operation.name not in COPIES:
                self._note_place(operation)
            for output in operation.outputs if state is not None else ():
                self.states[output] = state
                if output in self.graph.left:
                    raise _Refused("its channels leave the network: it predicts")
                for user in self.graph.users[output]:
                    heapq.heappush(waiting, user)

    def _note_place(self, operation: Operation) -> None:
        around = self.found.norm or self.name
        if around in operation.modules or (operation.modules[-1:] == (self.name,) and operation.name in CONVOLUTIONS):
            self.inside.update(operation.outputs)
        elif self.inside.intersection(operation.inputs):
            self.first.append(operation)

    @staticmethod
    def _closes(operation: Operation) -> bool:
        """Tells whether an operation makes 0 of all that is negative, as a ReLU does."""
        return _makes_zero(operation, lambda _: -1.3) and not _makes_zero(operation, lambda _: 1.3)

    def _after(self, operation: Operation) -> _State | None:
        """Returns the state of the outputs; None where they do not depend on the channel any more."""
        inputs = {number: self.states[number] for number in operation.inputs if number in self.states}
        channels = {number: state for number, state in inputs.items() if number not in self.own}
        if operation.name in STEERED:
            steering = {value.number for value in values_in(operation.arguments[STEERED[operation.name] :])}
            if steering.intersection(channels):
                raise _Refused(f"it tells {operation.name} where to look")
        if operation.name in READS:
            return self._read(operation, channels)
        if operation.name in NORMS:
            return self._normalised(operation)
        if operation.name == "copy":  # into another tensor
            source = operation.arguments[1]
            return self.states.get(source.number) if isinstance(source, Value) else None
        if operation.name in MOVES:
            return self._moved(operation, inputs)
        if torch.Tag.pointwise in operation.function.tags or operation.name in ELEMENTWISE:
            return self._elementwise(operation, inputs)
        if not operation.outputs or self.graph.constants.issuperset(operation.outputs):
            return None
        return self._no_longer_zero(operation, inputs)

    def _read(self, operation: Operation, channels: dict[int, _State]) -> _State | None:
        for state in channels.values():
            if state.reason:
                raise _Refused(state.reason)
            name = operation.modules[-1] if operation.modules else ""
            self.found.readers.add(Reader(name, state.aligned, state.alone, state.span))
        weight, bias = [*operation.arguments[1:3], None][:2]
        if operation.name not in CONVOLUTIONS or not isinstance(weight, Value) or weight.number not in self.own:
            return None
        if isinstance(bias, Value) and bias.number not in self.own:
            return _State("the bias that is added to its output is not its own")
        return _State()

    def _normalised(self, operation: Operation) -> _State:
        found, weight, bias = operation.arguments[:3]
        own = isinstance(weight, Value) and weight.number in self.states
        state = self.states.get(found.number, _State())
        if own and not state.alone:
            raise _Refused(f"its norm {self.found.norm} gets more than its output")
        if not own:
            name = operation.modules[-1] if operation.modules else "a norm"
            return _State(f"its channels go into {name}, which is no norm of its own with a weight")
        if isinstance(bias, Value) and bias.number not in self.states:
            return _State(f"its norm {self.found.norm} adds what is not its own")
        return _State()

    def _moved(self, operation: Operation, inputs: dict[int, _State]) -> _State:
        state = _merged(inputs, self.graph)
        if operation.name == PAD and len(operation.arguments) > 2 and operation.arguments[2]:
            return replace(state, reason=f"it is padded with {operation.arguments[2]}")
        if operation.name not in OF_CHANNELS or _over_positions(operation):
            return state
        if operation.name == "amax":
            return self._no_longer_zero(operation, inputs)  # where all others are below 0 it is the largest
        if (span := _flattened(operation)) is not None:
            return replace(state, span=state.span * span)
        return replace(state, aligned=False, alone=state.alone and operation.name not in SUMS)

    def _elementwise(self, operation: Operation, inputs: dict[int, _State]) -> _State:
        state = _merged({number: each for number, each in inputs.items() if not each.reason} or inputs, self.graph)
        if not state.reason and self._is_zero(operation, others=_STAND_INS):
            return state
        strange = [n for n in operation.inputs if n not in self.states and n in self.graph.constants]
        tainted = [each.reason for each in inputs.values() if each.reason]
        if not strange and not tainted and self._is_zero(operation, others=_ZEROS):
            return replace(state, alone=False)  # other channels are added
        return replace(state, reason=tainted[0] if tainted else self._no_longer_zero(operation, inputs).reason)

    def _is_zero(self, operation: Operation, others: tuple[tuple[float, bool], ...]) -> bool:
        """Tells whether the operation makes 0 of the channel if all else that it gets is one of ``others``."""

        def value_of(value: Value, other: tuple[float, bool]) -> float | bool:
            known = self.states.get(value.number)
            if known is not None and not known.reason:
                return 0.0
            return other[value.dtype == torch.bool]

        return all(_makes_zero(operation, lambda value, other=other: value_of(value, other)) for other in others)

    def _no_longer_zero(self, operation: Operation, inputs: dict[int, _State]) -> _State:
        reason = f"behind it comes {operation.name}, which does not make 0 of a channel that is 0"
        state = _merged(inputs, self.graph)
        return replace(state, reason=state.reason or reason)


def _makes_zero(operation: Operation, value_of: Callable[[Value], float | bool]) -> bool:
    """Tells whether an elementwise operation gives 0, by running it on single numbers."""
    if torch.Tag.pointwise not in operation.function.tags and operation.name not in ELEMENTWISE:
        return False

    def stand_in(argument: Any) -> Any:
        if isinstance(argument, tuple):
            return [stand_in(part) for part in argument]
        if not isinstance(argument, Value):
            return argument
        dtype = torch.float32 if argument.dtype.is_floating_point else argument.dtype
        return torch.tensor([value_of(argument)], device="cpu").to(dtype)

    keywords = {key: stand_in(argument) for key, argument in operation.keywords.items()}
    try:
        result = operation.function(*map(stand_in, operation.arguments), **keywords)
    except (RuntimeError, TypeError, NotImplementedError, IndexError):
        return False  # it does not take single numbers: nothing is shown, and the conv stays out
    results = [result] if isinstance(result, Tensor) else list(result)
    return not any(bool(part.any()) for part in results)


def _merged(inputs: Mapping[int, _State], graph: _Graph) -> _State:
    # A gain (J,) becomes (1, J, 1, 1) on its way; it is where the data are that channels count.
    placed = [state for number, state in inputs.items() if number not in graph.constants] or list(inputs.values())
    return _State(
        next((state.reason for state in inputs.values() if state.reason), ""),
        all(state.aligned for state in placed),
        all(state.alone for state in placed),
        max(state.span for state in placed),
    )


def _over_positions(operation: Operation) -> bool:
    """Tells whether a mean or sum of (N, C, H, W) goes over height and width alone."""
    if operation.name not in SUMS or len(operation.arguments) < 2:
        return False
    dimensions = operation.arguments[1]
    return isinstance(dimensions, tuple) and bool(dimensions) and set(dimensions) <= {2, 3, -1, -2}


def _flattened(operation: Operation) -> int | None:
    """The positions of a channel, where (N, C, H, W) becomes (N, C * H * W); else None."""
    if operation.name not in ("view", "_unsafe_view", "reshape", "_reshape_alias"):
        return None
    before, after = operation.arguments[0].shape, operation.arguments[1]
    positions = math.prod(before[2:])
    flat = len(before) > 2 and len(after) == 2 and after[0] in (before[0], -1)
    return positions if flat and after[1] in (before[1] * positions, -1) else None
