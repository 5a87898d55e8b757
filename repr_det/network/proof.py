"""A proof, by one traced training pass, of which convs can lose filters.

A filter can be dropped if zeros in its row of weight and bias, of the conv and the norm behind it, silence its channel.
The proof follows these zeros through the pass. It needs

1. a weight that convolutions alone read, as it is;
2. an output that goes into one norm and nowhere else, a norm that gets nothing else; or into no norm;
3. behind that, until channels are summed by the next convolution or matrix product, operations that make 0 of 0;
4. at least one such reader, and no channel that leaves the network.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

from repr_det.network import operations
from repr_det.network.layout import Layout, laid_out
from repr_det.network.tracing import Operation, Trace, Value, values_in


@dataclass(frozen=True)
class Reader:
    """A module that reads the channels of a conv by a convolution or a matrix product.

    Attributes:
        name: of the module; "" if no watched one was running.
        aligned: its inputs are the conv's channels in their order.
        alone: its own kernels read them, and nothing else here or elsewhere.
        span: inputs per channel: the positions of an image that is flattened for a linear layer.
    """

    name: str
    aligned: bool
    alone: bool
    span: int = 1


@dataclass
class Verdict:
    """The result of the proof for a conv.

    Attributes:
        reason: why its filters cannot be dropped; "" if they can.
        rectified: only a ReLU comes behind its norm.
        ran: it was in the pass.
        held_by: names of the modules whose outputs hold its channels.
    """

    norm: str | None = None
    reason: str = ""
    readers: set[Reader] = field(default_factory=set)
    rectified: bool = False
    ran: bool = True
    held_by: set[str] = field(default_factory=set)


def prove(trace: Trace, convs: Sequence[str], norms: Collection[str]) -> dict[str, Verdict]:
    """The verdict of each conv; ``convs`` and ``norms`` are names of watched modules."""
    graph = _Graph(trace, norms)
    return {name: _Follow(graph, name).verdict() for name in convs}


def first_that_refuses(everyone: Sequence[Mapping[str, Verdict]]) -> dict[str, Verdict]:
    """The verdicts of several processes together: a conv can lose filters if all have shown it."""
    found = {name: [theirs[name] for theirs in everyone] for name in everyone[0]}
    return {name: next((x for x in each if x.reason), reduce(both, each)) for name, each in found.items()}


def both(before: Verdict, now: Verdict) -> Verdict:
    """What two passes show together."""
    if not before.ran or (now.ran and now.reason):
        return now
    if not now.ran or before.reason:
        return before
    if now.norm != before.norm:
        return replace(before, reason="several norms follow it")
    together = {"readers": before.readers | now.readers, "held_by": before.held_by | now.held_by}
    return replace(before, **together, rectified=before.rectified and now.rectified)


class _Graph:
    """The operations that the outputs of the network depend on: not those that count or log."""

    def __init__(self, trace: Trace, norms: Collection[str]) -> None:
        self.trace = trace
        self.norms = norms
        self.operations: list[Operation] = []
        self.users: dict[int, list[Operation]] = defaultdict(list)
        self.calls: dict[str, set[int]] = defaultdict(set)
        wanted = trace.left | trace.hooked
        for operation in reversed(trace.operations):
            if wanted.intersection(operation.outputs):
                self.operations.append(operation)
                wanted.update(operation.inputs)
        self.operations.reverse()
        for operation in self.operations:
            for number in set(operation.inputs):
                self.users[number].append(operation)
            self.calls[operation.module].add(operation.call)


@dataclass(frozen=True)
class _State:
    """The channel of a dropped filter in a value; see ``Reader``."""

    reason: str = ""  # why it is not 0 there
    alone: bool = True
    past: bool = False  # it has been read: what comes now matters only if it leaves the network
    layout: Layout = field(default=Layout(frozenset()))


class _Refused(Exception):
    pass


class _Follow:
    def __init__(self, graph: _Graph, name: str) -> None:
        self.graph = graph
        self.trace = graph.trace
        self.name = name
        self.found = Verdict()
        self.states: dict[int, _State] = {}  # of values that depend on its channel
        self.reads: list[Operation] = []
        self.own: set[int] = set()  # the parameters, of conv and norm, whose rows are set to 0

    def verdict(self) -> Verdict:
        try:
            convolutions = self._convolutions()
            self.found.norm = self._norm(convolutions)
            self._follow()
            self.found.readers = {replace(x, alone=x.alone and self._is_alone(x.name)) for x in self.found.readers}
            self.found.rectified = self._is_rectified()
            if not self.found.readers:
                raise _Refused("nothing was seen to read its channels")
        except _Refused as refused:
            self.found.reason = str(refused)
        return self.found

    def _convolutions(self) -> list[Operation]:
        """The readers of the weight, all of which must be convolutions."""
        weight = self.trace.parameters.get(f"{self.name}.weight")
        uses = [] if weight is None else self.graph.users[weight]
        if not uses:
            self.found.ran = False
            raise _Refused("it has not run in a training pass, or computes with another weight than its own")
        for use in uses:
            is_read = use.name in operations.CONVOLUTIONS and use.arguments[1].number == weight
            if not is_read or use.arguments[0].number == weight:
                raise _Refused(f"its weight goes through {use.name} before it is used")
            if use.module != self.name:
                raise _Refused(f"{use.module or 'another part of the network'} computes with its weight too")
        return uses

    def _norm(self, convolutions: list[Operation]) -> str | None:
        names: set[str | None] = set()
        for convolution in convolutions:
            inside = {self._norm_around(user) for user in self.graph.users[convolution.outputs[0]]}
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
        around = (module for module in reversed(user.modules) if module in self.graph.norms and module != self.name)
        return next(around, None)

    def _follow(self) -> None:
        modules = (self.name, self.found.norm)
        for name in [f"{module}.{key}" for module in modules for key in ("weight", "bias")]:
            if name not in self.trace.parameters:
                continue
            self.own.add(self.trace.parameters[name])
            for use in self.graph.users[self.trace.parameters[name]]:
                if not set(modules).intersection(use.modules):
                    raise _Refused(f"{use.module or 'another part of the network'} computes with {name} too")
        self.states = {number: _State(layout=self._laid_out(number, 0)) for number in self.own}
        for operation in self.graph.operations:
            inputs = {number: self.states[number] for number in operation.inputs if number in self.states}
            past = all(state.past for state in inputs.values())
            inputs = {number: state for number, state in inputs.items() if state.past == past}
            state = self._after(operation, inputs) if inputs else None
            if state is None:
                continue
            layouts = [state.layout] * len(operation.outputs)
            if not state.layout.dims:
                before = {number: each.layout for number, each in inputs.items()}
                layouts = laid_out(operation, before, self.trace.values)
            for number, layout in zip(operation.outputs, layouts, strict=True):
                self.states[number] = replace(state, past=state.past or past, layout=layout)
                self.found.held_by |= self.trace.held_by.get(number, set())
                if number in self.trace.left:
                    raise _Refused("its channels leave the network: it predicts")

    def _is_rectified(self) -> bool:
        """Tells whether all behind conv and norm makes 0 of negative numbers, and of no positive ones."""
        around = self.found.norm or self.name
        inside = [operation for operation in self.graph.operations if around in operation.modules]
        outputs = {number for operation in inside for number in operation.outputs if number in self.states}
        users = [user for number in outputs for user in self.graph.users[number] if around not in user.modules]
        of_negative = all(operations.makes_zero(user, (), (-1.3, True)) for user in users)
        return bool(users) and of_negative and not any(operations.makes_zero(user, (), (1.3, True)) for user in users)

    def _after(self, operation: Operation, inputs: dict[int, _State]) -> _State | None:
        """The state of the outputs; None if they no longer depend on the channel."""
        if operation.name in operations.STEERED:
            steering = operation.arguments[operations.STEERED[operation.name] :]
            if (inputs.keys() - self.own) & {value.number for value in values_in(steering)}:
                raise _Refused(f"it tells {operation.name} where to look")
        if operation.name in operations.READS:
            return self._read(operation, inputs)
        if operation.name in operations.NORMS:
            return self._normalised(operation)
        if operation.name == "copy":
            source = operation.arguments[1]
            return self.states.get(source.number) if isinstance(source, Value) else None
        if operation.name in operations.MOVES:
            return self._moved(operation, inputs)
        if operations.is_elementwise(operation):
            return self._elementwise(operation, inputs)
        if not operation.outputs or self.trace.constants.issuperset(operation.outputs):
            return None
        return self._no_longer_zero(operation, inputs)

    def _read(self, operation: Operation, inputs: dict[int, _State]) -> _State | None:
        """Reads channels over which products are summed; leaves those in ``inputs`` that stay separate."""
        own = [inputs.pop(number) for number in self.own & inputs.keys()]
        added = []
        for value, summed in operations.summed(operation):
            added += [] if summed else [value]
            if (state := inputs.pop(value.number, None)) is None:
                continue
            separate = state.layout.dims and not state.layout.dims & summed
            is_filter = operation.name in operations.CONVOLUTIONS and 1 - len(value.shape) in state.layout.dims
            if (is_filter or not separate) and not state.past:
                if state.reason:
                    raise _Refused(state.reason)
                order, span = state.layout.order, state.layout.span
                self.found.readers.add(Reader(operation.module, not order, state.alone, 1 if order else span))
                self.reads.append(operation)
            if separate:
                inputs[value.number] = replace(state, past=is_filter or state.past)
        if own and operation.name in operations.CONVOLUTIONS:
            bias = operation.arguments[2]
            is_own = not isinstance(bias, Value) or bias.number in self.own
            reason = "" if is_own else "the bias that is added to its output is not its own"
            return _State(reason, layout=self._laid_out(operation.outputs[0], 1))
        if not inputs:
            return None
        past = all(state.past for state in inputs.values())
        return replace(self._with(operation, inputs, added), past=past)

    def _is_alone(self, module: str) -> bool:
        """Tells whether all that a module reads, and all that is read with its weight, are these channels."""
        users = self.graph.users
        uses = users[self.trace.parameters.get(f"{module}.weight", 0)]  # a linear layer reads with a transposed weight
        read = [users[use.outputs[0]] if use.name in operations.TRANSPOSES else [use] for use in uses]
        own = {operation.outputs[0] for operation in self.reads if operation.module == module}
        return {operation.outputs[0] for each in read for operation in each} == own

    def _normalised(self, operation: Operation) -> _State:
        found, weight, bias = operation.arguments[:3]
        if not isinstance(weight, Value) or weight.number not in self.states:
            name = operation.module or "a norm"
            return _State(f"its channels go into {name}, which is no norm of its own with a weight")
        if found.number in self.states and not self.states[found.number].alone:
            raise _Refused(f"its norm {self.found.norm} gets more than its output")
        if isinstance(bias, Value) and bias.number not in self.states:
            return _State(f"its norm {self.found.norm} adds what is not its own")
        return _State(layout=self._laid_out(operation.outputs[0], 1))

    def _laid_out(self, number: int, dim: int) -> Layout:
        return Layout(frozenset([dim - len(self.trace.values[number].shape)]))

    def _moved(self, operation: Operation, inputs: dict[int, _State]) -> _State:
        state = self._merged(inputs)
        if operation.name == operations.PAD and len(operation.arguments) > 2 and operation.arguments[2]:
            return replace(state, reason=f"it is padded with {operation.arguments[2]}")
        along = operations.along(operation)
        channels = frozenset.union(*(each.layout.dims for each in inputs.values()))
        if operation.name in operations.JOINS and (operation.name == "stack" or not along <= channels):
            return self._with(operation, inputs, values_in(operation.arguments))
        if operation.name not in operations.OF_IMAGES | operations.SUMS or not channels & along:
            return state
        if "max" in operation.name:
            return self._no_longer_zero(operation, inputs)  # where all others are below 0 it is the largest
        if state.reason or not channels <= along:
            return replace(state, alone=False)
        self.found.readers.add(Reader(operation.module, False, False))  # a sum over channels reads them
        return replace(state, past=True)

    def _elementwise(self, operation: Operation, inputs: dict[int, _State]) -> _State:
        """Values that hold other channels in the same places do not keep each other silent."""
        silent = {number: state for number, state in inputs.items() if not state.reason}
        zeros = [{number for number in silent if silent[number].layout == x.layout} for x in inputs.values()]
        if all(operations.makes_zero(operation, each, (0.7, True), (-1.3, False)) for each in zeros):
            return self._merged(silent)  # whatever else it gets
        are_data = not any(n in self.trace.constants for n in operation.inputs if n not in inputs)
        added = inputs == silent and are_data and all(operations.is_sum(operation, each) for each in zeros)
        if added and operations.makes_zero(operation, silent, (0.0, True), (0.0, False)):
            return replace(self._merged(silent), alone=False)  # other channels are added
        return self._no_longer_zero(operation, inputs)

    def _with(self, operation: Operation, inputs: dict[int, _State], values: Sequence[Value]) -> _State:
        """With other values at places of the channel."""
        others = {value.number for value in values if value.dtype.is_floating_point} - inputs.keys() - self.trace.zeros
        if others & self.trace.constants:
            return self._no_longer_zero(operation, inputs)
        state = self._merged(inputs)
        return replace(state, alone=state.alone and not others)

    def _no_longer_zero(self, operation: Operation, inputs: dict[int, _State]) -> _State:
        state = self._merged(inputs)
        reason = f"behind it comes {operation.name}, which does not make 0 of a channel that is 0"
        return replace(state, reason=state.reason or reason)

    def _merged(self, inputs: Mapping[int, _State]) -> _State:
        states = inputs.values()
        reasons = [state.reason for state in states if state.reason]
        return _State(reasons[0] if reasons else "", all(state.alone for state in states))
