"""A record of one forward pass: which operation made which value from which.

It sees torch's own operations, so it does not matter how a network is written. Values are numbered and not kept.
"""

import gc
import sys
import threading
import traceback
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

# The documented way to see every operation (docs.pytorch.org, "Extending PyTorch", modes).
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

# Values stay what they are.
_COPIES = {"_to_copy", "clone", "detach", "alias", "contiguous", "_conj", "_neg_view", "to_mkldnn"}
# Outputs do not depend on the values that go in.
_FRESH = {
    *("empty", "zeros", "ones", "full", "rand", "randn", "arange", "scalar_tensor", "randint", "randperm"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"),
    *("new_empty", "new_zeros", "new_ones", "new_full", "empty_strided", "new_empty_strided"),
    *("bernoulli", "uniform", "normal", "random", "exponential", "fill", "zero", "lift_fresh"),
}
Modules = Mapping[str, nn.Module]
# Not searched for tensors.
_CLOSED = (nn.Module, type, ModuleType, FunctionType, MethodType, CodeType, FrameType, *weakref.ProxyTypes)
_MOST_OBJECTS = 20_000  # searched: an attribute may hold a data set


@dataclass(frozen=True)
class Value:
    """A tensor in the arguments of an operation. Copies have the same number."""

    number: int
    dtype: torch.dtype
    shape: torch.Size
    steps: tuple[int, ...]  # in memory


@dataclass
class Operation:
    """One operation of a pass.

    Attributes:
        name: without the underscore of one that works in place.
        arguments, keywords: with ``Value`` for tensors.
        inputs, outputs: numbers of values.
        modules: the watched modules that were running, the innermost last.
        call: which call of the innermost one it was.
    """

    function: Callable[..., Any]
    name: str
    arguments: tuple
    keywords: dict[str, Any]
    inputs: list[int]
    outputs: list[int]
    modules: tuple[str, ...]
    call: int

    @property
    def module(self) -> str:
        return self.modules[-1] if self.modules else ""


class Trace(TorchDispatchMode):
    """Records the operations that run in this thread while it is entered.

    Attributes:
        constants: numbers of values without data: what the model holds, fresh tensors, and what is made of these.
        parameters: "module.attribute" of watched modules that have run -> number.
        zeros: those of them that are 0, or not written yet.
        values: by number, as they were made.
        left: numbers of the values that left the network.
        held_by: number -> names of the modules that put the value out.
        hooked: numbers of the values that a forward hook got.
        entered: names of the watched modules that have run.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._numbers = WeakTensorKeyDictionary()
        self._count = self._calls = 0
        self.running: list[tuple[str, int]] = []
        # Writing to a tensor in place changes all that share its memory.
        self._sharing: dict[int, WeakTensorKeyDictionary] = {}
        self.zeros: set[int] = set()
        self.values: dict[int, Value] = {}
        self.parameters: dict[str, int] = {}
        self.left: set[int] = set()
        self.held_by: dict[int, set[str]] = defaultdict(set)
        self.hooked: set[int] = set()
        self.entered: set[str] = set()
        held = (*model.parameters(), *model.buffers(), *_attributes(model, depth=1))
        self.constants = {self.number(tensor) for tensor in held}

    def enter_module(self, name: str, module: nn.Module) -> None:
        self._calls += 1
        self.running.append((name, self._calls))
        self.entered.add(name)
        for key in ("weight", "bias"):  # of a replica, in DataParallel
            tensor = getattr(module, key, None)
            if isinstance(tensor, Tensor):
                self.parameters.setdefault(f"{name}.{key}", self.number(tensor))

    def number(self, tensor: Tensor) -> int:
        """The number of the value that ``tensor`` holds now."""
        return self._numbers[tensor] if tensor in self._numbers else self._renumber(tensor)

    def _renumber(self, tensor: Tensor, number: int | None = None) -> int:
        if number is None:
            self._count += 1
            number = self._count
        self._numbers[tensor] = number
        self.values.setdefault(number, self._value(tensor))
        if tensor.layout == torch.strided and (place := tensor.untyped_storage().data_ptr()):
            self._sharing.setdefault(place, WeakTensorKeyDictionary())[tensor] = True
        return number

    def _value(self, tensor: Tensor) -> Value:
        steps = tensor.stride() if tensor.layout == torch.strided else ()
        return Value(self.number(tensor), tensor.dtype, tensor.shape, steps)

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        keywords = keywords or {}
        noted = tree_map_only(Tensor, self._value, (arguments, keywords))
        inputs = [value.number for value in values_in(noted)]
        result = function(*arguments, **keywords)
        name = function.overloadpacket.__name__
        if name in _COPIES:
            self._renumber(result, inputs[0])
            return result
        in_place = name.endswith("_") and not name.endswith("__")
        name = name[:-1] if in_place else name
        made = [x for x in tree_leaves(arguments[0] if in_place else result) if isinstance(x, Tensor)]
        outputs = [self._renumber(tensor) for tensor in made]
        if name in _FRESH or (inputs and self.constants.issuperset(inputs)):
            self.constants.update(outputs)
            can_be_blank = name in _FRESH or self.zeros.issuperset(inputs)
            if can_be_blank and ("empty" in name or not any(x.is_meta or x.any() for x in made)):
                self.zeros.update(outputs)
        self._record(function, name, *noted, inputs, outputs)
        if in_place:
            self._renumber_sharing(made)
        return result

    def _renumber_sharing(self, written: list[Tensor]) -> None:
        """Tensors that share memory with a written one hold a mixture of before and after, along some dimensions."""
        for tensor in written:
            sharing = self._sharing.get(tensor.untyped_storage().data_ptr(), {})
            for other in [other for other in sharing if other is not tensor]:
                values = self._value(other), self._value(tensor)
                pairs, here = (list(zip(value.shape, value.steps, strict=True)) for value in values)
                if pairs == here and other.storage_offset() == tensor.storage_offset():
                    self._renumber(other, self._numbers[tensor])
                    continue
                arguments = (*values, [dim for dim, pair in enumerate(pairs) if pair not in here])
                numbers = [value.number for value in values], [self._renumber(other)]
                self._record(torch.ops.aten.slice_scatter.default, "overlap", arguments, {}, *numbers)

    def _record(self, function: Any, name: str, arguments: Any, keywords: Any, inputs: list, outputs: list) -> None:
        modules = tuple(running for running, _ in self.running)
        call = self.running[-1][1] if self.running else 0
        self.operations.append(Operation(function, name, arguments, keywords, inputs, outputs, modules, call))


class _PassOfThread(threading.local):
    """The training pass that a thread is in."""

    frame: FrameType | None = None  # of the outermost module's call
    depth = 0  # of calls of outer modules
    trace: Trace | None = None


class TracedPass:
    """Traces the next passes of a network, each from the entry of its outermost module to the exit.

    Args:
        modules: those whose outputs are noted.
        watched: modules that operations name.
        outer: modules by which a pass may be entered.
        done: called with the trace of each pass that ended without an error.
    """

    def __init__(
        self, modules: Modules, watched: Modules, outer: Iterable[nn.Module], done: Callable[[Trace], None]
    ) -> None:
        self._done = done
        self._mine = _PassOfThread()  # DataParallel runs replicas in threads
        self._lock = threading.Lock()  # held by the one traced pass, until it is done
        self._handles: list[Any] = []
        for module in outer:
            self._hook(module, self._enter, self._leave)
        for name, module in watched.items():
            self._hook(module, lambda module, _, name=name: self._enter_watched(name, module), self._leave_watched)
        for name, module in modules.items():
            self._handles.append(module.register_forward_hook(HookOfOne(partial(self._note_output, name))))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._abandon()

    def _hook(self, module: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> None:
        self._handles.append(module.register_forward_pre_hook(HookOfOne(before)))
        self._handles.append(module.register_forward_hook(HookOfOne(after), always_call=True))

    def _enter(self, module: nn.Module, _: Any) -> None:
        # Checkpointing runs parts again in the backward pass, which no public function tells.
        trains = torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1
        frames = [frame for frame, _ in traceback.walk_stack(sys._getframe())]
        mine = self._mine
        if mine.frame not in frames:  # None, or interrupted: hooks run after an Exception only
            mine.frame, mine.depth = None, 0
            self._abandon()
            if trains:
                calls = (frame for frame in frames if frame.f_code.co_filename == nn.modules.module.__file__)
                mine.frame = next(calls, frames[-1])
                if self._lock.acquire(blocking=False):
                    mine.trace = Trace(module).__enter__()
        mine.depth += mine.frame is not None

    def _leave(self, module: nn.Module, _: Any, output: Any) -> None:
        mine = self._mine
        if not mine.depth:
            return
        mine.depth -= 1
        if mine.depth:
            return
        mine.frame = None
        if (trace := self._stop()) is None:
            return
        try:
            if output is not None:
                trace.left = {trace.number(tensor) for tensor in (*tensors_in(output), *_attributes(module))}
                self._done(trace)
        finally:
            self._lock.release()

    def _abandon(self) -> None:
        if self._stop() is not None:
            self._lock.release()

    def _stop(self) -> Trace | None:
        trace, self._mine.trace = self._mine.trace, None
        if trace is not None:
            trace.__exit__(None, None, None)
        return trace

    def _enter_watched(self, name: str, module: nn.Module) -> None:
        if self._mine.trace is not None:
            self._mine.trace.enter_module(name, module)

    def _leave_watched(self, *_: Any) -> None:
        if self._mine.trace is not None:
            self._mine.trace.running.pop()

    def _note_output(self, name: str, module: nn.Module, _: Any, output: Any) -> None:
        if (trace := self._mine.trace) is None:
            return
        numbers = {trace.number(tensor) for tensor in tensors_in(output)}
        for number in numbers:
            trace.held_by[number].add(name)
        if is_hooked(module):
            trace.hooked |= numbers


class HookOfOne:
    """A hook that copies and pickles of its module do not have."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = torch.compiler.disable(function)

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __reduce__(self) -> tuple:
        return HookOfOne, (_nothing,)


def is_hooked(module: nn.Module) -> bool:
    """Tells whether somebody else's forward hook gets the output."""
    return not all(isinstance(hook, HookOfOne) for hook in module._forward_hooks.values())


def _nothing(*arguments: Any) -> None:
    pass


def tensors_in(*found: Any, depth: int = 8) -> Iterator[Tensor]:
    """The tensors in objects, in what these hold, and so on to a depth, in no order; not in modules, classes, code."""
    seen: dict[int, Any] = {}
    for _ in range(depth + 1):
        searched = (one for one in found if gc.is_tracked(one) or isinstance(one, Tensor))
        new = {id(x): x for x in searched if id(x) not in seen and not issubclass(type(x), _CLOSED)}
        seen |= new
        yield from (one for one in new.values() if isinstance(one, Tensor))
        if len(seen) > _MOST_OBJECTS:
            break
        found = tuple(gc.get_referents(*(one for one in new.values() if not isinstance(one, Tensor))))


def _attributes(model: nn.Module, depth: int = 8) -> Iterator[Tensor]:
    """Tensors in plain attributes of modules, and in what these hold."""
    items = [item for module in model.modules() for item in vars(module).items()]
    others = [held for key, held in items if key not in ("_parameters", "_buffers", "_modules") and "hooks" not in key]
    return tensors_in(*others, depth=depth)


def values_in(arguments: Any) -> list[Value]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Value)]
