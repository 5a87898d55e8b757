"""State of training, put back after passes that are not part of it."""

import contextlib
import functools
import gc
import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_MOST_OBJECTS = 2000  # searched for generators
_LARGEST = 1_000_000  # elements: a larger tensor is a cache of activations


def seed_of(*numbers: int) -> int:
    """A seed below 2**56 that depends on ``numbers`` alone."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "little")


def generator_of(*numbers: int) -> torch.Generator:
    """A generator of the CPU with the seed ``seed_of``."""
    return torch.Generator().manual_seed(seed_of(*numbers))


def random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators (CPU and CUDA), for ``torch.load(weights_only=True)``."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    keys = torch.from_numpy(np.asarray(keys).astype(np.int64))
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [kind, keys, position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        saved = state["cuda"]
        if torch.is_tensor(saved):  # version 0.2.0: the current device's
            torch.cuda.set_rng_state(saved.cpu())
        else:
            torch.cuda.set_rng_state_all([one.cpu() for one in saved[: torch.cuda.device_count()]])


@contextlib.contextmanager
def preserved_random_state(*holders: Any, seed: int | None = None) -> Iterator[None]:
    """Puts every random state back, and the generators in ``holders`` (``generators_in``); inside, ``seed`` sets those
    of Python, NumPy and torch."""
    state, generators = random_state(), generators_in(*holders)
    put_back = [_resetting(generator) for generator in generators]
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            for one in (torch, *(generator for generator in generators if isinstance(generator, torch.Generator))):
                one.manual_seed(seed)
        yield
    finally:
        set_random_state(state)
        for call in put_back:
            call()


def _resetting(generator: Any) -> Callable[[], Any]:
    """A call that sets a generator to its state of now."""
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        return functools.partial(setattr, bits, "state", bits.state)
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    return functools.partial(generator.set_state, generator.get_state())


def generators_in(*holders: Any) -> list[Any]:
    """The random generators in attributes of ``holders`` (data loaders, data sets, ...), of the objects there, and so
    on."""
    found, seen, waiting = [], set(), list(holders)
    while waiting and len(seen) < _MOST_OBJECTS:
        one = waiting.pop(0)
        if id(one) in seen or isinstance(one, (str, bytes, int, float, Tensor, np.ndarray, nn.Module, type)):
            continue
        seen.add(id(one))
        if isinstance(one, _GENERATORS):
            found.append(one)
        elif isinstance(one, (list, tuple, dict)):
            waiting += list(one.values() if isinstance(one, dict) else one)[:50]
        else:
            waiting += list(getattr(one, "__dict__", {}).values())
            waiting += gc.get_referents(*(getattr(one, "__closure__", None) or ()))
            waiting.append(getattr(one, "__self__", None))
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel or torch.compile."""
    inner: Any = model
    while isinstance(inner, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or hasattr(inner, "_orig_mod"):
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    return inner


@contextlib.contextmanager
def undisturbed(model: nn.Module, own_modes: bool = False, trains: bool = True) -> Iterator[None]:
    """Sets training mode; puts back every random state, buffer, gradient, mode and plain attribute of modules.

    Args:
        own_modes: every module stays in its mode if the model is in that in which it trains (frozen BN stays frozen).
        trains: whether that is training mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    own = [module for module, _ in modes if not isinstance(module, torch.jit.ScriptModule)]  # whose state is Python's
    places = [(place, dict(place)) for module in own for place in (vars(module), module._buffers)]
    plain = [value for module in own for value in vars(module).values() if _is_plain(value)]
    tensors = [tensor for tensor in (*model.buffers(), *plain) if torch.is_tensor(tensor)]
    values = [tensor.detach().clone() for tensor in tensors]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    with preserved_random_state():
        try:
            if not (own_modes and model.training == trains):
                model.train(trains)
            yield
        finally:
            for place, before in places:
                place.clear()
                place.update(before)
            for module, mode in modes:
                module.training = mode
            for tensor, value in zip(tensors, values, strict=True):
                with torch.no_grad():
                    if tensor.shape != value.shape:
                        tensor.resize_(value.shape)
                    tensor.copy_(value)
            for parameter, gradient in gradients:
                parameter.grad = gradient


class HiddenState:
    """Numbers and tensors in plain attributes and non-persistent buffers of modules, as they are when this is made.

    Detectron2's RetinaNet and FCOS average their loss normalizer so. Not seen: lists, dicts, arrays, generators,
    tensors of a graph or of more than 1,000,000 elements, and attributes that are removed later.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._before = dict(_attributes(model))

    def changed(self) -> dict[str, Any]:
        """Returns "module:attribute" -> value of those that have another value now; tensors on the CPU."""
        before = self._before
        now = _attributes(self.model)
        return {name: value for name, value in now if name not in before or not _is_same(value, before[name])}

    def load(self, changed: dict[str, Any]) -> list[str]:
        """Sets what ``changed`` of another process returned. Returns the names that this model does not have."""
        unknown = []
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        for name, value in changed.items():
            module, _, attribute = name.rpartition(":")
            try:
                owner = self.model.get_submodule(module)
            except AttributeError:
                unknown.append(name)
                continue
            if torch.is_tensor(value):
                held = getattr(owner, attribute, None)
                value = value.to(held.device if torch.is_tensor(held) else device)
            setattr(owner, attribute, value)
        return unknown


def _attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields ("module:attribute", value), tensors copied to the CPU."""
    for name, module in model.named_modules():
        held = vars(module) | {key: module._buffers.get(key) for key in module._non_persistent_buffers_set}
        for key, value in held.items():
            if key != "training" and _is_plain(value):
                value = value.detach().cpu().clone() if torch.is_tensor(value) else value
                yield f"{name}:{key}", float(value) if isinstance(value, float) else value


def _is_plain(value: Any) -> bool:
    if torch.is_tensor(value):
        return value.grad_fn is None and not isinstance(value, nn.Parameter) and value.numel() <= _LARGEST
    return isinstance(value, (bool, int, float, type(None)))


def _is_same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    return a.dtype == b.dtype and torch.equal(a, b) if torch.is_tensor(a) else a == b
